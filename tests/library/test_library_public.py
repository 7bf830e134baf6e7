"""What the package shows: names, docstrings, light imports, arguments that are refused."""

import inspect
import math
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seal_jax
from seal_jax import forgetting, hessian, schedules
from seal_jax.evaluation import few_shot, gradients, linear_probe, margins, prediction_depth

HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "matplotlib",
    "flax",
    "ml_collections",
    "sklearn",
    "PIL",
    "tqdm",
    "equinox",
)


def test_the_import_is_light():
    code = f"import sys, seal_jax; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def public(module):
    """Return what a module defines, or a package exports, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith(module.__name__)
    }


def test_everything_public_is_described():
    exported = re.findall(r" as (\w+)$", inspect.getsource(seal_jax), re.MULTILINE)
    names = {name: getattr(seal_jax, name) for name in exported}
    assert names.keys() >= {"make_seal_tx", "make_llf_tx", "make_normal_tx", "ascend"}
    seen = 0
    queue = list(names.items())
    while queue:
        name, value = queue.pop()
        if isinstance(value, types.ModuleType):
            assert value.__doc__, name
            queue += [(f"{name}.{inner}", own) for inner, own in public(value).items()]
        elif inspect.isfunction(value):
            assert value.__doc__, name
            seen += 1
        elif inspect.isclass(value):
            # A NamedTuple or dataclass without a docstring gets its signature for one.
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{value.__name__}("), name
            methods = inspect.getmembers(value, inspect.isfunction)
            for method, own in methods:
                if not method.startswith("_") and own.__qualname__.startswith(value.__name__):
                    assert own.__doc__, f"{name}.{method}"
            seen += 1
    assert seen > 25


PARAMS = {"conv": jnp.ones((2, 2)), "fc": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "0.1"}, "learning_rate = '0.1' must be positive, or a schedule"),
        ({"learning_rate": None}, "learning_rate = None must be positive, or a schedule"),
        ({"learning_rate": 0.0}, "learning_rate = 0 must be positive"),
        ({"learning_rate": math.nan}, "learning_rate = nan must be positive"),
        ({"momentum": 1.0}, r"momentum = 1 must lie in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum = -0.1 must lie in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay = -0.0001 must be"),
        ({"weight_decay": math.nan}, "weight_decay = nan must be"),
        (
            {"ascent_weight_decay_factor": 1.0},
            "ascent_weight_decay_factor = 1 must not be positive",
        ),
        ({"ascent_weight_decay_factor": math.nan}, "ascent_weight_decay_factor = nan must"),
        ({"ascent_scale": 0}, "ascent_scale = 0 must be positive"),
        ({"ascent_scale": -0.01}, "ascent_scale = -0.01 must be positive"),
        ({"ascent_epochs": 0}, "ascent_epochs = 0 leaves no ascent"),
        ({"ascent_epochs": 0.3}, "whole number of steps"),
        ({"ascent_epochs": 1.25}, "ascent_epochs = 1.25 is 2.5 steps of 2"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch = 2.5 must be a whole number"),
        ({"reset_momentum": "always"}, "'always' must be one of phase, generation, never"),
        ({"fit_in_ascent": "frozen"}, "'frozen' must be one of descend, freeze, reinit"),
        ({"fit_in_ascent": "reinit"}, "needs init_fn and key"),
        ({"optimizer": "adam"}, "'adam' must be an optax transformation"),
        ({"optimizer": optax.adam(1.0), "momentum": 0.5}, "momentum has no effect beside"),
        ({"optimizer": optax.adam(1.0), "learning_rate": 0.1}, "learning_rate has no effect"),
        ({"optimizer": optax.adam(1.0), "learning_rate": lambda t: 0.1}, "learning_rate has no"),
        ({"optimizer": optax.adam(1.0), "weight_decay": jnp.ones(2)}, "weight_decay has no effect"),
        (
            {"optimizer": optax.adam(1.0), "nesterov": True},
            "nesterov = True is not defined for SEAL",
        ),
        ({"nesterov": True}, "nesterov = True is not defined for SEAL; set it to False"),
        ({"mask": "cnv"}, "matches no parameter path; nearest: conv"),
        ({"mask": "re:.*"}, "selects every parameter"),
        ({"mask": {"stem": True, "head": False}}, "no entry for the parameter 'conv'"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    options = {"mask": "conv", "steps_per_epoch": 2, "epochs_per_generation": 4, **options}
    with pytest.raises(seal_jax.UsageError, match=message) as caught:
        seal_jax.make_seal_tx(**options).init(PARAMS)
    assert "\n" not in str(caught.value)


KEY = jax.random.key(0)
LABELS = np.arange(40) % 2
FEATURES = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
SPLIT = (FEATURES, LABELS)
HALF = 0.5


def hessian_of_three():
    return hessian.operator(lambda w: (w**4).sum(), jnp.arange(3.0))


def fresh(key):
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), PARAMS)


def update(updates):
    tx = seal_jax.make_seal_tx("fc", steps_per_epoch=1, epochs_per_generation=4)
    return tx.update(updates, tx.init(PARAMS), PARAMS)


def forget(policy):
    adam = optax.adam(0.1)
    return forgetting.forget_state(adam, optax.sgd(0.1).init(PARAMS), PARAMS, "fc", policy)


AT_THE_DOOR = {
    "key": [
        (lambda: forgetting.reinitialise(0, PARAMS, "fc", fresh), "key = 0 must be a random key"),
        (lambda: forgetting.reinitialise(0, PARAMS, "fc", "torch_default"), "key = 0 must be a"),
        (lambda: seal_jax.masked_reinit("fc", fresh, bool, key=0), "key = 0 must be a random key"),
        (lambda: seal_jax.transforms.wels(HALF, 3), "key = 3 must be a random key"),
        (lambda: seal_jax.heads.initialise(0, {"kernel": jnp.ones((2, 2))}), "key = 0 must be"),
        (lambda: seal_jax.heads.initialise(jnp.zeros(5, jnp.uint32), PARAMS), "must be a random key"),
        (lambda: hessian.trace(hessian_of_three(), key=0), "key = 0 must be a random key"),
        (lambda: hessian.eigenpairs(hessian_of_three(), 1, key="k"), "key = 'k' must be a random"),
    ],
    "argument": [
        (lambda: schedules.steps(0.1, "x", factor=0.5, steps_per_epoch=1), "decay_epochs = 'x' must be"),
        (lambda: schedules.steps(0.1, "1", factor=2, steps_per_epoch=1), "factor = 2 must lie in (0, 1)"),
        (lambda: forgetting.forget_state(optax.adam(0.1), None, PARAMS, "fc", "drop"),
         "policy = 'drop' must be one of"),
        (lambda: seal_jax.make_normal_tx(steps_per_epoch=1, optimizer=optax.sgd(1.0), nesterov=True),
         "nesterov has no effect beside optimizer="),
    ],
    "whole": [
        (lambda: hessian.eigenpairs(hessian_of_three(), 1.5), "k = 1.5 must be a whole number"),
        (lambda: hessian.power_iteration(hessian_of_three(), 1.5), "k = 1.5 must be a whole"),
        (lambda: hessian.trace(hessian_of_three(), probes=1.5), "probes = 1.5 must be a whole"),
        (lambda: hessian.density(hessian_of_three(), probes=1.5), "probes = 1.5 must be a whole"),
        (lambda: hessian.density(hessian_of_three(), steps=1.5), "steps = 1.5 must be a whole"),
        (lambda: prediction_depth.knn(*SPLIT, FEATURES, k=1.5), "k = 1.5 must "),
        (lambda: hessian.eigenpairs(hessian_of_three(), 1, max_products=0), "max_products = 0 must"),
        (lambda: hessian.eigenpairs(hessian_of_three(), 1, max_products=math.nan), "max_products ="),
        (lambda: hessian.power_iteration(hessian_of_three(), 1, max_products=0), "max_products = 0"),
    ],
    "clock": [
        (lambda: seal_jax.make_seal_tx("fc", steps_per_epoch=1, epochs_per_generation="3"),
         "epochs_per_generation = '3' must be a whole number of at least 1"),
        (lambda: seal_jax.make_seal_tx("fc", steps_per_epoch=1, epochs_per_generation=None),
         "epochs_per_generation = None must be a whole number"),
        (lambda: seal_jax.cosine("x", epochs=2, steps_per_epoch=1), "learning_rate = 'x' must be"),
        (lambda: seal_jax.cosine(0.1, epochs="2", steps_per_epoch=1), "epochs = '2' must be a whole"),
        (lambda: seal_jax.cosine(0.1, epochs=2, steps_per_epoch=0), "steps_per_epoch = 0 must be"),
        (lambda: seal_jax.cosine(0.1, epochs=2, steps_per_epoch=-1), "steps_per_epoch = -1 must be"),
    ],
    "data": [
        (lambda: few_shot.linear(FEATURES.tolist(), LABELS), "features is a list: it must be an arr"),
        (lambda: few_shot.linear(FEATURES, LABELS * 1.0), "labels is float64[40]: it must be an arr"),
        (lambda: few_shot.linear(*SPLIT, seed=-1), "seed = -1 must be a whole number in 0..4294967"),
        (lambda: few_shot.linear(*SPLIT, seed=0.5), "seed = 0.5 must be a whole number in"),
        (lambda: few_shot.Protocol(momentum=1), "momentum = 1 must lie in [0, 1)"),
        (lambda: linear_probe.fit(SPLIT, SPLIT, 2, seed=-1), "seed = -1 must be a whole number in"),
        (lambda: linear_probe.fit(SPLIT, (FEATURES[:, :2], LABELS), 2),
         "test features is float32[40, 2]: it must be an array [n, 3] of numbers"),
        (lambda: linear_probe.fit((FEATURES, LABELS / 1), SPLIT, 2), "train labels is float64[40]"),
        (lambda: linear_probe.fit((FEATURES.tolist(), LABELS), SPLIT, 2), "train features is a list"),
        (lambda: prediction_depth.knn(FEATURES.tolist(), LABELS, FEATURES), "features are a list"),
        (lambda: prediction_depth.knn(FEATURES, LABELS / 1, FEATURES), "bank_labels is float64[40]"),
        (lambda: prediction_depth.knn(*SPLIT, FEATURES[:, :2]), "differ in width"),
        (lambda: margins.margins(FEATURES.tolist(), LABELS), "logits is a list"),
        (lambda: margins.margins(FEATURES, LABELS / 1), "labels is float64[40]"),
        (lambda: gradients.mini_batches(9, 3, 2, seed=-1), "seed = -1 must be a whole number in"),
    ],
    "tree": [
        (lambda: update({"conv": jnp.ones((2, 2))}),
         "updates must be a tree like the parameters; they differ in fc"),
        (lambda: forget("fresh"), "opt_state must be a tree like tx.init(params); they differ in"),
        (lambda: forget("zero"), "opt_state must be a tree like tx.init(params); they differ in"),
        (lambda: forget("keep"), "opt_state must be a tree like tx.init(params); they differ in"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", AT_THE_DOOR)
def test_what_is_wrong_is_said_at_the_door(kind):
    for call, says in AT_THE_DOOR[kind]:
        with pytest.raises(seal_jax.UsageError, match=re.escape(says)) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "mask"),
    [
        ((jnp.ones(3), jnp.ones(2)), (True, False)),
        ([[jnp.ones(3)], [jnp.ones(2), jnp.ones(())]], "0"),
        ({"a": jnp.ones(()), "b": jnp.ones(())}, "a"),
        ({"a": jnp.ones(2), "b": None, "c": jnp.ones(2)}, "a"),
        ({"a": {"w": jnp.ones(2)}, "b": {}, "c": jnp.ones((0, 3))}, "a"),
    ],
)
def test_trees_of_every_shape(params, mask):
    """Ascent by +S * lr * g in the first step of generation 1, descent by -lr * g in the fit part."""
    tx = seal_jax.make_seal_tx(
        mask, 0.5, steps_per_epoch=1, epochs_per_generation=4, weight_decay=0.0, ascent_scale=0.5
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(5):
        updates, state = update(params, state, params)
    flags = jax.tree.leaves(seal_jax.masks.resolve(mask, params))
    for flag, leaf in zip(flags, jax.tree.leaves(updates), strict=True):
        assert jnp.all(leaf == (0.25 if flag else -0.5))
    assert update._cache_size() == 1
