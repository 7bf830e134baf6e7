"""The hidden units that a network declares: what makes them and what reads them, by what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, draw_variables, make_family
from flax import linen as nn

from seal_jax import UsageError, models, units

# With BatchNorm a channel's normalisation in inference mode is its own.
# Those that declare their units in the same way as another one are left to the slow tests.
SLOW = ("vgg", "wide_resnet", "densenet")
CASES = [
    pytest.param(
        family,
        {} if family in ("mlp", "vit") else {"norm": "batch"},
        marks=[pytest.mark.slow] * (family in SLOW),
        id=family,
    )
    for family in FAMILIES
]
GROUPED = {"norm": "batch", "block": "bottleneck", "groups": 2, "width_per_group": 2}


@pytest.mark.parametrize(
    ("family", "fields"), [*CASES, pytest.param("resnet", GROUPED, id="grouped")]
)
def test_nothing_sees_new_units_and_nothing_else_makes_them(family, fields):
    model, variables, images = make_family(family, **fields)
    # Vectors of no negative numbers, so that hardly any unit is dead.
    params = jax.tree.map(
        lambda leaf: np.abs(leaf) if leaf.ndim == 1 else leaf, variables["params"]
    )
    sizes = units.sizes(model.units, params)
    chosen = {name: np.arange(count) % 3 == 1 for name, count in sizes.items()}

    # One program for everything: compiling takes the time.
    @jax.jit
    def run(params, fresh, other):
        def outputs(params):
            given = {**variables, "params": params}
            return model.hidden(given, images), model.features(given, images)["logits"]

        new, new_of_other = (units.replace(params, f, chosen, model.units) for f in (fresh, other))
        incoming, _ = units.selections(chosen, model.units, params)
        seen = jax.tree.map(jnp.where, incoming, fresh, params)
        readers = {}
        for name, count in sizes.items():  # the last unit of each layer
            last = {other: jnp.zeros(size, bool) for other, size in sizes.items()}
            last[name] = last[name].at[count - 1].set(True)
            readers[name] = units.selections(last, model.units, params)[1]
        sums = units.outgoing_magnitudes(model.units, params)
        return outputs(new), outputs(new_of_other), outputs(seen), readers, sums

    fresh, other = (draw_variables(jax.eval_shape(lambda: params), seed) for seed in (5, 6))
    (hidden, logits), (hidden_of_other, logits_of_other), seen, readers, sums = run(
        params, fresh, other
    )
    np.testing.assert_allclose(logits, logits_of_other, rtol=1e-4, atol=1e-5)
    for name, flags in chosen.items():
        a, b = (np.asarray(found[name]) for found in (hidden, hidden_of_other))
        assert a.shape[-1] == len(flags)
        np.testing.assert_allclose(a[..., ~flags], b[..., ~flags], rtol=1e-4, atol=1e-5)
        # The weights that were found to read a unit are those whose sum says how much it matters.
        parts = jax.tree.map(lambda flags, leaf: np.abs(leaf * flags).sum(), readers[name], params)
        total = sum(jax.tree.leaves(parts))
        assert total > 0
        np.testing.assert_allclose(sums[name][-1], total, rtol=1e-5)
    # Where the readers are not set to zero, new units show.
    assert np.abs(seen[1] - logits).max() > 1e-3


def test_hidden_units_are_those_after_the_nonlinearity(tiny_of):
    model, variables, images = tiny_of("mlp")
    found = model.hidden(variables, images)
    layer = variables["params"]["dense1"]["linear"]
    expected = np.maximum(images.reshape(4, -1) @ layer["kernel"] + layer["bias"], 0)
    np.testing.assert_allclose(found["dense1/output"], expected, rtol=1e-5, atol=1e-5)
    weights = np.array([0.5, 0.25, 0.0, 0.25], np.float32)
    np.testing.assert_allclose(
        units.mean_magnitude(found["dense1/output"], weights), weights @ expected, rtol=1e-5
    )


class Bare(nn.Module):
    """A user's own module that declares units which it does not sow."""

    blocks = ("hidden", "fc")
    layers = blocks
    head = "fc"
    units = (units.Units("activations", ("hidden",), ("fc",)),)
    num_classes: int = 3
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(4, name="hidden")(x.reshape(len(x), -1)))
        self.sow("intermediates", "features", x)
        return nn.Dense(self.num_classes, name="fc")(x)


def test_units_that_are_not_sown():
    model = models.from_module(Bare(), name="bare", image_shape=(2, 2, 1))
    images = jnp.ones((1, 2, 2, 1))
    with pytest.raises(UsageError, match="must sow 'activations' into 'intermediates'"):
        model.hidden(model.init(jax.random.key(0)), images)


PARAMS = {
    "a": {"kernel": jnp.ones((2, 6)), "bias": jnp.ones(6)},
    "b": {"kernel": jnp.ones((6, 2))},
    "c": {"kernel": jnp.ones((4, 2))},
}


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([("h", ("d",), ("b",))], "incoming names 'd', which is no such layer"),
        ([("h", ("a",), ("a/bias",))], "outgoing names 'a/bias', which is no such layer"),
        ([("h", ("a", "b"), ("b",))], "'b/kernel' of shape (6, 2) does not make 6 units"),
        ([("h", ("a",), ("c",))], "'c/kernel' of shape (4, 2) does not read 6 units"),
        ([("h", ("b",), ("a",)), ("g", ("c",), ("a",))], "both name 'a/kernel' as outgoing"),
    ],
)
def test_units_that_do_not_fit(layers, says):
    with pytest.raises(UsageError) as caught:
        units.sizes([units.Units(*layer) for layer in layers], PARAMS)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
