"""``minimise``: closed forms, SciPy in float64, and landscapes without a minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import minimize_scalar

from seal_jax import UsageError
from seal_jax.line_search import minimise

GRID = [
    axis.ravel().astype(np.float32)
    for axis in np.meshgrid(10.0 ** np.linspace(-5, 5, 21), 10.0 ** np.linspace(-10, 10, 11))
]


def below_resolution(where, curvature, level):
    """Values that hardly move, or not at all, in float32."""
    return lambda xi: level + 0.5 * curvature * (xi - where) ** 2


def expanded(where, curvature, level):
    return lambda xi: level - curvature * where * xi + 0.5 * curvature * xi**2


@pytest.mark.parametrize("quadratic", [below_resolution, expanded])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_quadratics_over_ten_orders_of_distance_and_twenty_of_curvature(quadratic, level):
    found = jax.jit(jax.vmap(lambda x, c: minimise(quadratic(x, c, level))))(*GRID)
    assert found.accepted.all()
    np.testing.assert_allclose(found.xi, GRID[0], rtol=1e-6)


def test_slopes_left_over_from_large_terms():
    """Least squares, whose slope at 0 is a small rest of terms that cancel."""
    rng = np.random.default_rng(0)
    where = 10.0 ** np.linspace(-5, 5, 21)
    slope = rng.normal(size=(21, 32))
    rest = rng.normal(size=(21, 32))
    rest -= slope * (rest * slope).sum(1, keepdims=True) / (slope**2).sum(1, keepdims=True)
    target = (slope * where[:, None] + 10 * where[:, None] * rest).astype(np.float32)
    slope = slope.astype(np.float32)
    # Of the problem as rounded to float32.
    a, t = slope.astype(np.float64), target.astype(np.float64)
    expected = (a * t).sum(1) / (a * a).sum(1)
    found = jax.jit(jax.vmap(lambda a, t: minimise(lambda xi: ((a * xi - t) ** 2).mean())))(
        slope, target
    )
    assert found.accepted.all()
    np.testing.assert_allclose(found.xi, expected, rtol=1e-5)


def test_rounding_of_values_larger_than_the_whole_descent():
    """Noise that no slope sees, as of a loss that is summed up in float32."""

    def search(where, seed):
        def noisy(xi):
            noise = 3e-4 * jnp.sin(1e4 * (jax.lax.stop_gradient(xi) + seed))
            return 10 + (xi - where) ** 2 - where**2 + noise

        return minimise(noisy)

    where = np.float32(10.0) ** np.linspace(-5, -2, 16)
    found = jax.jit(jax.vmap(jax.vmap(search, (0, None)), (None, 0)))(where, jnp.arange(8.0))
    assert found.accepted.all()
    np.testing.assert_allclose(found.xi, np.tile(where, (8, 1)), rtol=1e-5)


def test_softmax_regression_equals_scipy():
    rng = np.random.default_rng(1)
    problems = 12
    logits = rng.normal(size=(problems, 32, 5)).astype(np.float32)
    scale = 10.0 ** np.linspace(-3, 3, problems)
    slopes = (rng.normal(size=logits.shape) * scale[:, None, None]).astype(np.float32)
    labels = rng.integers(0, 5, (problems, 32))

    def loss64(xi, z, d, y):
        z = z.astype(np.float64) - xi * d.astype(np.float64)
        z -= z.max(1, keepdims=True)
        return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(32), y])

    # Along a descent direction: turned round where the loss would rise.
    step = 1e-6 / scale
    for i in range(problems):
        if loss64(step[i], logits[i], slopes[i], labels[i]) > loss64(
            0, logits[i], slopes[i], labels[i]
        ):
            slopes[i] *= -1

    def search(z, d, y):
        def loss(xi):
            log_p = jax.nn.log_softmax(z - xi * d)
            return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

        return minimise(loss)

    found = jax.jit(jax.vmap(search))(logits, slopes, labels)
    assert found.accepted.all()
    for i in range(problems):
        arguments = (logits[i], slopes[i], labels[i])
        best = minimize_scalar(
            loss64, bounds=(0, 10 / scale[i]), args=arguments, method="bounded",
            options={"xatol": 1e-9 / scale[i]},
        )  # fmt: skip
        np.testing.assert_allclose(found.xi[i], best.x, rtol=1e-3)
        np.testing.assert_allclose(found.value[i], best.fun, rtol=1e-5)


ASYMMETRIC = {
    "never flat": lambda xi: jnp.exp(-xi),
    "flat beyond": lambda xi: jnp.where(xi < 1, (xi - 1) ** 2, 0.0),
    "separable": lambda xi: jnp.logaddexp(0.0, -xi),
    "rises too little": lambda xi: jnp.where(xi < 1, (xi - 1) ** 2, 0.9 - 0.9 / xi),
}
HOPELESS = {
    "flat": lambda xi: 0 * xi + 3,
    "rising": lambda xi: xi,
    "no slope": lambda xi: xi**2 + 1,
    "top": lambda xi: -(xi**2),
    "NaN": lambda xi: xi * jnp.nan,
    "inf": lambda xi: xi + jnp.inf,
    "infinite slope": lambda xi: -jnp.sqrt(xi),
    "NaN at 0": lambda xi: jnp.where(xi > 0, (xi - 1) ** 2, jnp.nan),
    "below the floor": lambda xi: (xi - 1e-9) ** 2,
}


NO_MINIMUM = ASYMMETRIC | HOPELESS


@jax.jit
def search_by_number(number):
    """One program for all landscapes."""
    return minimise(lambda xi: jax.lax.switch(number, list(NO_MINIMUM.values()), xi))


@pytest.mark.parametrize("name", NO_MINIMUM)
def test_no_minimum_to_take(name):
    found = search_by_number(list(NO_MINIMUM).index(name))
    assert not found.accepted
    assert found.xi == 0
    np.testing.assert_array_equal(found.value, NO_MINIMUM[name](jnp.float32(0)))


def test_the_cap_decides_what_is_asymmetric():
    def f(xi):
        return (xi - 3) ** 2  # as high as at 0 from 6 on

    assert minimise(f, cap=6.5).accepted
    assert not minimise(f, cap=5.5).accepted


@pytest.mark.parametrize("beyond", [jnp.inf, jnp.nan])
def test_infinity_and_nan_end_the_basin(beyond):
    wall = np.float32([0.3, 1.0, 700.0])
    inside = jax.vmap(lambda w: minimise(lambda x: jnp.where(x > w, beyond, (x - w / 2) ** 2)))(
        wall
    )
    assert inside.accepted.all()
    np.testing.assert_allclose(inside.xi, 0.5 * wall, rtol=1e-6)
    at_the_wall = jax.vmap(lambda w: minimise(lambda x: jnp.where(x > w, beyond, -x)))(wall)
    assert at_the_wall.accepted.all()
    assert (0.999 * wall <= at_the_wall.xi).all()
    assert (at_the_wall.xi <= wall).all()
    np.testing.assert_array_equal(at_the_wall.value, -at_the_wall.xi)


def test_of_several_minima_the_lowest_and_of_equals_the_nearest():
    def search(second):
        return minimise(lambda xi: jnp.minimum((xi - 2) ** 2, (xi - 6) ** 2 + second) + 1)

    found = jax.vmap(search)(jnp.array([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(found.xi, [6.0, 2.0, 2.0], rtol=1e-3)


def test_the_start_does_not_matter():
    """A rejected search has the result 0; the next may start from it."""
    starts = jnp.array([1e-7, 1e-2, 3.0, 1e6, 0.0, -1.0, jnp.nan, jnp.inf, 1e-30])
    found = jax.vmap(lambda start: minimise(lambda xi: (xi - 2) ** 2, start=start))(starts)
    np.testing.assert_allclose(found.xi, np.full(9, 2.0), rtol=1e-6)


def test_evaluations_are_counted():
    calls = []

    def f(xi):
        jax.debug.callback(lambda _: calls.append(1), xi)
        return (xi - 5) ** 2

    found = jax.block_until_ready(minimise(f))
    jax.effects_barrier()
    assert found.evaluations == len(calls)
    assert found.evaluations.dtype == jnp.int32


def test_one_compilation():
    traces = []

    @jax.jit
    def search(where):
        traces.append(1)
        return minimise(lambda xi: (xi - where) ** 2)

    for where in (1e-4, 1.0, 1e4):
        np.testing.assert_allclose(search(jnp.float32(where)).xi, where, rtol=1e-6)
    assert len(traces) == 1


def test_each_device_its_own_search():
    where = jnp.float32(10.0) ** jnp.arange(-3.0, 5.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def search(where):
        return jax.tree.map(jnp.atleast_1d, minimise(lambda xi: (xi - where[0]) ** 2))

    found = jax.jit(
        jax.shard_map(search, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=True)
    )(where)
    assert found.accepted.all()
    np.testing.assert_allclose(found.xi, where, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.0}, "cap = 0 must be positive"),
        ({"cap": float("inf")}, "cap = inf must be positive and finite"),
        ({"floor": -1.0}, "floor = -1 must be positive"),
        ({"floor": 8.0, "cap": 4.0}, "floor = 8 must be less than cap = 4"),
        ({"start": 10.0, "cap": 4.0}, "start = 10 must lie in"),
        ({"start": float("nan")}, "start = nan must lie in"),
    ],
)
def test_bounds_out_of_order(options, message):
    with pytest.raises(UsageError, match=message):
        minimise(lambda xi: xi, **options)


def test_a_function_that_is_not_scalar():
    with pytest.raises(UsageError, match=r"shape \(3,\); it must return a scalar"):
        minimise(lambda xi: xi * jnp.ones(3))
