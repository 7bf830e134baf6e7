"""Data and bases larger than the device memory they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hessian_oracles import loss, of_matrix, ravel, rotated, vector_of

from seal_jax import UsageError, hessian
from seal_jax.hessian import krylov
from seal_jax.hessian.lanczos import choose_basis_size


def on_device():
    """Bytes of all arrays in device memory."""
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == "device")


class Watched:
    """Data on the host that notes, whenever a part of it is read, what is on the device."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.held = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.held.append(on_device())
        return self.array[rows]


@pytest.fixture(scope="module")
def large():
    """24 batches, the last ones of less weight."""
    random = np.random.default_rng(3)
    images = random.normal(size=(24, 16, 6)).astype(np.float32)
    labels = random.integers(0, 4, (24, 16)).astype(np.int32)
    return (images, labels), np.where(np.arange(24) < 20, 16, 3).astype(np.float32)


BATCH = 16 * 6 * 4 + 16 * 4 + 4


def test_streamed_products_are_those_of_data_on_the_device(problem, large):
    params, (data, weights) = problem[0], large
    # Five batches a chunk, so that the last of five chunks has but four.
    options = {"weights": weights, "weight_decay": 0.1, "mask": "one"}
    streamed = hessian.streamed(loss, params, data, byte_budget=10 * BATCH, **options)
    assert streamed.chunk == 5
    whole = hessian.operator(loss, params, data, **options)
    vector = jax.tree.map(jnp.cos, whole.like)
    expected = ravel(krylov.product(whole, vector))
    np.testing.assert_allclose(ravel(streamed(vector)), expected, atol=2e-6)


def test_data_several_times_the_budget_never_lies_on_the_device(problem, large):
    params, ((images, labels), weights) = problem[0], large
    budget, k, m = 6 * BATCH, 3, 12
    assert len(weights) * BATCH >= 4 * budget
    watched = Watched(images)
    op = hessian.streamed(loss, params, (watched, labels), byte_budget=budget, weights=weights)
    before = on_device()
    result = hessian.eigenpairs(op, k, tolerance=1e-5, basis_size=m)
    whole = hessian.operator(loss, params, (images, labels), weights=weights)
    expected = hessian.eigenpairs(whole, k, tolerance=1e-5, basis_size=m)
    np.testing.assert_allclose(result.values, expected.values, rtol=1e-5)
    assert result.products == expected.products
    assert len(watched.held) == 8 * result.products
    # The chunk that was being read is not there yet: half of the budget at most beside the basis.
    basis = krylov.device_bytes(op.like, m, k)
    assert max(watched.held) - before <= budget / 2 + basis
    # That the measurement sees the data at all: one chunk is nearly half of the budget.
    assert max(watched.held) - min(watched.held) >= budget / 2 - BATCH


def least_squares(x, batch):
    return jnp.mean((batch @ x) ** 2) / 2


@pytest.fixture(scope="module")
def regression():
    """A streamed operator and its matrix, 6 by 6."""
    rows = np.random.default_rng(5).normal(size=(9, 4, 6)).astype(np.float32)
    op = hessian.streamed(least_squares, jnp.zeros(6), rows, byte_budget=4 * (4 * 6 * 4 + 4))
    assert op.chunk == 2
    flat = rows.reshape(-1, 6).astype(np.float64)
    return op, flat.T @ flat / len(flat)


def test_everything_takes_a_streamed_operator(regression):
    op, matrix = regression
    exact = np.linalg.eigvalsh(matrix)
    nodes = hessian.density(op, probes=2, steps=6).nodes
    np.testing.assert_allclose(nodes, [exact, exact], rtol=1e-4)
    # A basis of all six vectors leaves nothing to chance.
    assert hessian.trace(op, probes=36, method="hutch++").value == pytest.approx(exact.sum())
    result = hessian.trace(op, probes=30)
    assert abs(result.value - exact.sum()) < 4 * result.error
    slow = hessian.power_iteration(op, 2, tolerance=1e-3)
    np.testing.assert_allclose(slow.values, exact[:-3:-1], rtol=1e-3)
    fast = hessian.eigenpairs(op, 3, basis="host", basis_size=5, tolerance=1e-5)
    np.testing.assert_allclose(fast.values, exact[:-4:-1], rtol=1e-4)


VALUES = np.array([9, -7, 6, 5, *np.linspace(-1, 3, 56)])


@pytest.mark.parametrize("basis", ["bfloat16", "host", "device"])
def test_every_basis_finds_the_same_with_true_bounds(basis):
    matrix = rotated(VALUES)
    tolerance, close = (1e-2, 1e-3) if basis == "bfloat16" else (1e-5, 1e-5)
    op = of_matrix(matrix)
    result = hessian.eigenpairs(op, 4, "LM", tolerance=tolerance, basis_size=12, basis=basis)
    np.testing.assert_allclose(result.values, [9, -7, 6, 5], rtol=close)
    assert result.converged
    assert result.products > 12  # there were restarts
    for index, (value, bound) in enumerate(zip(result.values, result.residuals, strict=True)):
        vector = vector_of(result, index)
        error = np.linalg.norm(matrix @ vector - value * vector)
        assert error <= bound
        if basis == "bfloat16":  # measured, not estimated
            assert error > 0.9 * bound - 1e-4


