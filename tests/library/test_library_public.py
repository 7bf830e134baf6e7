"""What the package shows: names, docstrings, light imports, arguments that are refused."""

import inspect
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import seal_jax

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
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    return {name: getattr(module, name) for name in names}


def test_everything_public_is_described():
    assert set(seal_jax.__all__) >= {"make_seal_tx", "make_llf_tx", "make_normal_tx", "ascend"}
    seen = 0
    queue = list(public(seal_jax).items())
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
