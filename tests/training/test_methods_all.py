"""What every method must do as the trainer runs it: one program, seeds apart, sharding kept."""

import jax
import numpy as np
import pytest
from programs import STRIPES, Trainer, assert_same, host, mlp

from seal_jax import methods

pytestmark = pytest.mark.slow


# Options with which a method shows what it does on little data; the others have their defaults.
OPTIONS = {
    "sa_gd": {"temperature": 0.01},
    "kels": {"keep": 0.5},
    "imp": {"rewind_step": 2},
    "pof": {"weak_batch_size": 8, "resample": 1},
    "foca": {"weak_batch_size": 8},
    "hare_tortoise": {"decay": 0.8, "every_epochs": 1},
    "redo": {"every": 2, "threshold": 0.5},
    "continual_backprop": {"replacement_rate": 0.1, "maturity": 1},
    "fast": {"head": "kaiming_fan_in", "warmup": True},
}
ELSEWHERE = {"normal", "llf", "seal"}  # in test_step.py


@pytest.mark.parametrize("name", [name for name in methods.NAMES if name not in ELSEWHERE])
def test_seeds_together_equal_seeds_on_devices_of_their_own(name):
    """Two in one batched program, and eight that each have a device and its single program."""

    def config(seeds, **run):
        train = {"generations": 2, "epochs_per_generation": 1, "seeds": seeds}
        train |= {"batch_size": 30, "pretrained": "given" if name == "pof" else ""}
        return mlp(
            {"name": name, **OPTIONS.get(name, {})}, train=train, run={"steps_per_call": 3} | run
        )

    two = Trainer(STRIPES, config(2, seed_batching="vmap"))
    eight = Trainer(STRIPES, config(8), devices=8)
    assert eight.experiment.mesh.shape == {"seed": 8, "data": 1}
    start, before = host(eight), jax.tree.map(lambda leaf: leaf.sharding, eight.state)
    two.run(1)
    eight.run(1)
    # Three steps lie close together; later ones need not, where a method chooses by thresholds.
    first = jax.tree.map(lambda leaf: np.array(leaf[:2]), eight.state.weights)
    assert_same(two.state.weights, first, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(two.losses[0], eight.losses[0][:2], rtol=1e-4)
    for seed in range(1, 8):
        assert np.abs(eight.losses[0][0] - eight.losses[0][seed]).max() > 1e-3
    eight.event().calls(1)
    after = jax.tree.map(lambda leaf: leaf.sharding, eight.state)
    same = jax.tree.map(
        lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), before, after, eight.state
    )
    assert all(jax.tree.leaves(same))
    assert jax.tree.map(np.shape, host(eight)) == jax.tree.map(np.shape, start)
    programs = eight.experiment
    for program in (programs.init, programs.start_generation, programs.train):
        assert program._cache_size() == 1
    assert int(eight.state.step[0]) == eight.experiment.total_steps == 6
