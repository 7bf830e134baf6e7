"""Eigenvalues of each batch's Hessian against dense ones (Table 6 of the SEAL paper)."""

import jax
import numpy as np
import pytest
from hessian_oracles import loss

from seal_jax import UsageError, hessian


@pytest.fixture(scope="module")
def exact(dense_batches):
    """Each batch's eigenvalues, falling in magnitude."""
    values = np.linalg.eigvalsh(dense_batches)
    return np.take_along_axis(values, np.argsort(-abs(values), axis=1), axis=1)


def test_values_equal_those_of_the_dense_hessians(problem, exact):
    params, data = problem
    result = hessian.batch_eigenvalues(loss, params, data, 5, tolerance=1e-4)
    assert result.converged.all()
    np.testing.assert_allclose(result.values, exact[:, :5], rtol=1e-4)
    assert result.max == pytest.approx(exact[:, :5].max(), rel=1e-4)
    assert result.negative_share == (exact[:, :5] < 0).mean() > 0
    assert result.certain_share == 1


def test_the_l2_term_shifts_every_value_before_the_choice_by_magnitude(problem, dense_batches):
    params, data = problem
    result = hessian.batch_eigenvalues(loss, params, data, 5, weight_decay=0.5, tolerance=1e-4)
    values = np.linalg.eigvalsh(dense_batches + 0.5 * np.eye(dense_batches.shape[1]))
    expected = np.take_along_axis(values, np.argsort(-abs(values), axis=1)[:, :5], axis=1)
    np.testing.assert_allclose(result.values, expected, rtol=1e-4)


def test_bounds_hold_where_the_iteration_is_too_short(problem, exact):
    params, data = problem
    result = hessian.batch_eigenvalues(loss, params, data, 3, steps=6, tolerance=1e-4)
    assert not result.converged.any()
    distance = abs(result.values[:, :, None] - exact[:, None, :]).min(-1)
    assert (distance <= result.residuals).all()
    assert result.certain_share < 1 or (abs(result.values) > result.residuals).all()


def test_devices_share_the_batches(problem):
    params, data = problem
    host = jax.tree.map(np.asarray, data)
    one = hessian.batch_eigenvalues(loss, params, host, 2)
    two = hessian.batch_eigenvalues(loss, params, host, 2, devices=jax.devices()[:2])
    np.testing.assert_allclose(two.values, one.values, rtol=1e-5)
    np.testing.assert_array_equal(two.converged, one.converged)


def test_a_program_serves_all_networks(problem):
    from seal_jax.hessian import per_batch

    params, data = problem
    before = per_batch._in_turn._cache_size()
    for factor in (0.5, 1.5):
        other = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        hessian.batch_eigenvalues(loss, other, data, 4, steps=21)
    assert per_batch._in_turn._cache_size() == before + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0 must be a whole number in 1..88"),
        ({"steps": 4}, "steps = 4 must be a whole number of at least 6 for k = 5"),
        ({"mask": "three"}, "matches no parameter path"),
    ],
)
def test_bad_arguments(problem, options, message):
    params, data = problem
    with pytest.raises(UsageError, match=message):
        hessian.batch_eigenvalues(loss, params, data, **options)


def test_without_batches(problem):
    with pytest.raises(UsageError, match="data must have batches"):
        hessian.batch_eigenvalues(loss, problem[0], None)


def test_a_broken_model(problem):
    params, data = problem
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(UsageError, match="hold NaN or infinity"):
        hessian.batch_eigenvalues(loss, broken, data, 2, steps=6)
