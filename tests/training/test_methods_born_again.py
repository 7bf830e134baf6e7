"""Born-again networks through the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import SHAPE, STRIPES, Trainer, assert_same, differ, host, mlp, seed_of

from seal_jax.core import mesh as meshes
from seal_jax.core.state import Stream, Weights, stream_key
from seal_jax.data import augment
from seal_jax.methods.method import HookContext
from seal_jax.training import experiment as experiments
from seal_jax.training.batches import epoch_order

TRAIN = {"generations": 3, "epochs_per_generation": 1}


@pytest.mark.slow
def test_without_the_teacher_fresh_students_train_on_the_labels():
    trainer = Trainer(STRIPES, mlp({"name": "born_again", "weight": 0.0}, train=TRAIN))
    plain = Trainer(STRIPES, mlp(train=TRAIN))
    assert_same(trainer.state.weights, plain.state.weights)
    trainer.run(1)
    plain.run(1)
    assert_same(trainer.losses, plain.losses, rtol=1e-5)
    trainer.run(1)
    # The same student under plain training, from the step where the generation starts.
    state = host(plain)
    fresh = plain.experiment.model.init(stream_key(0, Stream.EVENT, 1))["params"]
    student = state.weights._replace(params=jax.tree.map(lambda leaf: leaf[None], fresh))
    plain.put(state._replace(weights=student)).run(1)
    assert_same(trainer.losses, plain.losses, rtol=1e-5)
    assert_same(trainer.state.weights, plain.state.weights, rtol=1e-4, atol=1e-6)
    assert trainer.losses[5] > trainer.losses[4]  # it forgot


def batch_of(trainer, step):
    """The augmented images of a step, as the model sees them, and their labels."""
    epoch, number = divmod(step, 5)
    rows = np.asarray(epoch_order(stream_key(0, Stream.ORDER, epoch), 90, 16)[0])[number]
    spec = trainer.experiment.batches.augmentation
    draws = augment.draw(stream_key(0, Stream.AUGMENT, step), 16, spec, (8, 8, 1))
    images = augment.apply(jnp.asarray(STRIPES.train.images[rows]), draws, spec)
    return images, STRIPES.train.labels[rows]


def distilled(student, teacher, labels, *, weight, temperature):
    """Hinton et al. 2015, section 2, in float64."""
    student, teacher = (np.asarray(logits, np.float64) for logits in (student, teacher))
    log_p, log_q = (oracle.log_softmax(logits / temperature) for logits in (teacher, student))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    plain = oracle.cross_entropy(student, labels)
    return (1 - weight) * plain + weight * temperature**2 * divergence


def test_students_learn_from_the_last_generation_on_the_same_images():
    method = {"name": "born_again", "weight": 0.7, "temperature": 3.0}
    method |= {"tolerance": 0.3, "tolerant_classes": 3}
    augmented = {"crop_padding": 1, "flip": True}
    trainer = Trainer(STRIPES, mlp(method, norm="batch", train=TRAIN, data=augmented), devices=2)
    module = trainer.experiment.model.module.clone(bn_axis_name=None)

    def logits(weights, images, train):
        variables = {"params": weights.params, "batch_stats": weights.batch_stats}
        return module.apply(variables, images, train=train, mutable=["batch_stats"])[0]

    # Generation 0: the tolerant loss.
    start = seed_of(host(trainer).weights)
    images, labels = batch_of(trainer, 0)
    scores = np.asarray(logits(start, images, True), np.float64)
    falling = -np.sort(-oracle.softmax(scores), -1)
    gap = falling[:, 0] - falling[:, 1:3].mean(-1)
    expected = oracle.cross_entropy(scores, labels) + 0.3 * gap.mean()
    trainer.run(1)
    np.testing.assert_allclose(trainer.losses[0][0, 0], expected, rtol=1e-5)

    for generation in (1, 2):
        teacher = host(trainer).weights
        student = host(trainer.event())
        assert_same(student.method_state.weights, teacher)
        fresh = trainer.experiment.model.init(stream_key(0, Stream.EVENT, generation))
        assert_same(seed_of(student.weights.params), fresh["params"], rtol=1e-6)
        assert_same(seed_of(student.weights.batch_stats), fresh["batch_stats"])
        trainer.state, losses = trainer.experiment.train(trainer.state, trainer.splits["train"])
        images, labels = batch_of(trainer, 5 * generation)
        scores = logits(seed_of(student.weights), images, True)
        judged = {train: logits(seed_of(teacher), images, train) for train in (False, True)}
        options = {"weight": 0.7, "temperature": 3.0}
        np.testing.assert_allclose(
            losses[0, 0], distilled(scores, judged[False], labels, **options), rtol=1e-5
        )
        # A teacher with statistics of the batch would say something else.
        assert abs(distilled(scores, judged[True], labels, **options) - losses[0, 0]) > 1e-3
        trainer.calls(4)
        assert_same(trainer.state.method_state.weights, teacher)
        assert differ(trainer.state.weights, student.weights)


def test_a_student_does_not_have_the_normalisers_of_its_teacher():
    """A training may start from a run of LW, which inserted them."""
    config = mlp({"name": "born_again"})
    experiment = experiments.build(config, SHAPE, meshes.make(config, jax.devices()[:1]))
    normalisers = jax.tree.map(lambda leaf: leaf + 2, experiment.model.empty_normalisers())
    weights = Weights(experiment.model.init(jax.random.key(0))["params"], {}, normalisers)
    hook = HookContext(jax.random.key(1), 1, weights, None, (), None)
    after = experiment.method.on_generation_start(hook)
    assert_same(after.weights.normalisers, experiment.model.empty_normalisers())
    assert after.method_state.weights is weights
