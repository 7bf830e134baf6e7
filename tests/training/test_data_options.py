"""Mixed images, replaced labels and warm starts inside the compiled steps, and in a run's folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import SHAPE, STRIPES, Trainer, assert_same, host, mlp, normalised, seed_of

from seal_jax.core import mesh as meshes
from seal_jax.core.state import Stream, stream_key
from seal_jax.data import Split, augment, mixing
from seal_jax.errors import UsageError
from seal_jax.training import experiment as experiments
from seal_jax.training import loop, metrics
from seal_jax.training.batches import epoch_order, place

PLAIN = {"schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize(("name", "devices"), [("normal", 8), ("foca", 1)])
def test_a_step_on_mixed_images_equals_numpy_pixels_and_both_losses(name, devices):
    """FOCA's own classifier learns from the mixed labels as well, on the features of the same pass."""
    method = {"name": name} | ({"weak_batch_size": 16} if name == "foca" else {})
    config = mlp(method, optimizer=PLAIN, data={"mixup": 1.0, "cutmix": 1.0, "randaugment": 1})
    trainer = Trainer(STRIPES, config, devices=devices)
    augmentation = trainer.experiment.batches.augmentation
    for step in range(2):
        before = seed_of(host(trainer).weights.params)
        trainer.calls(1)
        rows = np.asarray(epoch_order(stream_key(0, Stream.ORDER, 0), 90, 16)[0][step])
        labels = STRIPES.train.labels[rows]
        draws = augment.draw(stream_key(0, Stream.AUGMENT, step), 16, augmentation, (8, 8, 1))
        images = np.asarray(augment.apply(STRIPES.train.images[rows], draws, augmentation))
        spec = mixing.Mixing(mixup=1.0, cutmix=1.0)
        params = mixing.draw(stream_key(0, Stream.MIX, step), 16, spec, (8, 8, 1))
        other = np.arange(16) ^ 1
        top, left, bottom, right = np.asarray(params.box[0])
        own = np.full((8, 8, 1), float(params.outside[0]))
        own[top:bottom, left:right] = 1 - own[top:bottom, left:right]
        mixed = jnp.asarray(own * images + (1 - own) * images[other], jnp.float32)

        def objective(weights, mixed=mixed, labels=labels, params=params, other=other):
            logits = trainer.experiment.model.module.apply({"params": weights}, mixed, False)
            own, others = (0.9 * jax.nn.one_hot(of, 4) + 0.1 / 4 for of in (labels, labels[other]))
            share = params.share[0]
            targets = share * own + (1 - share) * others
            return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

        loss, gradient = jax.jit(jax.value_and_grad(objective))(before)
        expected = jax.tree.map(lambda p, g: p - 0.05 * g, before, gradient)
        after, head = seed_of(host(trainer).weights.params), trainer.experiment.model.head
        if name == "foca":
            expected, after = expected[head], after[head]
        else:
            np.testing.assert_allclose(trainer.losses[step][0, 0], loss, rtol=1e-5)
        assert_same(after, expected, rtol=1e-4, atol=1e-6)


def test_pairs_must_be_on_one_device():
    config = mlp(data={"mixup": 0.2}, train={"batch_size": 8})
    mesh = meshes.make(config, jax.devices()[:8])
    with pytest.raises(
        UsageError, match=r"batch_size = 8 must be a multiple of 16 with data\.mixup"
    ):
        experiments.build(config, SHAPE, mesh)


def noisy_stripes():
    """The stripes, with every third training image under the label of the next class."""
    labels = STRIPES.train.labels.copy()
    labels[::3] = (labels[::3] + 1) % 4
    train = Split(STRIPES.train.images, labels, STRIPES.train.labels)
    return dataclasses.replace(STRIPES, train=train)


