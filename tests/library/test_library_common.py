"""What every transformation keeps to, whatever it does: one table, a row each."""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from library_oracles import NnxTree

from seal_jax import paths, transforms
from seal_jax.generations import Clock
from seal_jax.units import Units

KEY = jax.random.key(7)
# Generations start at steps 2 and 4; each from 1 on ascends for its first step.
CLOCK = Clock(1, 2, 1)
STEPS, BREAK = 5, 3  # after BREAK updates generation 1 is half over
SPAN = {"steps_per_epoch": 1, "epochs_per_generation": 2}
REINIT = {"init_fn": "torch_default", "key": KEY, **SPAN}
ADAM = {"optimizer": optax.adam(0.1)}
VALUES = ("masked_reinit", "make_imp_tx", "hare_and_tortoise")  # whose updates must reach some
RELEARN = {
    "wels": transforms.wels(0.4, KEY),
    "welsr": transforms.welsr(0.4),
    "dsd": transforms.dsd(0.4),
    "kels": transforms.kels(0.5, "conv1", "fc"),
    "fc": "fc",
}


UNITS = [Units("hidden", ("conv1",), ("fc",))]
RECYCLE = {"init_fn": "torch_default", "key": KEY}
USEFUL = {"replacement_rate": 0.2, "maturity": 1}


def most_active(count, kept, params, activations):
    return {name: (count > 0) & (h == h.max()) for name, h in activations.items()}, kept


def falling(step):
    """A schedule whose dtype is not weak: it would turn bfloat16 into float32."""
    return jnp.float32(0.1) / (1 + step)


def row(factory, *args, note="", **options):
    return f"{factory} {note}".strip(), (factory, args, options)


ROWS = dict(
    [
        row("ascend", "conv1", CLOCK.ascending),
        row("ascend", "conv1", CLOCK.ascending, freeze_fit=True, note="freeze"),
        row("masked_reinit", "fc", "torch_default", CLOCK.starts_generation, key=KEY),
        row("reset_state", optax.adam(0.1), CLOCK.starts_generation, note="adam"),
        row(
            "reset_state",
            optax.adam(falling),
            CLOCK.starts_generation,
            mask="conv1",
            restart=CLOCK.starts_generation,
            note="part",
        ),
        row("anneal", CLOCK, 1.0, 1.0, ascent_cap=0.9),
        row("anneal", CLOCK, 1.0, 1.0, ascent_cap=0.9, key=KEY, note="key"),
        row("make_sa_gd_tx", temperature=1.0, epsilon=1.0, ascent_cap=0.9, **SPAN),
        row("make_sa_gd_tx", temperature=1.0, epsilon=1.0, key=KEY, **SPAN, note="key"),
        row("split_state", optax.adam(0.1), "conv1"),
        row("freeze_while", "conv1"),
        row("freeze_while", "conv1", optax.sgd(0.1, momentum=0.9), note="around"),
        row("freeze", "conv1"),
        row("hold_pruned", rewind_step=1, when=CLOCK.starts_generation),
        row("hold_pruned", note="alone"),
        row("make_normal_tx", 0.1, **SPAN),
        row("make_normal_tx", **ADAM, **SPAN, note="adam"),
        row("make_llf_tx", "fc", 0.1, **REINIT),
        *[row("make_relearn_tx", own, 0.1, **REINIT, note=name) for name, own in RELEARN.items()],
        row("make_seal_tx", "conv1", 0.1, ascent_epochs=1, ascent_scale=0.5, **SPAN),
        row("make_seal_tx", "conv1", **ADAM, **SPAN, ascent_epochs=1, note="adam"),
        row(
            "make_seal_tx",
            "conv1",
            0.1,
            ascent_epochs=1,
            fit_in_ascent="reinit",
            **REINIT,
            note="reinit",
        ),
        row("make_zapping_tx", "fc", 0.1, every=2, **REINIT),
        row("make_zapping_tx", "fc", init_fn="torch_default", classes=3, **SPAN, note="classes"),
        row("make_imp_tx", 0.1, rewind_step=1, **SPAN),
        row("make_sam_tx", **SPAN),
        row("make_sam_tx", rho=0.5, adaptive=True, eta=0.01, **SPAN, note="adaptive"),
        row("hare_and_tortoise", optax.sgd(0.1, momentum=0.9), 2, 0.5),
        row("hare_and_tortoise", optax.adam(0.1), 2, note="adam"),
        row("make_l2_init_tx", 0.1, weight_decay=0.3, **SPAN),
        row("make_l2_init_tx", mask="conv1", **ADAM, **SPAN, note="adam"),
        row("make_sam_tx", rho=0.5, last_epochs=1, **SPAN, note="late"),
        row("make_looksam_tx", rho=0.5, every=2, **SPAN),
        row("make_pof_tx", "fc", 0.1),
        row("make_pof_tx", "fc", 0.1, classifier_learning_rate=0.1, note="classifier"),
        *[
            row("make_fast_tx", "fc", 0.1, 0.02, optimizer=name, **SPAN, note=name)
            for name in ("sgd", "nesterov", "adam", "radam")
        ],
        row("damped_trace", 0.9),
        *[row("preconditioner", name, note=name) for name in ("sgd", "adam", "radam")],
        row("scale_by_radam", 0.9, 0.999, 1e-8),
        row("scale_by_two_rates", "fc", 0.1, falling, CLOCK),
        row("scale_by_restarting_rate", falling, CLOCK),
        row("decay_weights", 0.1, mask="conv1", when=CLOCK.ascending, factor=-1.0),
        row("decay_towards_initial", 0.1, mask="conv1"),
        row("sharpness_aware", optax.adam(0.1), note="adam"),
        row("look_sharpness_aware", optax.adam(0.1), 0.5, note="adam"),
        row("recycle", optax.adam(0.1), UNITS, choose=most_active, **RECYCLE),
        row("redo", optax.sgd(0.1, momentum=0.9), UNITS, threshold=0.5, every=2, **RECYCLE),
        row("continual_backprop", optax.adam(0.1), UNITS, **USEFUL, **RECYCLE),
        row("make_redo_tx", UNITS, 0.1, threshold=0.5, every=2, **RECYCLE, **SPAN),
        row("make_continual_backprop_tx", UNITS, **ADAM, **USEFUL, **RECYCLE, **SPAN),
    ]
)


