"""Methods that keep a network plastic, through the compiled programs, against NumPy."""

import jax
import numpy_mlp as oracle
from programs import STRIPES, Trainer, assert_same, batch, host, mlp, seed_of

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
