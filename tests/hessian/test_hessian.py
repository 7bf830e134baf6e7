"""The Hessian module against dense Hessians, SciPy and exact identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hessian_oracles import (
    as_matrix,
    diagonal,
    loss,
    of_matrix,
    outer,
    outputs,
    ravel,
    rotated,
    unravel,
    vector_of,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seal_jax import UsageError, hessian
from seal_jax.hessian import krylov, trees
from seal_jax.hessian.spectrum import share_error


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_forward"])
def test_products_are_those_of_the_dense_hessian(problem, dense, mode):
    op = hessian.operator(loss, *problem, mode=mode)
    np.testing.assert_allclose(as_matrix(op), dense, atol=2e-6)


def test_gauss_newton_is_jacobian_times_outer_hessian_times_jacobian(problem):
    params, data = problem
    op = hessian.operator(outputs, params, data, mode="gauss_newton", outer=outer)
    expected = 0
    for b in range(3):
        batch = jax.tree.map(lambda x, b=b: x[b], data)
        z, jacobian = outputs(params, batch), jax.jacobian(outputs)(params, batch)
        curvature = np.asarray(jax.hessian(outer)(z, batch)).reshape(z.size, z.size)
        rows = np.concatenate(
            [np.asarray(leaf).reshape(z.size, -1) for leaf in jax.tree.leaves(jacobian)], axis=1
        )
        expected = expected + rows.T @ curvature @ rows / 3
    np.testing.assert_allclose(as_matrix(op), expected, atol=2e-6)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenpairs_equal_scipy_and_residuals_are_true_bounds(problem, dense, which):
    op = hessian.operator(loss, *problem)
    result = hessian.eigenpairs(op, 5, which, tolerance=1e-5, basis_size=12)
    product = jax.jit(lambda v: op(v))
    linear = scipy.sparse.linalg.LinearOperator(
        dense.shape, matvec=lambda x: ravel(product(unravel(x.ravel(), op.like)))
    )
    expected = scipy.sparse.linalg.eigsh(linear, 5, which=which, return_eigenvectors=False)
    sort = {"LA": -expected, "SA": expected, "LM": -abs(expected)}[which]
    np.testing.assert_allclose(result.values, expected[np.argsort(sort)], rtol=1e-4)
    if which == "SA":
        assert result.values[0] < 0
    assert result.converged
    exact = np.linalg.eigvalsh(dense)
    for index, (value, bound) in enumerate(zip(result.values, result.residuals, strict=True)):
        vector = vector_of(result, index)
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
        assert np.linalg.norm(dense @ vector - value * vector) <= bound
        assert abs(exact - value).min() <= bound


def test_residuals_before_convergence_are_true_bounds(problem, dense):
    op = hessian.operator(loss, *problem)
    result = hessian.eigenpairs(op, 2, "LA", tolerance=1e-9, basis_size=6, max_products=6)
    assert not result.converged
    assert result.products == 6
    for index, (value, bound) in enumerate(zip(result.values, result.residuals, strict=True)):
        vector = vector_of(result, index)
        error = np.linalg.norm(dense @ vector - value * vector)
        assert 0.5 * bound < error <= bound


def test_both_ends_at_once(problem, dense):
    op = hessian.operator(loss, *problem)
    result = hessian.eigenpairs(op, 5, "BE", tolerance=1e-5, basis_size=12)
    exact = np.linalg.eigvalsh(dense)
    expected = [*exact[:-4:-1], *exact[1::-1]]
    np.testing.assert_allclose(result.values, expected, rtol=1e-4)
    assert result.values[-1] < 0 < result.values[0]


SMALL_ENDS = np.array([-0.87, -0.68, -0.65, -0.64, -0.63])


def unbalanced():
    """A largest eigenvalue of 1000, five smallest above -1, and 290 between them near zero."""
    random = np.random.default_rng(0)
    bulk = np.exp(random.uniform(np.log(1e-3), np.log(20), 190))
    negative = -np.exp(random.uniform(np.log(1e-3), np.log(0.6), 100))
    return np.concatenate([[1000, 400, 200, 100, 50], SMALL_ENDS, bulk, negative])


@pytest.mark.parametrize(("which", "k"), [("BE", 10), ("SA", 5)])
def test_each_end_converges_by_its_own_size(which, k):
    """The residuals of the small end are not judged by the large one."""
    matrix = rotated(unbalanced())
    result = hessian.eigenpairs(of_matrix(matrix), k, which, tolerance=1e-3)
    smallest = np.sort(result.values)[:5]
    assert result.converged
    assert (result.residuals[-5:] <= 2e-6 * 1000).all()
    np.testing.assert_allclose(smallest, SMALL_ENDS, atol=2e-3)
    short = hessian.eigenpairs(of_matrix(matrix), k, which, tolerance=1e-3, max_products=30)
    assert not short.converged


@pytest.mark.parametrize("scale", [1e-19, 1e-30, 1e18])
def test_no_scale_underflows(scale):
    """Squares of entries are outside the range of float32."""
    values = np.array([9, -7, 6, 5, *np.linspace(-1, 3, 56)])
    result = hessian.eigenpairs(of_matrix(scale * rotated(values)), 2, "LM", tolerance=1e-4)
    assert result.converged
    np.testing.assert_allclose(result.values / scale, [9, -7], rtol=1e-4)
    assert (result.residuals < 1e-3 * scale).all()


@pytest.mark.parametrize(
    "basis",
    [
        "device",
        pytest.param("bfloat16", marks=pytest.mark.slow),
        pytest.param("host", marks=pytest.mark.slow),
    ],
)
def test_zero_has_the_eigenvalue_zero(basis):
    zeros = hessian.eigenpairs(of_matrix(np.zeros((40, 40))), 3, "BE", basis=basis)
    assert zeros.converged
    np.testing.assert_array_equal(zeros.values, 0)


@pytest.mark.slow
def test_bounds_hold_after_many_restarts():
    """Rounding accumulates with every restart: residuals are those of products."""
    matrix = rotated(np.array([9, 6, 5, *np.linspace(-1, 4.9, 200)]))
    options = {"basis_size": 6, "tolerance": 1e-7, "max_products": 1500}
    result = hessian.eigenpairs(of_matrix(matrix), 4, "LA", **options)
    assert result.products > 1000 / 6
    for index, (value, bound) in enumerate(zip(result.values, result.residuals, strict=True)):
        vector = vector_of(result, index)
        assert np.linalg.norm(matrix @ vector - value * vector) <= bound


def test_a_repeated_eigenvalue_counts_once_from_one_vector():
    """What ``converged`` says, and what it does not."""
    values = np.array([5.0, 5.0, 5.0, *np.linspace(0, 3, 60)])
    result = hessian.eigenpairs(of_matrix(rotated(values)), 3, tolerance=0.05)
    assert result.converged
    assert (abs(result.values[:, None] - values).min(1) <= result.residuals).all()
    assert result.values[0] == pytest.approx(5)
    assert result.values[1] < 4


def test_data_of_the_host_is_transferred_once():
    op = hessian.operator(lambda x, batch: jnp.mean(batch) * x**2, np.float32(1), np.ones((3, 2)))
    assert isinstance(op.data, jax.Array)


def test_padding_of_weight_zero_changes_nothing(problem):
    """40 examples in batches of 16, the last one filled up, against one batch of 40."""
    params, (images, labels) = problem
    flat = (images.reshape(48, 6)[:40], labels.reshape(48)[:40])
    exact = hessian.operator(loss, params, jax.tree.map(lambda x: x[None], flat))
    weights = (np.arange(48) < 40).astype(np.float32).reshape(3, 16)

    def weighted(params, batch):
        images, labels, weights = batch
        chances = jax.nn.log_softmax(outputs(params, (images, labels)))
        return -(weights * chances[jnp.arange(16), labels]).sum() / weights.sum()

    padded = hessian.operator(weighted, params, (images, labels, weights), weights=weights)
    vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    np.testing.assert_allclose(ravel(padded(vector)), ravel(exact(vector)), atol=2e-6)
    # Weights that were left out would make an error well above that.
    unweighted = hessian.operator(weighted, params, (images, labels, weights))
    assert np.abs(ravel(unweighted(vector)) - ravel(exact(vector))).max() > 1e-3


@pytest.mark.parametrize(
    "measure",
    [
        lambda op: hessian.eigenpairs(op, 2),
        lambda op: hessian.eigenpairs(op, 2, basis="host"),
        lambda op: hessian.density(op, probes=1),
        lambda op: hessian.trace(op),
        lambda op: hessian.trace(op, method="hutch++"),
        lambda op: hessian.power_iteration(op, 1),
    ],
)
def test_a_broken_model_gives_one_clear_line(measure):
    with pytest.raises(UsageError, match="hold NaN or infinity") as caught:
        measure(diagonal([1.0, np.nan, 3.0, 4.0]))
    assert "\n" not in str(caught.value)


def test_power_iteration_finds_the_same(problem):
    op = hessian.operator(loss, *problem)
    slow = hessian.power_iteration(op, 3, tolerance=1e-3)
    fast = hessian.eigenpairs(op, 3, "LM", tolerance=1e-3)
    np.testing.assert_allclose(slow.values, fast.values, rtol=1e-3)
    assert fast.products < slow.products


def test_an_invariant_subspace_does_not_end_the_search():
    """The identity is exhausted after one step, a matrix of two eigenvalues after two."""
    np.testing.assert_allclose(hessian.eigenpairs(diagonal([2.0] * 6), 3).values, 2.0, rtol=1e-6)
    result = hessian.eigenpairs(diagonal([-3.0, -3.0, 1.0, 1.0, 1.0]), 2, "SA")
    np.testing.assert_allclose(result.values, [-3, -3], rtol=1e-6)


def test_zero_operator():
    assert not hessian.eigenpairs(diagonal([0.0] * 4), 2, "LM").values.any()


def test_weight_decay_shifts_every_eigenvalue(problem):
    plain = as_matrix(hessian.operator(loss, *problem))
    decayed = as_matrix(hessian.operator(loss, *problem, weight_decay=0.3))
    np.testing.assert_allclose(decayed, plain + 0.3 * np.eye(len(plain)), atol=1e-6)


def test_mask_gives_the_block(problem, dense):
    op = hessian.operator(loss, *problem, mask="two")
    assert op.size == 32
    np.testing.assert_allclose(as_matrix(op), dense[-32:, -32:], atol=2e-6)


def test_blocks_are_data_of_one_program(problem, dense):
    """All eigenvalues of a small block, negative ones and fewer than the basis could hold, too."""
    params, _ = problem
    op = hessian.operator(loss, *problem)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])
    before = krylov.applied._cache_size()
    for mask, k, inside in (
        ("one/bias", 8, slice(0, 8)),
        ("one/kernel", 3, slice(8, ends[1])),
        ("two", 8, slice(ends[1], ends[2])),
        (None, 3, slice(0, ends[2])),
    ):
        block = op.block(mask)
        values, basis = np.linalg.eigh(dense[inside, inside])
        assert block.size == len(values)
        result = hessian.eigenpairs(block, k, tolerance=1e-5, basis_size=28)
        assert result.converged
        np.testing.assert_allclose(result.values, values[::-1][:k], atol=1e-5 * values[-1])
        leading = vector_of(result, 0)
        np.testing.assert_allclose(abs(leading[inside] @ basis[:, -1]), 1, atol=1e-4)
        np.testing.assert_array_equal(np.delete(leading, np.arange(ends[2])[inside]), 0)
    assert krylov.applied._cache_size() == before + 1
    # A kernel of the whole's size is no part of the block.
    powers = hessian.power_iteration(op.block("one/bias"), 8, tolerance=1e-3, max_products=200)
    for index in range(8):
        np.testing.assert_array_equal(vector_of(powers, index)[8:], 0)


def test_density_integrates_to_one_and_its_moments_are_traces(problem, dense):
    op = hessian.operator(loss, *problem)
    result = hessian.density(op, probes=200, steps=16)
    np.testing.assert_allclose(result.weights.sum(1), 1, rtol=1e-6)
    size = len(dense)
    # Errors of the mean over probes, from the probes themselves.
    for power, expected in ((1, np.trace(dense)), (2, np.sum(dense**2))):
        moments = size * (result.weights * result.nodes**power).sum(1)
        error = moments.std(ddof=1) / np.sqrt(len(moments))
        assert abs(size * result.moment(power) - expected) < 4 * error
        assert error < 0.3 * abs(expected)
    negative = np.mean(np.linalg.eigvalsh(dense) < -0.1)
    lower, upper = (bound.mean() for bound in result.mass_below(-0.1))
    error = share_error([lower, upper], size, 200)
    assert lower - 2 * error < negative < upper + 2 * error
    assert upper - lower < 0.2
    grid = np.linspace(result.nodes.min() - 1, result.nodes.max() + 1, 2001)
    assert np.trapezoid(result.on_grid(grid, 0.05), grid) == pytest.approx(1, abs=1e-3)


def half_near_zero():
    """600 eigenvalues, 34.8 % of them negative, nearly all closer to zero than nodes are."""
    random = np.random.default_rng(1)
    negative = -np.exp(random.uniform(np.log(1e-5), np.log(0.1), 209))
    positive = np.exp(random.uniform(np.log(1e-5), np.log(0.5), 383))
    return np.concatenate([[20, 15, 10, 8, 5, 3, 2, 1], negative, positive])


def test_the_error_of_a_share_is_that_of_random_vectors():
    vectors = np.random.default_rng(0).normal(size=(20_000, 30)) ** 2
    shares = vectors[:, :9].sum(1) / vectors.sum(1)
    assert share_error([0.3, 0.3], 30, 1) == pytest.approx(shares.std(), rel=0.02)


@pytest.mark.parametrize("steps", [16, 64, pytest.param(600, marks=pytest.mark.slow)])
def test_bounds_of_the_negative_mass_hold_the_truth(steps):
    """Where the nodes' own weights below zero are 55 % at 64 steps, and 71 % at 32."""
    values = half_near_zero()
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(600, 600)))[0]
    key = jax.random.key(3)
    op = of_matrix(basis * values @ basis.T)
    result = hessian.density(op, probes=2, steps=steps, key=key)
    for below in (0.0, -0.02):
        lower, upper = result.mass_below(below)
        assert (lower <= upper).all()
        # Exactly, of each probe's own measure.
        for probe, draw in enumerate(jax.random.split(key, 2)):
            vector = np.asarray(trees.random(draw, op.like), np.float64)
            shares = (basis.T @ vector) ** 2 / (vector @ vector)
            assert lower[probe] - 1e-4 <= shares[values < below].sum() <= upper[probe] + 1e-4
        # And of the spectrum, to within what two probes err.
        truth = (values < below).mean()
        error = share_error([truth, truth], 600, 2)
        assert lower.mean() - 3 * error <= truth <= upper.mean() + 3 * error
    if steps == 64:
        nodes = (result.weights * (result.nodes < 0)).sum(1).mean()
        assert abs(nodes - 0.348) > 5 * share_error([0.348, 0.348], 600, 2)
        assert (upper - lower < 0.05).all()  # clearly negative
    if steps == 600:
        lower, upper = result.mass_below(0.0)
        assert (upper - lower < 0.12).all()


