"""Hidden units in the trainer: the activations that methods are given, what they replace, what is logged."""

import dataclasses
import json

import numpy as np
import optax
import pytest
from numpy_mlp import forward, softmax, wide
from programs import STRIPES, Trainer, assert_same, batch, host, mlp, normalised, seed_of

from seal_jax.training import loop

REDO = {"name": "redo", "every": 2, "threshold": 0.6}


class Spied(Trainer):
    """A trainer whose optimizer's state also has the activations of the last step."""

    @staticmethod
    def build(dataset, config, devices=1):
        built = Trainer.build(dataset, config, devices)
        tx = built.method.tx

        def update(updates, state, params, *, activations, **extra_args):
            updates, inner = tx.update(
                updates, state[0], params, activations=activations, **extra_args
            )
            return updates, (inner, activations)

        def init(params):
            sizes = {"dense1/output": 32, "dense2/output": 32}
            return tx.init(params), {n: np.zeros(size, "f4") for n, size in sizes.items()}

        spied = optax.GradientTransformationExtraArgs(init, update)
        return dataclasses.replace(built, method=dataclasses.replace(built.method, tx=spied))


def config(method, **sections):
    train = {"generations": 1, "epochs_per_generation": 1, "drop_last": False}
    return mlp(method, train=train | sections.pop("train", {}), **sections)


# 90 images in batches of 16: the last of six has ten, and six that only fill it up.
WAYS = [
    (1, {}),
    (2, {"optimizer": {"accumulate": 2}}),
    (8, {"run": {"parameter_sharding": "all"}}),
]


def test_activations_are_means_over_the_batch_however_it_is_divided():
    ends = []
    for devices, sections in WAYS:
        trainer = Spied(STRIPES, config(REDO, **sections), devices=devices)
        before = wide(seed_of(host(trainer).weights.params))
        inputs, _ = forward(before, batch(0, trainer.experiment.settings)[0])
        found = seed_of(trainer.calls(1).state.opt_state[1])
        for name, values in zip(("dense1/output", "dense2/output"), inputs[1:], strict=True):
            np.testing.assert_allclose(found[name], np.abs(values).mean(0), rtol=1e-4, atol=1e-6)
        ends.append(host(trainer.calls(5)).weights)
    for other in ends[1:]:
        assert_same(ends[0], other, rtol=1e-3, atol=1e-5)


def test_replaced_units_are_those_of_the_models_own_initialisation():
    """With no gradient at all, a weight that moves is new or zero."""
    trainer = Trainer(
        STRIPES, config(REDO, optimizer={"learning_rate": 1e-12, "weight_decay": 0.0})
    )
    start = seed_of(host(trainer).weights.params)
    end = seed_of(host(trainer.calls(2)).weights.params)
    moved = np.abs(end["dense1"]["linear"]["kernel"] - start["dense1"]["linear"]["kernel"]) > 1e-6
    new = moved.all(0)  # units of which all weights are new
    assert 0 < new.sum() < 32
    np.testing.assert_array_equal(moved.any(0), new)
    kernel = end["dense2"]["linear"]["kernel"]
    below = np.abs(kernel[new]).max(0) == 0  # zero, unless the unit that reads is new as well
    fresh = np.abs(kernel - start["dense2"]["linear"]["kernel"]).min(0) > 1e-9
    assert (below ^ fresh).all()
    scale = np.sqrt(2 / 64)  # He-normal
    assert 0.7 * scale < end["dense1"]["linear"]["kernel"][:, new].std() < 1.3 * scale


def test_plasticity_is_logged(tmp_path):
    """The sample of 256 is all of the 90 images that there are."""
    run = {"log_plasticity": True, "steps_per_call": 0, "loggers": ""}
    settings = config({"name": "normal"}, train={"seeds": 2}, run=run)
    state = loop.train(settings, tmp_path, STRIPES, devices=2).state
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    first = Trainer(STRIPES, settings, devices=2)
    for seed in (0, 1):
        params = wide(seed_of(state.weights.params, seed))
        start = wide(seed_of(host(first).weights.params, seed))
        inputs, logits = forward(params, normalised(STRIPES.train.images))
        # Of the cross entropy by the classifier.
        slope = (softmax(logits) - np.eye(4)[STRIPES.train.labels]) / len(logits)
        gradient = np.concatenate([(inputs[-1].T @ slope).ravel(), slope.sum(0)])
        logged = row["plasticity/gradient/fc"][seed]
        assert logged == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
        for block, activations in zip(("dense1", "dense2"), inputs[1:], strict=True):
            means = activations.mean(0)
            share = (means <= 0.025 * means.mean()).mean()
            assert row[f"plasticity/dormant/{block}"][seed] == pytest.approx(share)
        for block, layer in params.items():
            layers = [tree.get("linear", tree) for tree in (layer, start[block])]
            after, before = (np.concatenate([tree[k].ravel() for k in tree]) for tree in layers)
            assert row[f"plasticity/norm/{block}"][seed] == pytest.approx(np.linalg.norm(after))
            distance = np.linalg.norm(after - before)
            assert row[f"plasticity/distance/{block}"][seed] == pytest.approx(distance, rel=1e-4)
