"""The Hessian module against dense Hessians, SciPy and exact identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seal_jax import UsageError, hessian
from seal_jax.hessian import lanczos


def loss(params, batch):
    images, labels = batch
    hidden = jnp.tanh(images @ params["one"]["kernel"] + params["one"]["bias"])
    logits = hidden @ params["two"]["kernel"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def outputs(params, batch):
    hidden = jnp.tanh(batch[0] @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"]


def outer(logits, batch):
    labels = batch[1]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {"one": {"kernel": normal(6, 8), "bias": normal(8)}, "two": {"kernel": normal(8, 4)}}
    data = (normal(3, 16, 6), jnp.asarray(random.integers(0, 4, (3, 16)), jnp.int32))
    return params, data


def ravel(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def unravel(flat, like):
    leaves, structure = jax.tree.flatten(like)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = np.split(np.asarray(flat, np.float32), cuts)
    return structure.unflatten(
        [jnp.asarray(part).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def dense(problem):
    """The Hessian of the mean over batches, by jax.hessian on the flat vector."""
    params, data = problem

    def flat_loss(flat):
        leaves, structure = jax.tree.flatten(params)
        cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = jnp.split(flat, cuts)
        whole = structure.unflatten(
            [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )
        return sum(loss(whole, jax.tree.map(lambda x, b=b: x[b], data)) for b in range(3)) / 3

    return np.asarray(jax.hessian(flat_loss)(jnp.asarray(ravel(params), jnp.float32)), np.float64)


def as_matrix(op):
    product = jax.jit(lambda op, v: op(v))
    return np.stack([ravel(product(op, unravel(row, op.like))) for row in np.eye(op.size)], axis=1)


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
    found = hessian.eigenpairs(op, 5, which, tolerance=1e-5, basis_size=12)
    product = jax.jit(lambda v: op(v))
    linear = scipy.sparse.linalg.LinearOperator(
        dense.shape, matvec=lambda x: ravel(product(unravel(x.ravel(), op.like)))
    )
    expected = scipy.sparse.linalg.eigsh(linear, 5, which=which, return_eigenvectors=False)
    sort = {"LA": -expected, "SA": expected, "LM": -abs(expected)}[which]
    np.testing.assert_allclose(found.values, expected[np.argsort(sort)], rtol=1e-4)
    if which == "SA":
        assert found.values[0] < 0
    assert found.converged
    exact = np.linalg.eigvalsh(dense)
    for index, (value, bound) in enumerate(zip(found.values, found.residuals, strict=True)):
        vector = ravel(jax.tree.map(lambda rows, index=index: rows[index], found.vectors))
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
        assert np.linalg.norm(dense @ vector - value * vector) <= bound
        assert abs(exact - value).min() <= bound


def test_residuals_before_convergence_are_true_bounds(problem, dense):
    op = hessian.operator(loss, *problem)
    found = hessian.eigenpairs(op, 2, "LA", tolerance=1e-9, basis_size=6, max_products=6)
    assert not found.converged
    assert found.products == 6
    for index, (value, bound) in enumerate(zip(found.values, found.residuals, strict=True)):
        vector = ravel(jax.tree.map(lambda rows, index=index: rows[index], found.vectors))
        error = np.linalg.norm(dense @ vector - value * vector)
        assert 0.5 * bound < error <= bound


def test_power_iteration_finds_the_same(problem):
    op = hessian.operator(loss, *problem)
    slow = hessian.power_iteration(op, 3, tolerance=1e-3)
    fast = hessian.eigenpairs(op, 3, "LM", tolerance=1e-3)
    np.testing.assert_allclose(slow.values, fast.values, rtol=1e-3)
    assert fast.products < slow.products


def quadratic(x, matrix):
    return 0.5 * x @ matrix @ x


def diagonal(values):
    matrix = jnp.diag(jnp.asarray(values, jnp.float32))
    return hessian.operator(functools.partial(quadratic, matrix=matrix), jnp.zeros(len(values)))


def test_an_invariant_subspace_does_not_end_the_search():
    """The identity is exhausted after one step, a matrix of two eigenvalues after two."""
    np.testing.assert_allclose(hessian.eigenpairs(diagonal([2.0] * 6), 3).values, 2.0, rtol=1e-6)
    found = hessian.eigenpairs(diagonal([-3.0, -3.0, 1.0, 1.0, 1.0]), 2, "SA")
    np.testing.assert_allclose(found.values, [-3, -3], rtol=1e-6)


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


def test_density_integrates_to_one_and_its_moments_are_traces(problem, dense):
    op = hessian.operator(loss, *problem)
    found = hessian.density(op, probes=200, steps=16)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-6)
    size = len(dense)
    # Errors of the mean over probes, from the probes themselves.
    for power, expected in ((1, np.trace(dense)), (2, np.sum(dense**2))):
        each = size * (found.weights * found.nodes**power).sum(1)
        error = each.std(ddof=1) / np.sqrt(len(each))
        assert abs(size * found.moment(power) - expected) < 4 * error
        assert error < 0.3 * abs(expected)
    negative = np.mean(np.linalg.eigvalsh(dense) < -0.1)
    assert abs(found.negative_mass(-0.1) - negative) < 0.05
    grid = np.linspace(found.nodes.min() - 1, found.nodes.max() + 1, 2001)
    assert np.trapezoid(found.on_grid(grid, 0.05), grid) == pytest.approx(1, abs=1e-3)


def test_full_quadrature_is_exact():
    """With as many steps as eigenvalues the nodes are the eigenvalues."""
    found = hessian.density(diagonal([1.0, 2.0, 5.0, -4.0]), probes=3, steps=4)
    np.testing.assert_allclose(found.nodes, np.tile([-4, 1, 2, 5], (3, 1)), atol=1e-4)


def test_trace(problem, dense):
    found = hessian.trace(hessian.operator(loss, *problem), probes=100)
    assert abs(found.value - np.trace(dense)) < 4 * found.error
    assert found.error < 0.3 * abs(np.trace(dense))


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
    state = lanczos._first(sharded, jax.random.key(0), 12)
    assert not state.basis["w"].sharding.is_fully_replicated
    text = lanczos._run.lower(sharded, state, 0, 12).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather" in line and "64,8" in line]
    assert not gathered


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: hessian.eigenpairs(op, 0), "k = 0 must lie in 1..4"),
        (lambda op: hessian.eigenpairs(op, 5), "k = 5 must lie in 1..4"),
        (lambda op: hessian.eigenpairs(op, 1, "XX"), "which = 'XX' must be one of LA, SA, LM"),
        (lambda op: hessian.eigenpairs(op, 2, basis_size=2), "basis_size = 2 must be at least 4"),
        (lambda op: hessian.eigenpairs(op, 2, tolerance=0), "tolerance = 0 must be positive"),
        (lambda op: hessian.trace(op, probes=1), "probes = 1 must be at least 2"),
        (lambda op: hessian.density(op, steps=0), "steps = 0 must be at least 1"),
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
        ({"mask": "three"}, "matches no parameter path"),
        ({"data": (jnp.zeros((2, 3)), jnp.zeros((3, 3)))}, "data must have batches"),
    ],
)
def test_bad_operators(problem, options, message):
    params, data = problem
    options = {"data": data, **options}
    with pytest.raises(UsageError, match=message):
        hessian.operator(loss, params, **options)
