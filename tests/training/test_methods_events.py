"""What a generation's start draws anew, as the compiled event does it; and IMP's pruning."""

import jax
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import STRIPES, Trainer, assert_same, batch, differ, host, mlp, seed_of

from seal_jax import paths
from seal_jax.core.state import Stream, stream_key
from seal_jax.errors import UsageError


def named(tree):
    return dict(paths.named_leaves(tree))


def events(method, generations=(1, 2), seeds=1, **sections):
    """Return the trainer and, for each event, the weights before and after and the fresh draw."""
    sections["train"] = {"seeds": seeds} | sections.pop("train", {})
    trainer = Trainer(STRIPES, mlp(method, **sections))
    start = host(trainer)
    # As if trained: nothing is as it was drawn. The event counts by the step alone.
    trained = jax.tree.map(lambda leaf: 1.5 * leaf + np.float32(0.25), start.weights)
    momentum = jax.tree.map(
        lambda leaf: leaf + 1 if leaf.dtype == np.float32 else leaf, start.opt_state
    )
    draw = jax.jit(trainer.experiment.model.init)
    per_generation = trainer.experiment.clock.steps_per_generation
    seen = []
    for generation in generations:
        step = np.full_like(start.step, generation * per_generation)
        trainer.put(start._replace(step=step, weights=trained, opt_state=momentum)).event()
        fresh = [
            draw(stream_key(seed, Stream.EVENT, generation))["params"] for seed in range(seeds)
        ]
        seen.append((trained, host(trainer), fresh))
    return trainer, seen


def replaced(before, after, fresh, seed=0, rounding=0.0):
    """Return by name where weights changed; they must then be the fresh draw's."""
    old, new = (named(seed_of(weights.params, seed)) for weights in (before, after))
    chosen = {}
    for name, drawn in named(fresh).items():
        chosen[name] = new[name] != old[name]
        expected = np.where(chosen[name], drawn, old[name])
        np.testing.assert_allclose(new[name], expected, rtol=rounding)
    assert_same(after.batch_stats, before.batch_stats)
    return chosen


VECTORS = {"dense1/norm/bias", "dense1/norm/scale", "dense2/norm/bias", "dense2/norm/scale"}


@pytest.mark.parametrize(
    ("redraw", "exact"),
    [(False, True), (True, True), pytest.param(True, False, marks=pytest.mark.slow)],
)
def test_wels_draws_the_same_weights_in_all_generations_and_welsr_others(redraw, exact, rounding):
    method = {"name": "wels", "fraction": 0.3, "redraw": redraw, "exact": exact}
    _, seen = events(method, seeds=2, norm="batch")
    masks = {}
    for generation, (before, after, fresh) in enumerate(seen):
        for seed in range(2):
            chosen = replaced(before, after.weights, fresh[seed], seed, rounding)
            for name, mask in chosen.items():
                if name in VECTORS or name == "fc/bias":
                    assert not mask.any()
                elif exact:
                    assert mask.sum() == round(0.3 * mask.size)
                else:  # within four standard deviations
                    assert abs(mask.mean() - 0.3) < 4 * np.sqrt(0.21 / mask.size)
                masks[generation, seed, name] = mask
            assert_same(after.opt_state, seen[0][1].opt_state)  # its turn is the next step
    for name in ("dense1/linear/kernel", "dense2/linear/kernel", "fc/kernel"):
        for seed in range(2):
            same = (masks[0, seed, name] == masks[1, seed, name]).all()
            assert same != redraw
        assert (masks[0, 0, name] != masks[0, 1, name]).any()
    assert differ(seen[0][2][0], seen[1][2][0])


def test_kels_keeps_the_first_channels():
    _, seen = events({"name": "kels", "keep": 0.3}, norm="batch")
    wanted = {"dense1/linear/kernel": (64, 10), "dense2/linear/kernel": (10, 10)}
    wanted |= {"fc/kernel": (10, 4), "fc/bias": (4,)} | dict.fromkeys(VECTORS, (10,))
    for before, after, fresh in seen:
        for name, mask in replaced(before, after.weights, fresh[0]).items():
            expected = np.ones(mask.shape, bool)
            expected[tuple(slice(kept) for kept in wanted[name])] = False  # ceil(0.3 * 32) = 10
            np.testing.assert_array_equal(mask, expected, err_msg=name)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_dsd_draws_the_smallest_anew(scope):
    _, seen = events({"name": "dsd", "fraction": 0.25, "scope": scope}, (2,))
    before, after, fresh = seen[0]
    chosen = replaced(before, after.weights, fresh[0])
    sizes = {
        name: np.abs(leaf) for name, leaf in named(seed_of(before.params)).items() if leaf.ndim == 2
    }
    together = np.concatenate([leaf.ravel() for leaf in sizes.values()])
    for name, mask in chosen.items():
        if name not in sizes:
            assert not mask.any()
            continue
        among = together if scope == "global" else sizes[name].ravel()
        edge = np.sort(among)[round(0.25 * among.size) - 1]
        np.testing.assert_array_equal(mask, sizes[name] <= edge)


@pytest.mark.parametrize(("threshold", "kept"), [(None, "dense"), ("dense2", "dense1")])
def test_fc_draws_the_last_layers_anew(threshold, kept):
    _, seen = events({"name": "fc", "threshold": threshold}, (1,), norm="batch")
    before, after, fresh = seen[0]
    for name, mask in replaced(before, after.weights, fresh[0]).items():
        assert mask.all() != name.startswith(kept)
        assert mask.all() == mask.any()


