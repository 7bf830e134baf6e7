"""Methods that keep a network plastic, through the compiled programs, against NumPy."""

import jax
import numpy as np
import numpy_mlp as oracle
from programs import STRIPES, Trainer, assert_same, batch, host, mlp, normalised, seed_of

from seal_jax.core.state import Stream, stream_key

EPOCH = {"epochs_per_generation": 1}  # of five steps


def test_l2_init_pulls_towards_the_first_weights_in_all_generations():
    config = mlp({"name": "l2_init"}, optimizer={"weight_decay": 0.3}, train=EPOCH)
    trainer = Trainer(STRIPES, config)
    initial = params = oracle.wide(seed_of(trainer.state.weights.params))
    trace, schedule = oracle.zeros(params), trainer.experiment.context.schedule()
    for step in range(10):
        if step == 5:
            trace = oracle.zeros(params)
        _, gradient = oracle.loss_and_gradient(params, *batch(step, config))
        pull = oracle.add(params, -1, initial)
        trace = oracle.add(oracle.add(gradient, 0.3, pull), 0.9, trace)
        params = oracle.add(params, -float(schedule(step % 5)), trace)
    trainer.run(2)
    assert_same(seed_of(host(trainer).weights.params), params, rtol=1e-3, atol=1e-5)
    assert oracle.norm(oracle.add(params, -1, initial)) > 0.1
    plain = Trainer(STRIPES, mlp(optimizer={"weight_decay": 0.3}, train=EPOCH)).run(2)
    difference = jax.tree.map(lambda a, b: a - b, params, seed_of(host(plain).weights.params))
    assert oracle.norm(difference) > 0.1


def shrunk(weights, gradient, least):
    """Shin et al. 2024: a dense layer's columns, and its biases together."""
    size = np.linalg.norm(weights, axis=0) * np.linalg.norm(gradient, axis=0)
    # Units that are off have no gradient.
    return weights * np.clip(-(weights * gradient).sum(0) / np.maximum(size, 1e-12), least, 1)


def test_dash_shrinks_by_the_average_gradient_of_the_training_images():
    """Two seeds on two devices each; seven batches of 16 of the 90 images, in an order that starts over."""
    method = {"name": "dash", "least": 0.05, "alpha": 0.4, "batches": 7}
    trainer = Trainer(STRIPES, mlp(method, train={**EPOCH, "seeds": 2}), devices=4)
    assert trainer.experiment.mesh.shape == {"seed": 2, "data": 2}
    before = host(trainer.run(1))
    trainer.event()
    after = host(trainer)
    for seed in range(2):
        params = oracle.wide(seed_of(before.weights.params, seed))
        key = jax.random.fold_in(stream_key(seed, Stream.EVENT, 1), 1)
        order = np.tile(np.asarray(jax.random.permutation(key, 90)), 2)
        average = oracle.zeros(params)
        for rows in order[: 7 * 16].reshape(7, 16):
            images, labels = normalised(STRIPES.train.images[rows]), STRIPES.train.labels[rows]
            _, gradient = oracle.loss_and_gradient(params, images, labels)
            average = jax.tree.map(lambda a, g: 0.6 * a + 0.4 * g, average, gradient)
        wanted = jax.tree.map(lambda w, g: shrunk(w, g, 0.05), params, average)
        assert_same(seed_of(after.weights.params, seed), wanted, rtol=1e-3, atol=1e-5)
        kernels = [
            (wanted[n]["linear"]["kernel"] / params[n]["linear"]["kernel"])[0]
            for n in oracle.HIDDEN
        ]
        factors = np.concatenate(kernels)
        assert factors.max() > 0.1 > 0.06 > factors.min()
    assert_same(after.opt_state, before.opt_state)


def test_the_hare_goes_back_to_the_tortoise_across_generations():
    """Weights and BatchNorm's statistics, every third epoch of generations of two."""
    method = {"name": "hare_tortoise", "decay": 0.8, "every_epochs": 3}
    train = {"generations": 4, "epochs_per_generation": 2}
    trainer = Trainer(STRIPES, mlp(method, norm="batch", train=train))
    assert trainer.experiment.clock.steps_per_epoch == 5
    tortoise = oracle.wide(seed_of(trainer.state.weights))
    for step in range(31):
        before = host(trainer)
        trainer.calls(1)  # the event of a generation included
        after = oracle.wide(seed_of(trainer.state.weights))
        tortoise = jax.tree.map(lambda slow, fast: 0.8 * slow + 0.2 * fast, tortoise, after)
        assert_same(seed_of(trainer.state.ema), tortoise, rtol=1e-4, atol=1e-6)
        if step in (15, 30):
            # As if the step had begun at the average: every bit of it.
            assert oracle.norm(oracle.add(before.ema, -1, before.weights)) > 0.1
            parts = ("weights", "ema", "opt_state")
            found = [getattr(host(trainer), part) for part in parts]
            trainer.put(before._replace(weights=before.ema)).calls(1)
            assert_same([getattr(host(trainer), part) for part in parts], found)


def test_a_training_that_has_stopped_stays_where_it_is():
    config = mlp(
        {"name": "hare_tortoise", "decay": 0.8, "every_epochs": 1},
        train={"generations": 1, "until_accuracy": 0.9},
    )
    trainer = Trainer(STRIPES, config).run(1)
    state = host(trainer)
    stopped = state.early_stopping._replace(stopped=np.ones(1, bool))
    trainer.put(state._replace(early_stopping=stopped)).calls(2)
    assert_same(host(trainer).weights, state.weights)
    assert_same(host(trainer).ema, state.ema)