def draw(seed):
    shapes = {
        "conv1": {"kernel": (4, 8), "bias": (8,)},
        "fc": {"kernel": (8, 8), "bias": (8,)},
    }
    rng = np.random.default_rng(seed)

    def leaf(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return jax.tree.map(leaf, shapes, is_leaf=lambda node: isinstance(node, tuple))


def slope(params):
    """The gradient; bounded away from 0, where Adam would make much of a rounding error."""
    return jax.tree.map(lambda x: (1.5 + jnp.sin(3 * x)).astype(x.dtype), params)


def given(params, step):
    """Every extra argument that some transformation takes, and one that none does."""
    return {
        "value": sum(jnp.mean(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params)),
        "grad_fn": slope,
        "key": jax.random.fold_in(KEY, step),
        "warming": step < 1,
        "activations": {"hidden": jnp.abs(jnp.sin(jnp.arange(8.0) + step))},
        "unheard_of": {"anything": step},
    }


class Row:
    """A transformation, its compiled step, and how two seeds fare with it."""

    def __init__(self, factory, args, options):
        self.factory = factory
        self.moves_to_values = "init_fn" in options or factory in VALUES
        self.moves_to_values |= factory == "hold_pruned" and "when" in options
        self.make = lambda: getattr(transforms, factory)(*args, **options)
        tx = self.tx = optax.with_extra_args_support(self.make())

        def update(state, params, step):
            return tx.update(slope(params), state, params, **given(params, step))

        self.update = update
        self.step = jax.jit(update)
        self.seeds = [self.loop(self.step, draw(seed)) for seed in (0, 1)]

    def loop(self, update, params, state=None, first=0, last=STEPS):
        """Return the updates, state and parameters of every step."""
        state = self.tx.init(params) if state is None else state
        history = []
        for step in range(first, last):
            updates, state = update(state, params, jnp.asarray(step))
            params = optax.apply_updates(params, updates)
            history.append((updates, state, params))
        return history


@pytest.fixture(scope="module", params=ROWS)
def row_(request):
    return Row(*ROWS[request.param])


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(tree):
    """The tree in NumPy, random keys as the integers that they are."""
    return jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree
    )


def assert_close(tree, expected, tolerance=1e-5):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        numbers(tree),
        numbers(expected),
    )


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, wanted in zip(
        jax.tree.leaves(numbers(tree)), jax.tree.leaves(numbers(expected)), strict=True
    ):
        assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape)
        assert leaf.tobytes() == wanted.tobytes()


def test_every_factory_has_a_row():
    functions = {
        name: inspect.signature(value).return_annotation
        for name, value in vars(transforms).items()
        if inspect.isfunction(value)
    }
    assert all(isinstance(kind, str) for kind in functions.values())  # said, so not overlooked
    factories = {name for name, kind in functions.items() if "GradientTransformation" in kind}
    assert factories == {factory for factory, _, _ in ROWS.values()}


def test_extra_arguments_do_not_disturb(row_):
    # That they are taken is seen by all that the fixture has run; here, of the bare factory.
    assert isinstance(row_.make(), optax.GradientTransformationExtraArgs)


def test_one_compilation(row_):
    assert row_.step._cache_size() == 1