def test_bfloat16_does_not_claim_what_rounding_forbids():
    matrix = rotated(VALUES)
    result = hessian.eigenpairs(
        of_matrix(matrix), 3, tolerance=1e-6, basis_size=12, basis="bfloat16"
    )
    assert not result.converged
    assert result.residuals.max() > 1e-5 * result.values[0]
    vector = vector_of(result, 0)
    assert np.linalg.norm(matrix @ vector - result.values[0] * vector) <= result.residuals[0]


@pytest.mark.parametrize(
    ("size", "k"), [(6, 1), (40, 3), pytest.param(300, 3, marks=pytest.mark.slow)]
)
def test_bfloat16_is_judged_by_products(size, k):
    """Rank 1: rounding takes the Ritz vectors apart with every restart."""
    direction = np.random.default_rng(0).normal(size=size)
    direction /= np.linalg.norm(direction)
    matrix = 7 * np.outer(direction, direction)
    result = hessian.eigenpairs(of_matrix(matrix), k, "LM", basis="bfloat16")
    for index, (value, bound) in enumerate(zip(result.values, result.residuals, strict=True)):
        vector = vector_of(result, index)
        assert np.linalg.norm(matrix @ vector - value * vector) <= bound
    assert result.converged == (result.residuals <= 1e-3 * abs(result.values[0])).all()
    np.testing.assert_allclose(result.values[0], 7, rtol=1e-3)


def wide(params, batch):
    return jnp.mean(jnp.tanh(jnp.tanh(batch @ params["a"]) @ params["b"]) ** 2)


@pytest.mark.parametrize("basis", ["device", "bfloat16"])
def test_the_basis_keeps_to_its_budget(basis):
    """By what the compiler says that its programs need, for a vector of 192 KiB."""
    random = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(random.normal(size=(64, 256)), jnp.float32),
        "b": jnp.asarray(random.normal(size=(256, 128)), jnp.float32),
    }
    op = hessian.operator(wide, params, jnp.ones((1, 4, 64)))
    vector, k = 4 * op.size, 5
    budget = 40 * vector
    m = choose_basis_size(op.like, k, None, budget, basis)
    assert m >= {"device": 20, "bfloat16": 40}[basis]
    assert krylov.device_bytes(op.like, m + 1, k, basis) > budget
    rows = krylov.Iteration(op, jax.random.key(0), m, basis == "bfloat16").basis
    memory = krylov._append.lower(rows, 0, op.like, 0.0).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
    # The product, which is the argument, and the vector that was multiplied.
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes + 2 * vector <= budget
    # A restart: the whole basis and one leaf of it anew.
    rotation = jnp.zeros((m + 1, m + 1))
    for name, leaf in rows.items():
        memory = krylov._rotate.lower(leaf, rotation, params[name]).compile().memory_analysis()
        new = memory.output_size_in_bytes + memory.temp_size_in_bytes
        assert sum(leaf.nbytes for leaf in rows.values()) + new <= budget


def test_host_basis_holds_few_vectors_on_the_device():
    op = of_matrix(rotated(np.linspace(-1, 3, 200)))
    before, held = on_device(), []
    hessian.eigenpairs(
        Noted(op, held), 2, basis="host", basis_size=40, max_products=50, tolerance=1e-12
    )
    assert len(held) >= 40
    assert max(held) - before <= krylov.device_bytes(op.like, 40, 2, "host")
    # That it would have been seen: the basis alone is more.
    assert 40 * op.size * 4 > 2 * krylov.device_bytes(op.like, 40, 2, "host")


class Noted:
    """An operator called from Python that notes what is on the device with every product."""

    eager = True

    def __init__(self, op, held):
        self.op, self.like, self.held = op, op.like, held

    def __call__(self, vector):
        self.held.append(on_device())
        return krylov.product(self.op, vector)


@pytest.mark.parametrize(
    ("basis", "mend"),
    [("device", 'lower k or basis = "bfloat16" or "host"'), ("host", "raise it, lower k$")],
)
def test_budgets_that_are_too_small(problem, large, basis, mend):
    op = hessian.operator(loss, *problem)
    with pytest.raises(UsageError, match=f"byte_budget = 100 must be at least .*{mend}"):
        hessian.eigenpairs(op, 2, byte_budget=100, basis=basis)
    data, _ = large
    with pytest.raises(UsageError, match=f"byte_budget = 9 must be at least {2 * BATCH}: two"):
        hessian.streamed(loss, problem[0], data, byte_budget=9)
