"""States that are stored in slices over the devices that share a batch: the same training, less memory."""

import collections
import re

import jax
import numpy as np
import pytest
from programs import STRIPES, Trainer, assert_same, host, mlp
from test_methods_all import OPTIONS

from seal_jax import methods
from seal_jax.training.checkpoints import Checkpoints

COLLECTIVE = re.compile(
    r" = .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def trained(sharding, name="seal", options=None, calls=3, **sections):
    """Three steps on eight devices; with the optimizer's averages and validation there is all that can be divided."""
    options = {"name": name, **OPTIONS.get(name, {}), **(options or {})}
    if name in ("seal", "llf"):
        options["threshold"] = "dense2"
    train = {"generations": 2, "epochs_per_generation": 1, "batch_size": 24}
    train |= {"pretrained": "given" if name == "pof" else ""}
    config = mlp(
        options,
        norm="batch",
        **sections
        | {
            "train": train | sections.get("train", {}),
            "run": {"parameter_sharding": sharding} | sections.get("run", {}),
        },
    )
    return Trainer(STRIPES, config, devices=8).calls(calls)


def bytes_of(tree):
    """Return the bytes of a tree, whole and on the first device."""
    leaves = jax.tree.leaves(tree)
    here = [leaf.addressable_shards[0].data for leaf in leaves]
    return sum(leaf.nbytes for leaf in leaves), sum(part.nbytes for part in here)


def collectives(trainer):
    """Count the collectives of the train program."""
    compiled = trainer.experiment.train.lower(trainer.state, trainer.splits["train"]).compile()
    return collections.Counter(COLLECTIVE.findall(compiled.as_text()))


def assert_close(found, expected):
    """Compare two states leaf by leaf, to the rounding of sums in another order."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if np.issubdtype(b.dtype, np.floating) and b.size:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
        else:
            np.testing.assert_array_equal(a, b)


def test_sam_on_slices_is_sam():
    """Its two gradients are summed, the norms between them and the averages are of the whole."""
    kernels = 2  # those of the two large layers are divided, all else is small
    expected = []
    for sharding in ("none", "optimizer", "all"):
        trainer = trained(sharding, "sam", optimizer={"ema": 0.9, "clip_norm": 1.0})
        counts = collectives(trainer)
        experiment, validation = trainer.experiment, trainer.splits["validation"]
        trainer.state, sums = experiment.validate(trainer.state, validation)
        assert experiment.finite(trainer.state).all()
        found = [host(trainer), jax.device_get(sums)]
        if sharding == "none":
            assert counts.keys() == {"all-reduce"}
            expected = found
            continue
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
        assert counts["reduce-scatter"] == 2 * kernels
        # "optimizer" gathers the parameters once they are updated, "all" before they are used; both those of the
        # second gradient.
        assert counts["all-gather"] == 2 * kernels
        assert counts.keys() == {"all-reduce", "all-gather", "reduce-scatter"}
        state = trainer.state
        for part in (state.opt_state, state.ema, state.best):
            total, here = bytes_of(part)
            assert here < 0.4 * total  # BatchNorm and the last layer are whole
        total, here = bytes_of(state.weights.params)
        assert (here < 0.4 * total) == (sharding == "all")


OPTIMIZERS = {
    name: {"optimizer": {"name": name, "momentum": 0.0, "weight_decay": 0.0}}
    for name in ("adamw", "lamb", "lars", "adafactor", "muon", "lion")
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sections"),
    [
        *((name, {}) for name in methods.NAMES),
        *(("normal", sections) for sections in OPTIMIZERS.values()),
        ("sam", {"method": {"adaptive": True}}),
        ("seal", {"optimizer": {"name": "adamw", "momentum": 0.0, "weight_decay": 0.0}}),
        ("normal", {"train": {"seeds": 2}, "run": {"seed_batching": "map"}}),
        ("sam", {"train": {"seeds": 2}, "run": {"seed_batching": "vmap", "data_devices": 8}}),
        ("sam", {"train": {"seeds": 2}}),
        ("normal", {"train": {"patience": 1, "drop_last": False}}),
    ],
    ids=str,
)
def test_every_method_and_optimizer_on_slices(name, sections):
    """Three steps, the event of a generation, and a step of that."""
    sections = dict(sections)
    options = sections.pop("method", {})
    whole = trained("none", name, options, **sections)
    for sharding in ("optimizer", "all"):
        sliced = trained(sharding, name, options, **sections)
        assert_close(host(sliced), host(whole))
        specs = jax.tree.map(lambda leaf: leaf.sharding, sliced.state)
        sliced.calls(1)
        after = jax.tree.map(lambda leaf: leaf.sharding, sliced.state)
        same = jax.tree.map(
            lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), specs, after, sliced.state
        )
        assert all(jax.tree.leaves(same))
        alone = Trainer.build(STRIPES, sliced.experiment.settings, 8)
        stored = jax.tree.map(
            lambda leaf: leaf.sharding, alone.abstract_state(sliced.experiment.settings.train.seeds)
        )
        same = jax.tree.map(
            lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), stored, after, sliced.state
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_a_checkpoint_is_resumed_with_other_slices_on_other_devices(tmp_path):
    """The run ends as one that was never stopped and had no slices."""

    def config(sharding, steps):
        epochs = {"generations": 1, "epochs_per_generation": 3, "batch_size": 24}
        run = {"parameter_sharding": sharding, "steps_per_call": steps}
        return mlp(norm="batch", train=epochs, run=run)

    workdir, states = tmp_path / "run", []
    for sharding, devices in (("none", 8), ("all", 8), ("optimizer", 4)):
        experiment = Trainer.build(STRIPES, config(sharding, 1), devices)
        with Checkpoints(workdir, keep=3) as checkpoints:
            restored = checkpoints.restore(experiment.abstract_state(1))
            trainer = Trainer(STRIPES, config(sharding, 1), devices)
            if restored:
                trainer.state = restored.state
                assert_same(host(trainer), states[-1])
            trainer.calls(3)
            states.append(host(trainer))
            checkpoints.save(int(trainer.state.step[0]), trainer.state, {})
            checkpoints.wait()
    assert_close(states[-1], host(Trainer(STRIPES, config("none", 3), 8).calls(3)))
