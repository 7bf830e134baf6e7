"""LW's rounds as the compiled event does them, against NumPy."""

import dataclasses

import jax
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import SHAPE, STRIPES, Trainer, assert_same, host, mlp, normalised, seed_of

from seal_jax import methods
from seal_jax.core import mesh as meshes
from seal_jax.core.state import Stream, stream_key
from seal_jax.errors import UsageError
from seal_jax.training import experiment as experiments


def outputs(weights, images):
    """What both blocks give, each before its own normaliser and behind that of the block below."""
    x, found = images.reshape(len(images), -1), []
    for name in oracle.HIDDEN:
        layer = weights.params[name]["linear"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        found.append(x)
        inserted = weights.normalisers[name]
        x = (x - inserted["mean"]) * inserted["scale"]
    return found


def test_rounds_from_the_first_on():
    """Before each of the K N trainings: rescaled below, normalised at, drawn anew above block k."""
    train = {"generations": 4, "epochs_per_generation": 1}
    trainer = Trainer(STRIPES, mlp({"name": "lw", "rounds": 2}, train=train), devices=2)
    draw = jax.jit(trainer.experiment.model.init)
    initial = draw(stream_key(0, Stream.INIT, 0))["params"]
    identity = {"mean": 0.0, "scale": 1.0}
    before = None
    for generation in range(4):
        key = stream_key(0, Stream.EVENT, generation)
        if generation == 0:
            key = stream_key(0, Stream.START, 0)
            trained = seed_of(host(trainer).weights)._replace(params=initial)
        else:
            trained = seed_of(host(trainer).weights)
            trainer.event()
        now = seed_of(host(trainer).weights)
        block = generation // 2
        fresh = draw(key)["params"]
        for level, name in enumerate((*oracle.HIDDEN, "fc")):
            if level > block:
                assert_same(now.params[name], fresh[name])
                continue
            old, new = (weights.params[name]["linear"] for weights in (trained, now))
            size = np.linalg.norm(initial[name]["linear"]["kernel"])
            np.testing.assert_allclose(np.linalg.norm(new["kernel"]), size, rtol=1e-5)
            ratio = size / np.linalg.norm(old["kernel"])
            np.testing.assert_allclose(new["kernel"], ratio * old["kernel"], rtol=1e-5)
            np.testing.assert_array_equal(new["bias"], old["bias"])
            assert generation == 0 or abs(ratio - 1) > 1e-4
        rows = jax.random.choice(jax.random.fold_in(key, 1), 90, (16,), replace=False)
        images = normalised(STRIPES.train.images[np.asarray(rows)])
        own = now.normalisers[oracle.HIDDEN[block]]
        sample = (outputs(now, images)[block] - own["mean"]) * own["scale"]
        np.testing.assert_allclose([sample.mean(), sample.std()], [0, 1], atol=5e-5)
        assert own["mean"] != 0
        if block == 0:
            assert_same(now.normalisers["dense2"], identity)
        else:
            assert_same(now.normalisers["dense1"], before["dense1"])
        if before is not None:
            assert own["mean"] != before[oracle.HIDDEN[block]]["mean"]
        before = now.normalisers
        for _ in range(5):
            trainer.state, _ = trainer.experiment.train(trainer.state, trainer.splits["train"])
        assert_same(seed_of(trainer.state.weights.normalisers), before)  # they are never trained


def as_if_trained(options, norm=None, generation=1):
    """The weights before and after an event, at weights that are not as they were drawn."""
    trainer = Trainer(STRIPES, mlp({"name": "lw", **options}, norm, train={"generations": 2}))
    start = host(trainer)
    params = jax.tree.map(lambda leaf: 1.5 * leaf + np.float32(0.25), start.weights.params)
    weights = start.weights._replace(params=params)
    trainer.put(start._replace(step=start.step + 20 * generation, weights=weights)).event()
    return trainer, seed_of(weights), seed_of(host(trainer).weights)


@pytest.mark.parametrize("ablated", ["rescale", "normalise", "reinitialise"])
def test_each_step_of_a_round_can_be_left_out(ablated):
    trainer, old, new = as_if_trained({ablated: False})
    fresh = jax.jit(trainer.experiment.model.init)(stream_key(0, Stream.EVENT, 1))["params"]
    kernels = [weights.params["dense1"]["linear"]["kernel"] for weights in (old, new)]
    same = {
        "rescale": (kernels[0] == kernels[1]).all(),
        "normalise": not new.normalisers,
        "reinitialise": (new.params["fc"]["kernel"] == old.params["fc"]["kernel"]).all(),
    }
    assert same == {step: step == ablated for step in same}
    if ablated != "reinitialise":
        assert_same(new.params["fc"], fresh["fc"])


def test_sample_and_vectors_can_be_chosen():
    """Statistics over all images do not depend on a draw; vectors go back to their norm, too."""
    options = {"sample_size": 90, "rescale_vectors": True, "epsilon": 0.0}
    _, old, new = as_if_trained(options, norm="layer")
    x = normalised(STRIPES.train.images).reshape(90, -1)
    for name in oracle.HIDDEN:
        params, inserted = oracle.wide(new.params[name]), new.normalisers[name]
        np.testing.assert_allclose(np.linalg.norm(params["norm"]["scale"]), np.sqrt(32), rtol=1e-5)
        # A bias that starts at zero has no norm to go back to.
        assert_same(new.params[name]["norm"]["bias"], old.params[name]["norm"]["bias"])
        x = x @ params["linear"]["kernel"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = np.maximum(x * params["norm"]["scale"] + params["norm"]["bias"], 0)
        last, x = x, (x - inserted["mean"]) * inserted["scale"]
    # The event is that of block 2; block 1 keeps what it had.
    assert_same(new.normalisers["dense1"], old.normalisers["dense1"])
    np.testing.assert_allclose(inserted["mean"], last.mean(), rtol=1e-4)
    np.testing.assert_allclose(inserted["scale"], 1 / last.std(), rtol=1e-4)


def test_a_network_without_blocks_is_refused():
    config = mlp({"name": "lw"}, train={"generations": 2})
    experiment = experiments.build(config, SHAPE, meshes.make(config, jax.devices()[:1]))
    bare = dataclasses.replace(experiment.model, round_blocks=())
    context = dataclasses.replace(experiment.context, model=bare)
    with pytest.raises(UsageError, match=r"^model.name = 'mlp' declares no blocks[^\n]*$"):
        methods.build({"name": "lw"}, context)