def test_full_quadrature_is_exact():
    """With as many steps as eigenvalues the nodes are the eigenvalues."""
    result = hessian.density(diagonal([1.0, 2.0, 5.0, -4.0]), probes=3, steps=4)
    np.testing.assert_allclose(result.nodes, np.tile([-4, 1, 2, 5], (3, 1)), atol=1e-4)


def test_sharded_parameters_give_the_same_and_are_never_gathered():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(1)
    matrix = {"w": jnp.asarray(random.normal(size=(64, 8)), jnp.float32)}
    data = (
        jnp.asarray(random.normal(size=(2, 8, 64)), jnp.float32),
        jnp.asarray(random.integers(0, 8, (2, 8)), jnp.int32),
    )

    def softmax(params, batch):
        picked = jax.nn.log_softmax(batch[0] @ params["w"])[jnp.arange(8), batch[1]]
        return -jnp.mean(picked)

    alone = hessian.operator(softmax, matrix, data)
    spread = jax.device_put(matrix, NamedSharding(mesh, PartitionSpec("x")))
    everywhere = jax.device_put(data, NamedSharding(mesh, PartitionSpec()))
    sharded = hessian.operator(softmax, spread, everywhere)
    options = {"tolerance": 1e-5, "basis_size": 12}
    one, eight = (hessian.eigenpairs(op, 3, **options) for op in (alone, sharded))
    np.testing.assert_allclose(eight.values, one.values, rtol=1e-4)
    # What a step is compiled to, and how its basis is spread.
    basis = krylov.Iteration(sharded, jax.random.key(0), 12).basis
    assert basis["w"].sharding.spec == PartitionSpec(None, "x")
    for step in (
        krylov.applied.lower(sharded, spread),
        krylov._append.lower(basis, 0, spread, 0.0),
    ):
        text = step.compile().as_text()
        assert "all-reduce" in text
        assert not [line for line in text.splitlines() if "all-gather" in line and "64,8" in line]
        assert not [line for line in text.splitlines() if "all-gather" in line and "13,64" in line]
    rows, rotation = basis["w"], jnp.zeros((13, 13))
    turned = krylov._rotate.lower(rows, rotation, spread["w"]).compile()
    assert "all-gather" not in turned.as_text()
    host = hessian.eigenpairs(sharded, 3, **options, basis="host")
    np.testing.assert_allclose(host.values, one.values, rtol=1e-4)
    assert host.vectors["w"].sharding.spec == PartitionSpec(None, "x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: hessian.eigenpairs(op, 0), "k = 0 must be a whole number in 1..4"),
        (lambda op: hessian.eigenpairs(op, 5), "k = 5 must be a whole number in 1..4"),
        (lambda op: hessian.eigenpairs(op, 1, "XX"), "which = 'XX' must be one of LA, SA, LM, BE"),
        (lambda op: hessian.eigenpairs(op, 2, basis_size=2), "basis_size = 2 must be at least 4"),
        (lambda op: hessian.eigenpairs(op, 2, tolerance=0), "tolerance = 0 must be positive"),
        (lambda op: hessian.eigenpairs(op, 1, basis="disk"), "basis = 'disk' must be one of"),
        (
            lambda op: hessian.eigenpairs(op, 1, basis_size=3, byte_budget=100),
            "basis_size and byte_budget are both given",
        ),
        (lambda op: hessian.density(op, steps=0), "steps = 0 must be a whole number"),
        (lambda op: hessian.power_iteration(op, 0), "k = 0 must be a whole number in 1..4"),
        (lambda op: hessian.power_iteration(op, 5), "k = 5 must be a whole number in 1..4"),
        (
            lambda op: hessian.power_iteration(op, 1, max_products=0),
            "max_products = 0 must be a whole",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call(diagonal([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "backward"}, "mode = 'backward' must be one of"),
        ({"outer": outer}, "outer must be given with"),
        ({"weight_decay": -1.0}, "weight_decay = -1 must be 0 or positive"),
        ({"precision": "low"}, "precision = 'low' must be one of"),
        ({"mask": "three"}, "matches no parameter path"),
        ({"mask": lambda params: jax.tree.map(lambda _: False, params)}, "selects no parameter"),
        ({"weights": np.ones(4)}, "must begin with the 3 batches"),
        ({"weights": np.zeros(3)}, "not all 0"),
        ({"data": None, "weights": np.ones(3)}, "weights are those of batches"),
        ({"data": (jnp.zeros((2, 3)), jnp.zeros((3, 3)))}, "data must have batches"),
    ],
)
def test_bad_operators(problem, options, message):
    params, data = problem
    options = {"data": data, **options}
    with pytest.raises(UsageError, match=message):
        hessian.operator(loss, params, **options)