def test_the_first_step_after_an_event_has_no_momentum():
    config = mlp({"name": "wels"}, train={"epochs_per_generation": 1})
    trainer = Trainer(STRIPES, config).run(1).event()
    params = oracle.wide(seed_of(host(trainer).weights.params))
    trace = [leaf for leaf in jax.tree.leaves(host(trainer).opt_state) if leaf.ndim > 1]
    assert max(np.abs(leaf).max() for leaf in trace) > 0.01
    _, gradient = oracle.loss_and_gradient(params, *batch(5, config))
    expected = oracle.add(params, -0.05, oracle.add(gradient, 5e-4, params))
    trainer.state, _ = trainer.experiment.train(trainer.state, trainer.splits["train"])
    assert_same(seed_of(trainer.state.weights.params), expected, rtol=1e-4, atol=1e-6)


def test_imp_prunes_rewinds_and_holds():
    """Zeros stay exact under momentum and decay; the others start from the step asked for."""
    config = mlp(
        {"name": "imp", "fraction": 0.2, "rewind_step": 2},
        train={"epochs_per_generation": 1, "generations": 4},
        optimizer={"weight_decay": 0.01},
    )
    trainer = Trainer(STRIPES, config).calls(2)
    rewind = host(trainer).weights.params
    trainer.calls(3)
    alive = {name: np.ones(leaf.shape, bool) for name, leaf in named(rewind).items()}
    kernels = [name for name, leaf in named(rewind).items() if leaf.ndim == 3]
    total = count = sum(alive[name].sum() for name in kernels)
    for generation in (1, 2, 3):
        trained = named(host(trainer).weights.params)
        trainer.event()
        # The smallest fifth of what is left, of all kernels together.
        sizes = {name: np.where(alive[name], np.abs(trained[name]), np.inf) for name in kernels}
        order = np.sort(np.concatenate([sizes[name].ravel() for name in kernels]))
        pruned = int(np.floor(0.2 * count + 0.5))
        count -= pruned
        for name in kernels:
            alive[name] &= sizes[name] > order[pruned - 1]
        start = named(host(trainer).weights.params)
        for name, leaf in named(rewind).items():
            np.testing.assert_array_equal(start[name], np.where(alive[name], leaf, 0))
        assert sum(alive[name].sum() for name in kernels) == count
        np.testing.assert_allclose(count / total, 0.8**generation, atol=1e-3)
        for _ in range(5):
            # Not by calls(), which would repeat the event.
            trainer.state, _ = trainer.experiment.train(trainer.state, trainer.splits["train"])
            now = named(host(trainer).weights.params)
            for name in kernels:
                np.testing.assert_array_equal(now[name] == 0, ~alive[name])
        momentum = host(trainer).opt_state
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(momentum) if leaf.ndim == 3) > 0


LATER = ("dense2", "fc")


@pytest.mark.parametrize(
    ("policy", "reset", "zeroed"),
    [
        ("fresh", "phase", ("dense1", *LATER)),
        ("zero", "generation", LATER),
        ("keep", "phase", ()),
        ("fresh", "never", ()),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_llf_resets_the_memory_it_is_told_to(optimizer, policy, reset, zeroed):
    """With the count of Adam that belongs to it; never where ``reset_momentum`` says never."""
    method = {"name": "llf", "threshold": "dense2", "optimizer_state": policy}
    config = mlp(method, optimizer={"name": optimizer, "reset_momentum": reset})
    trainer = Trainer(STRIPES, config).calls(2)
    before = host(trainer)
    trainer.put(before._replace(step=np.full_like(before.step, 20))).event()
    old, new = named(before.opt_state), named(host(trainer).opt_state)
    for name, leaf in new.items():
        if name.endswith("kernel") and not paths.is_placeholder(leaf):
            layer = next(layer for layer in ("dense1", *LATER) if f"/{layer}/" in name)
            np.testing.assert_array_equal(leaf, 0 if layer in zeroed else old[name])
            assert old[name].any()
    counts = {name: int(leaf[0]) for name, leaf in new.items() if name.endswith("inner/count")}
    parts = {name: int(leaf[0]) for name, leaf in new.items() if "inner_state/count" in name}
    if optimizer == "sgd":
        assert not {**counts, **parts}
    elif policy == "zero":
        assert [parts[name] for name in sorted(parts)] == [0, 2]  # masked, rest
    else:
        assert list(counts.values()) == [0 if zeroed else 2]


def test_zapping_resamples_classes_after_the_first_step_of_an_epoch():
    """The features take that step as in plain training, the other classes too."""
    method, train = {"name": "zapping", "classes": 3}, {"seeds": 2}
    trainer = Trainer(STRIPES, mlp(method, train=train, run={"seed_batching": "vmap"}))
    plain = Trainer(STRIPES, mlp(train=train)).calls(6)
    trainer.calls(6)
    draw, chosen = jax.jit(trainer.experiment.model.init), []
    for seed in (0, 1):
        found, expected = (named(seed_of(t.state.weights.params, seed)) for t in (trainer, plain))
        key = jax.random.fold_in(stream_key(seed, Stream.UPDATE, 5), 5)
        fresh = named(draw(key)["params"])
        zapped = np.isclose(found["fc/kernel"], fresh["fc/kernel"], rtol=1e-5, atol=1e-7).all(0)
        assert zapped.sum() == 3
        for name, leaf in expected.items():
            if name.startswith("fc/"):
                leaf = np.where(zapped, fresh[name], leaf)
            np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-6)
        chosen.append((tuple(zapped), fresh["fc/kernel"]))
    assert differ(chosen[0][1], chosen[1][1])
    with pytest.raises(UsageError, match=r"method\.classes = 4 must be below the 4 classes"):
        Trainer.build(STRIPES, mlp({"name": "zapping", "classes": 4}))
