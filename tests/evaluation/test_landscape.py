"""Slices and loss increments against quadratics whose minima, Hessians and eigenvectors are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError, hessian
from seal_jax.evaluation import landscape
from seal_jax.evaluation.landscape import mean_loss, moved
from seal_jax.hessian.trees import select


def quadratic(weights, batch):
    """Half the squared distance to the batch's centre, in the metric of a fixed matrix."""
    centre, matrix = batch
    flat = jnp.concatenate([weights["low"].ravel(), weights["top"]["w"]]) - centre
    return 0.5 * flat @ matrix @ flat


@pytest.fixture(scope="module")
def problem():
    """Blocks with eigenvalues (27, 12, ...) and (9, 4, ...); the centres are off the weights."""
    random = np.random.default_rng(0)
    matrix, bases = np.zeros((7, 7)), []
    for start, size in ((0, 4), (4, 3)):
        basis = np.linalg.qr(random.normal(size=(size, size)))[0]
        values = np.array([9.0, 4.0, 1.0, 0.5])[:size] * (1 if start else 3)
        matrix[start : start + size, start : start + size] = basis * values @ basis.T
        bases.append(basis)
    weights = random.normal(size=7)
    centres = weights + 0.3 * random.normal(size=(2, 7))

    def data(centres):
        centres = jnp.asarray(centres, jnp.float32)
        return centres, jnp.broadcast_to(jnp.asarray(matrix, jnp.float32), (len(centres), 7, 7))

    params = {
        "low": jnp.asarray(weights[:4].reshape(2, 2), jnp.float32),
        "top": {"w": jnp.asarray(weights[4:], jnp.float32)},
    }
    return params, data, matrix, bases, weights, centres


def flat(vector):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(vector)])


@pytest.mark.parametrize(("mask", "block"), [("low", 0), ("top", 1)])
def test_increment_along_the_principal_eigenvector_of_a_block(problem, mask, block):
    """Along a unit eigenvector v of value c the minimum is at v'(centre - w), c/2 times its square."""
    params, data, _, bases, weights, centres = problem
    op = hessian.operator(quadratic, params, data(np.stack([weights] * 2)), mask=mask)
    pairs = hessian.eigenpairs(op, 1, tolerance=1e-6)
    value = (27.0, 9.0)[block]
    np.testing.assert_allclose(pairs.values, [value], rtol=1e-5)
    direction = jax.tree.map(lambda rows: rows[0], pairs.vectors)
    cosine = flat(direction) @ bases[block][:, 0]
    np.testing.assert_allclose(abs(cosine), 1, atol=1e-5)

    whole = np.zeros(7)
    whole[4 * block : 4 + 3 * block] = flat(direction)
    test = data(centres)
    distance = whole @ (centres.mean(0) - weights)
    result = landscape.increment(quadratic, params, direction, test)
    assert bool(result.bounded)
    np.testing.assert_allclose(float(result.shift), distance, rtol=1e-3)
    np.testing.assert_allclose(float(result.increment), value / 2 * distance**2, rtol=1e-3)
    np.testing.assert_allclose(
        float(result.loss), float(mean_loss(quadratic, params, test)), rtol=1e-6
    )
    np.testing.assert_allclose(
        float(landscape.curvature(quadratic, params, direction, test)), value, rtol=1e-5
    )
    turned = jax.tree.map(lambda leaf: np.sign(result.shift) * leaf, direction)
    again = landscape.increment(quadratic, params, turned, test, second_derivative=value)
    np.testing.assert_allclose(float(again.shift), abs(distance), rtol=1e-3)


def test_slices_are_the_losses_of_moved_weights(problem):
    params, data, matrix, _, weights, centres = problem
    direction = select("top", jax.tree.map(jnp.ones_like, params))
    distances = np.linspace(-2, 1, 7)
    expected = []
    for distance in distances:
        at = weights + distance * np.array([0, 0, 0, 0, 1, 1, 1])
        expected.append(np.mean([0.5 * (at - c) @ matrix @ (at - c) for c in centres]))
    result = landscape.slices(quadratic, params, direction, data(centres), distances)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    middle = moved(params, direction, 1.0)
    np.testing.assert_array_equal(middle["low"], params["low"])


def one_number(weights, batch):
    return jnp.mean(batch[0] * weights**3 - batch[1] * weights)


def test_the_nearest_minimum_counts_and_a_fall_without_end_is_told():
    """x^3 - 3 x has its minimum -2 at 1; left of -1 it falls for ever; at 1 nothing is gained."""
    batch = (jnp.ones((1, 1)), jnp.full((1, 1), 3.0))
    direction = jnp.float32(-1)

    def at(x):
        return landscape.increment(one_number, jnp.float32(x), direction, batch)

    near = at(0.5)
    np.testing.assert_allclose(float(near.shift), -0.5, rtol=1e-3)
    np.testing.assert_allclose(float(near.increment), 0.5**3 - 1.5 + 2, rtol=1e-4)
    beyond = at(1.5)
    np.testing.assert_allclose(float(beyond.shift), 0.5, rtol=1e-3)
    np.testing.assert_allclose(float(beyond.increment), 1.5**3 - 4.5 + 2, rtol=1e-4)
    endless = at(-1.5)
    assert not bool(endless.bounded)
    assert np.isnan([float(endless.shift), float(endless.increment)]).all()
    at_minimum = at(1.0)
    assert bool(at_minimum.bounded)
    assert (float(at_minimum.shift), float(at_minimum.increment), float(at_minimum.loss)) == (
        0,
        0,
        -2,
    )


def test_a_basin_that_ends_at_a_wall_and_a_known_second_derivative():
    """Beyond a wall the loss is not finite; the parabola of a known curvature is a first guess."""

    def walled(weights, batch):
        return jnp.where(weights > batch[0], jnp.nan, (weights - batch[1]) ** 2)

    def at(wall, centre, **options):
        batch = jnp.array([[wall, centre]], jnp.float32)
        return landscape.increment(walled, jnp.float32(0), jnp.float32(1), batch, **options)

    np.testing.assert_allclose(at(0.3, 0.02)[:2], (0.0004, 0.02), rtol=1e-3)
    for guess in (2.0, 1e-6, 1e9):  # the right one, and two that are far off
        np.testing.assert_allclose(at(0.3, 0.02, second_derivative=guess).shift, 0.02, rtol=1e-3)
    np.testing.assert_allclose(at(0.3, 7.0).shift, 0.3, rtol=1e-3)
    # Weights beyond the wall: their loss is NaN, at whatever slope, and has no minimum.
    assert not at(-1.0, 0.02).bounded


def test_masks_that_select_nothing_are_refused():
    with pytest.raises(UsageError, match="nothing"):
        select("nothing", {"low": jnp.ones(2), "top": jnp.ones(2)})