def test_accuracy_is_counted_against_both_labels():
    dataset = noisy_stripes()
    trainer = Trainer(dataset, mlp(), devices=8).calls(1)
    assert trainer.experiment.batches.shape.noisy
    expected = np.zeros(5)
    for step in range(1, 3):
        weights = seed_of(host(trainer).weights)
        trainer.calls(1)
        rows = np.asarray(epoch_order(stream_key(0, Stream.ORDER, 0), 90, 16)[0][step])
        images = normalised(dataset.train.images[rows]).astype(np.float32)
        logits = trainer.experiment.model.module.apply(weights._asdict(), images, False)
        predicted = np.asarray(logits).argmax(-1)
        labels, clean = dataset.train.labels[rows], dataset.train.clean_labels[rows]
        wrong = labels != clean
        assert wrong.any()
        expected += [
            (predicted == labels).sum(),
            (predicted == clean).sum(),
            wrong.sum(),
            (predicted == labels)[wrong].sum(),
            (predicted == clean)[wrong].sum(),
        ]
        if step == 1:
            first = seed_of(host(trainer).metric_sums)
            before = np.array([first.correct, *first.noise]) - expected
    sums = seed_of(host(trainer).metric_sums)
    np.testing.assert_array_equal([sums.correct, *sums.noise], before + expected)


def test_without_replaced_labels_the_state_has_no_further_leaf():
    assert Trainer(STRIPES, mlp()).state.metric_sums.noise is None


@pytest.fixture(scope="module")
def warm():
    """The batches of FOCA, 27 of 90 images in the first of three generations of four epochs."""
    method = {"name": "foca", "weak_batch_size": 20}
    data = {"warm_share": 0.3, "warm_generations": 1}
    config = mlp(method, data=data, train={"drop_last": False})
    experiment = experiments.build(config, SHAPE, meshes.make(config, jax.devices()[:1]))
    batches, labels = experiment.batches, jnp.asarray(STRIPES.train.labels)
    steps = jax.jit(lambda seed, first: batches.steps(seed, first, 3, 6, labels))

    def epoch(number, seed=0):
        """Return one epoch of two calls."""
        halves = [steps(seed, 6 * number + start)._replace(key=None) for start in (0, 3)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *halves)

    return batches, epoch


