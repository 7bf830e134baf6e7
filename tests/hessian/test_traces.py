"""Estimates of the trace against dense matrices and exact cases."""

import jax
import numpy as np
import pytest
from hessian_oracles import diagonal, loss, of_matrix, rotated

from seal_jax import UsageError, hessian


def test_trace_of_a_network(problem, dense):
    result = hessian.trace(hessian.operator(loss, *problem), probes=100)
    assert abs(result.value - np.trace(dense)) < 4 * result.error
    assert result.error < 0.3 * abs(np.trace(dense))


def test_hutch_is_exact_up_to_its_rank():
    """Rank 4 with 12 products; Hutchinson's estimate of the same matrix errs with any number."""
    matrix = rotated(np.array([10, -5, 3, 1] + [0] * 36))
    op = of_matrix(matrix)
    exact = 9.0
    result = hessian.trace(op, probes=12, method="hutch++")
    assert result.value == pytest.approx(exact, rel=1e-4)
    assert result.error < 1e-4 * abs(exact)
    assert hessian.trace(op, probes=12).error > 0.02 * abs(exact)


def test_hutch_errs_less_where_few_eigenvalues_rule():
    """Of one spectrum, 1 / i^2, over many keys, at the same number of products."""
    values = 1 / np.arange(1, 41) ** 2
    op = of_matrix(rotated(values))
    errors = {
        method: [
            hessian.trace(op, probes=30, method=method, key=jax.random.key(seed)).value
            - values.sum()
            for seed in range(12)
        ]
        for method in ("hutchinson", "hutch++")
    }
    spread = {
        method: np.sqrt(np.mean(np.square(differences))) for method, differences in errors.items()
    }
    assert spread["hutch++"] < 0.2 * spread["hutchinson"]
    # Unbiased: the mean over keys is within its own error.
    assert abs(np.mean(errors["hutch++"])) < 4 * spread["hutch++"] / np.sqrt(12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 1}, "probes = 1 must be a whole number of at least 2"),
        ({"probes": 5, "method": "hutch++"}, "probes = 5 must be a whole number of at least 6"),
        ({"method": "xtrace"}, r"method = 'xtrace' must be one of hutchinson, hutch\+\+"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        hessian.trace(diagonal([1.0, 2.0]), **options)