def test_structure_and_dtype_stay(row_):
    mixed = draw(0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mixed)
    mixed["conv1"] = half["conv1"]
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    for params, gradient in ((mixed, mixed), (half, half), (half, single)):
        state = row_.tx.init(params)

        def update(gradient, state, params):
            inputs = given(params, jnp.asarray(0))
            inputs["grad_fn"] = lambda params: optax.tree.cast_like(slope(params), gradient)
            return row_.tx.update(gradient, state, params, **inputs)

        updates, after = jax.eval_shape(update, gradient, state, params)
        # An event must reach its values: see masked_reinit.
        reached = single if row_.moves_to_values else gradient
        assert jax.tree.structure((updates, after)) == jax.tree.structure((reached, state))
        new, old = jax.tree.leaves((updates, after)), jax.tree.leaves((reached, state))
        assert [(x.shape, x.dtype) for x in new] == [(x.shape, x.dtype) for x in old]
        assert not any(getattr(x, "weak_type", False) for x in new)  # it would compile once more
    with jax.disable_jit():
        history = row_.loop(row_.update, half, last=BREAK)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves([own[2] for own in history]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(history[-1][2]))
    # Later ones are not to be compared: what is drawn anew is another draw, in bfloat16.
    first = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), history[0][2])
    assert_close(first, row_.seeds[0][0][2], 0.05)


def test_the_loop_in_python_agrees(row_):
    with jax.disable_jit():
        eager = row_.loop(row_.update, draw(0))
    assert_close(eager, row_.seeds[0])


def test_the_loop_in_a_scan_over_seeds_agrees(row_):
    @jax.jit
    @jax.vmap
    def train(params):
        def body(carry, step):
            updates, state = row_.update(*carry, step)
            carry = state, optax.apply_updates(carry[1], updates)
            return carry, (updates, *carry)

        return jax.lax.scan(body, (row_.tx.init(params), params), jnp.arange(STEPS))[1]

    seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), draw(0), draw(1))
    together = numbers(train(seeds))
    for seed, history in enumerate(row_.seeds):
        for step, wanted in enumerate(history):
            assert_close(jax.tree.map(operator.itemgetter((seed, step)), together), wanted)


def test_nnx_optimizer(row_):
    states = jax.tree.leaves(row_.tx.init(draw(0)), is_leaf=paths.is_placeholder)
    if any(map(paths.is_placeholder, states)) and not hasattr(nnx, "Dict"):
        pytest.skip("nnx.Optimizer of flax 0.11 takes neither optax.masked nor optax.partition")
    model = NnxTree(draw(0))
    optimizer = nnx.Optimizer(model, row_.tx, wrt=nnx.Param)
    with jax.disable_jit():
        for step, (_, _, params) in enumerate(row_.seeds[0][:BREAK]):
            state = nnx.state(model, nnx.Param)
            optimizer.update(model, slope(state), **given(state, jnp.asarray(step)))
            assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)


def test_sharding_stays(row_):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, P()))

    def own(leaf):
        return NamedSharding(mesh, P("model") if leaf.ndim == 1 else P(None, "model"))

    def check(tree):
        arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        assert all(leaf.sharding.is_equivalent_to(own(leaf), leaf.ndim) for leaf in arrays)
        return len(arrays)

    @jax.jit
    def train(state, params, step):
        updates, state = row_.update(state, params, step)
        return updates, state, optax.apply_updates(params, updates)

    params = jax.tree.map(lambda leaf: jax.device_put(leaf, own(leaf)), draw(0))
    state = row_.tx.init(params)
    count = check(state)
    # Counts and keys lie on one device; everything else is where it belongs.
    state = jax.tree.map(lambda leaf: leaf if leaf.ndim else place(leaf), state)
    # A compiled program takes no arrays that are placed otherwise.
    program = train.lower(state, params, place(jnp.asarray(0))).compile()
    for step, (_, _, wanted) in enumerate(row_.seeds[0][:BREAK]):
        updates, state, params = program(state, params, place(jnp.asarray(step)))
        assert check(state) == count
        assert check(params) == 4
        # Zeros that are so for good lie nowhere in particular until they are added.
        check([leaf for leaf in jax.tree.leaves(updates) if leaf.any()])
        assert_close(params, wanted)


def test_interrupted_it_goes_on_bit_for_bit(row_):
    _, state, params = row_.seeds[0][BREAK - 1]
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)

    def back(leaf, stored):
        if is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(leaf))
        return jnp.asarray(stored)

    stored = [number.copy() for number in jax.tree.leaves(numbers(state))]
    state = jax.tree.unflatten(structure, list(map(back, leaves, stored)))
    assert_same(row_.loop(row_.step, params, state, first=BREAK), row_.seeds[0][BREAK:])
    assert row_.step._cache_size() == 1


def test_the_state_is_not_the_callers(row_):
    params = draw(0)
    state = row_.tx.init(params)
    theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    arrays = [leaf for leaf in jax.tree.leaves(state) if not is_key(leaf)]
    assert not theirs & {leaf.unsafe_buffer_pointer() for leaf in arrays}
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # as donation does
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, KEY)))
    row_.step(row_.tx.init(params), params, jnp.asarray(0))


def test_orbax_gives_back_every_state(tmp_path):
    params, states = draw(0), {}
    for name, (factory, args, options) in ROWS.items():
        states[name] = getattr(transforms, factory)(*args, **options).init(params)
    # Values that no initialisation gives.
    states = jax.tree.map(
        lambda leaf: leaf if is_key(leaf) else ~leaf if leaf.dtype == bool else leaf + 3, states
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, states)
        assert_same(checkpointer.restore(tmp_path / "states", abstract), states)