def test_a_warm_start_goes_round_its_share(warm):
    _, epoch = warm
    first = epoch(0)
    share = np.unique(first.batch.rows)
    assert len(share) == 27
    counts = np.bincount(first.batch.rows.ravel())[share]
    assert set(counts.tolist()) == {96 // 27, 96 // 27 + 1}
    assert (first.batch.weights == 1).all()  # nothing needs to be filled up
    for number in range(1, 4):
        again = epoch(number)
        np.testing.assert_array_equal(np.unique(again.batch.rows), share)
        assert (again.batch.rows != first.batch.rows).any()
        assert np.isin(again.extra.rows, share).all()
    # Each round is in an order of its own.
    rounds = first.batch.rows.ravel()[:81].reshape(3, 27)
    assert (np.sort(rounds) == share).all()
    assert (rounds[0] != rounds[1]).any()
    assert set(np.unique(epoch(0, seed=1).batch.rows)) != set(share)


def test_after_a_warm_start_training_is_as_without(warm):
    _, epoch = warm
    for number in (4, 11):
        step = epoch(number)
        rows, weights = epoch_order(stream_key(0, Stream.ORDER, number), 90, 16, False)
        np.testing.assert_array_equal(step.batch.rows, rows)
        np.testing.assert_array_equal(step.batch.weights, weights)
        extra, _ = epoch_order(stream_key(0, Stream.EXTRA_ORDER, number), 90, 20)
        np.testing.assert_array_equal(step.extra.rows[:, 0], extra[np.arange(6) % 4])


def test_samples_of_a_warm_start_are_of_its_share(warm):
    batches, epoch = warm
    share = np.unique(epoch(0).batch.rows)
    arrays = place(meshes.make(mlp(), jax.devices()[:1]), STRIPES.train)
    images = normalised(STRIPES.train.images)
    for generation, inside in ((0, True), (1, False)):
        sample, labels = batches.sample(arrays, 0, jnp.asarray(generation), jax.random.key(5), 20)
        distances = np.abs(images[:, None] - np.asarray(sample)).max((2, 3, 4))
        rows = distances.argmin(0)
        assert distances.min(0).max() < 1e-5
        assert len(set(rows.tolist())) == 20
        assert np.isin(rows, share).all() == inside
        np.testing.assert_array_equal(labels, STRIPES.train.labels[rows])
        # In batches: each of its images once in as many as hold all, and so again.
        size, count = (9, 3) if inside else (30, 3)
        rounds = []
        for index in range(2 * count):
            part, _ = batches.sample(
                arrays, 0, jnp.asarray(generation), jax.random.key(5), size, jnp.asarray(index)
            )
            rounds.append(np.abs(images[:, None] - np.asarray(part)).max((2, 3, 4)).argmin(0))
        rounds = np.reshape(rounds, (2, -1))
        np.testing.assert_array_equal(rounds[0], rounds[1])
        np.testing.assert_array_equal(np.sort(rounds[0]), share if inside else np.arange(90))
    with pytest.raises(UsageError, match="larger than the training split, 27 images"):
        batches.sample(arrays, 0, jnp.asarray(0), jax.random.key(5), 28)


@pytest.fixture(scope="module")
def study(tmp_path_factory, digits_dir):
    """A finished run with all options of data, its settings, and its file of labels."""
    folder = tmp_path_factory.mktemp("study")
    fields = {
        "data_dir": str(digits_dir),
        "train_count": 30,
        "imbalance": 3.0,
        "crop_padding": 1,
        "warm_generations": 1,
        "mixup": 0.2,
        "cutmix": 1.0,
        "randaugment": 2,
        "label_file": str(folder / "labels.txt"),
    }
    clean = experiments.load_data(
        mlp(data={"data_dir": str(digits_dir), "validation_fraction": 0.0}).data
    ).train.labels
    np.savetxt(folder / "labels.txt", np.where(np.arange(len(clean)) % 4, clean, 9), fmt="%d")
    config = mlp(
        data=fields,
        train={"generations": 2, "epochs_per_generation": 2, "batch_size": 32},
        run={"steps_per_call": 0},
    )
    dataset = experiments.load_data(config.data)
    outcome = loop.train(config, folder / "run", dataset, devices=1)
    assert outcome.finished
    return folder / "run", config, dataset


def test_a_run_with_every_option_resumes_bit_for_bit(study, tmp_path):
    run, config, dataset = study
    rows = metrics.read(run)
    for row in rows:
        shares = [row[f"train/{name}"][0] for name in ("clean_accuracy", "memorised", "corrected")]
        assert all(0 <= share <= 1 for share in shares)
    # In another folder, with the newest two checkpoints lost: it goes on in the middle.
    stopped = loop.train(config, tmp_path / "again", dataset, devices=1)
    for step in sorted((tmp_path / "again" / "checkpoints").iterdir(), key=lambda p: int(p.name))[
        -2:
    ]:
        step.rename(tmp_path / f"lost{step.name}")
    resumed = loop.train(config, tmp_path / "again", dataset, devices=1)
    assert resumed.finished
    assert_same(resumed.state, stopped.state)
    assert json.dumps(metrics.read(tmp_path / "again")) == json.dumps(rows)


def test_the_labels_of_a_run_are_recorded_and_must_stay(study, tmp_path):
    run, config, dataset = study
    recorded = np.load(run / "labels.npy")
    np.testing.assert_array_equal(recorded, np.loadtxt(config.data.label_file, dtype=int))
    # The run's own labels serve its evaluations, whatever became of the file.
    gone = dataclasses.replace(config.data, label_file=str(tmp_path / "gone"))
    again = experiments.load_data(gone, run)
    np.testing.assert_array_equal(again.train.labels, dataset.train.labels)
    np.testing.assert_array_equal(again.train.clean_labels, dataset.train.clean_labels)
    other = dataclasses.replace(dataset, label_record=recorded[::-1])
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(
        UsageError, match=r"labels\.npy holds other labels than the run is to go on"
    ):
        loop.train(config, run, other, devices=1)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
