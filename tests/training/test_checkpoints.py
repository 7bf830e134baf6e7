import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seal_jax.core.state import EARLIER_FIELDS
from seal_jax.errors import UsageError
from seal_jax.training.checkpoints import CheckpointError, Checkpoints, checksums, read_leaves


class State(NamedTuple):
    params: Any
    opt: Any
    key: jax.Array
    step: jax.Array
    extra: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Extra:
    mask: Any
    empty: Any
    counts: Any


def make_state(seed=0, width=3):
    rng = np.random.default_rng(seed)
    params = {
        "conv/1": {"kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
        "head.é": {"bias": jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
    }
    tx = optax.chain(
        optax.masked(optax.trace(0.9), {"conv/1": True, "head.é": False}),
        optax.scale_by_schedule(lambda count: count),
    )
    extra = Extra(
        mask=jnp.asarray(rng.integers(0, 2, (2, 4)), bool),
        empty=(None, jnp.zeros((0, 3))),
        counts=[jnp.asarray(rng.integers(-9, 9, 5), d) for d in (jnp.int8, jnp.uint16, jnp.int32)],
    )
    raw = jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32)
    return State(params, tx.init(params), (raw, jax.random.key(seed)), jnp.int32(seed), extra)


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(folder, states, **kwargs):
    with Checkpoints(folder, **kwargs) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"epoch": step})


def test_round_trip_of_every_kind_of_node_and_leaf(tmp_path, capfd):
    states = {step: make_state(step) for step in range(1, 6)}
    save_all(tmp_path / "new" / "folder", states, keep=2)
    checkpoints = Checkpoints(tmp_path / "new" / "folder", keep=2)
    assert checkpoints.steps() == [4, 5]
    restored = checkpoints.restore(abstract(states[5]))
    assert (restored.step, restored.metadata) == (5, {"epoch": 5})
    assert_same(restored.state, states[5])
    assert capfd.readouterr() == ("", "")


def test_save_does_not_see_what_happens_to_the_state_afterwards(tmp_path):
    state = {"w": jnp.arange(300_000.0)}
    expected = np.array(state["w"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state = jax.jit(lambda s: {"w": s["w"] * 0}, donate_argnums=0)(state)
        restored = checkpoints.restore(abstract(state))
    np.testing.assert_array_equal(restored.state["w"], expected)


def test_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent")
    assert checkpoints.restore(abstract(make_state())) is None
    checkpoints.close()
    assert not (tmp_path / "absent").exists(), "reading writes nothing"


def test_bits_without_a_number_survive(tmp_path):
    words = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32)
    state = {"nan": jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.float32)}
    save_all(tmp_path, {1: state})
    restored = Checkpoints(tmp_path).restore(abstract(state))
    np.testing.assert_array_equal(np.asarray(restored.state["nan"]).view(np.uint32), words)


@pytest.mark.parametrize("field", EARLIER_FIELDS)
def test_a_checkpoint_of_an_earlier_version_says_so(tmp_path, field):
    weights = {"params": {"kernel": jnp.ones((2, 3))}}
    save_all(tmp_path, {7: {"weights": weights, field: {"loss": jnp.zeros(2)}}})
    state = {"weights": weights, "metric_sums": {"loss": jnp.zeros(2)}}
    with pytest.raises(UsageError, match=rf"earlier version .*{field}/loss.*train again") as caught:
        Checkpoints(tmp_path).restore(abstract(state))
    assert "\n" not in str(caught.value)
    # What evaluations and `train.pretrained` need is there.
    np.testing.assert_array_equal(read_leaves(tmp_path)["weights/params/kernel"], np.ones((2, 3)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_any_sharding_gives_the_same_checksums_and_values(tmp_path, axis_type):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")

    def on(mesh_shape, spec):
        devices = jax.devices()[: mesh_shape[0] * mesh_shape[1]]
        mesh = jax.make_mesh(mesh_shape, ("seed", "data"), (axis_type,) * 2, devices=devices)
        return NamedSharding(mesh, PartitionSpec(*spec))

    tree = {"a": jnp.arange(64.0).reshape(8, 8).astype(jnp.bfloat16), "b": jnp.arange(8) > 3}
    places = [
        on((2, 4), ("seed",)),
        on((8, 1), (("seed", "data"),)),
        on((2, 1), ()),
        on((1, 1), ()),
    ]
    placed = [jax.device_put(tree, place) for place in places]
    placed[0]["a"] = jax.device_put(tree["a"], on((2, 4), ("data", "seed")))
    sums = [checksums(p) for p in placed]
    assert all(s == checksums(tree) for s in sums)
    save_all(tmp_path, {1: placed[0]})
    for other in placed:
        restored = Checkpoints(tmp_path).restore(abstract(other))
        assert_same(restored.state, tree)
        assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
            lambda x: x.sharding, other
        )


def test_checksums_see_every_bit_and_every_move():
    base = np.zeros(16, np.float32)
    base[:4] = [1.0, -2.0, 3.0, 1.0]
    seen = {checksums({"x": jnp.asarray(base)})["x"]}
    for bit in range(32):
        words = base.view(np.uint32).copy()
        words[5] ^= np.uint32(1 << bit)
        seen.add(checksums({"x": jnp.asarray(words.view(np.float32))})["x"])
    signs = base.copy()
    signs[:2] *= -1
    for other in (signs, base[[1, 0, *range(2, 16)]], base.reshape(4, 4).T.reshape(-1)):
        seen.add(checksums({"x": jnp.asarray(other)})["x"])
    assert len(seen) == 1 + 32 + 3


def test_checksums_read_the_memory_of_every_dtype():
    """The same words under another dtype of the width have the same checksum."""
    halves = jnp.asarray([1, 0x8000, 0xFFFF], jnp.uint16)
    as_bf16 = jax.lax.bitcast_convert_type(halves, jnp.bfloat16)
    as_f16 = jax.lax.bitcast_convert_type(halves, jnp.float16)
    assert len(set(checksums({"u": halves, "b": as_bf16, "f": as_f16}).values())) == 1
    single, ones = jnp.asarray([True, False]), jnp.asarray([1, 0], jnp.uint8)
    assert len(set(checksums({"b": single, "u": ones}).values())) == 1
    sums = checksums({"c": jnp.asarray([1 + 2j]), "d": jnp.asarray([2 + 1j]), "s": jnp.int32(-1)})
    assert len(set(sums.values())) == 3


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(bytes(b ^ 0x10 for b in path.read_bytes())),
    "one byte": lambda path: path.write_bytes(
        bytes(b ^ (i == 2 * path.stat().st_size // 3) for i, b in enumerate(path.read_bytes()))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_never_gives_wrong_values(tmp_path, damage):
    states = {
        step: {"w": jnp.full(50, step), "b": jnp.full(3, step, jnp.bfloat16)} for step in (1, 2)
    }
    save_all(tmp_path, states)
    checkpoints = Checkpoints(tmp_path)
    fallen_back = set()
    for path in sorted((tmp_path / "2").rglob("*")):
        if not path.is_file():
            continue
        whole = path.read_bytes()
        DAMAGES[damage](path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Python's, of files that nobody closed, come whenever these are collected: not what this test is about.
            warnings.simplefilter("ignore", ResourceWarning)
            restored = checkpoints.restore(abstract(states[1]))
        assert_same(restored.state, states[restored.step])
        assert restored.metadata == {"epoch": restored.step}
        if restored.step == 1:
            texts = [str(warning.message) for warning in caught]
            assert len(texts) == 1, texts
            text = texts[0]
            assert text.startswith(f"checkpoint {tmp_path / '2'} is damaged (")
            assert "\n" not in text
            fallen_back.add(path.relative_to(tmp_path / "2").as_posix())
        path.write_bytes(whole)
    needed = {"metadata/metadata", "state/manifest.ocdbt"}
    assert needed <= fallen_back or damage == "one byte"
    assert "metadata/metadata" in fallen_back
    assert checkpoints.restore(abstract(states[1])).step == 2, "reading moved nothing"


def test_flipped_value_bytes_are_found_by_the_checksum(tmp_path):
    """Damage that Orbax reads without complaint: another checkpoint's arrays."""
    states = {step: {"w": jnp.full(50, step), "b": jnp.arange(3)} for step in (1, 2)}
    save_all(tmp_path, states)
    (tmp_path / "2" / "state").rename(tmp_path / "old")
    (tmp_path / "1" / "state").rename(tmp_path / "2" / "state")
    with pytest.raises(UsageError, match=r"2: w: not the values that were saved; 1: ") as caught:
        Checkpoints(tmp_path).restore(abstract(states[1]))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_set_aside_by_the_next_save(tmp_path):
    state = make_state()
    (tmp_path / "damaged-2").mkdir(parents=True)  # from an earlier time
    save_all(tmp_path, {1: state, 2: state})
    record = tmp_path / "2" / "metadata" / "metadata"
    record.write_text(record.read_text().replace('"epoch": 2', '"epoch": 3'))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=r"2 is damaged .*: using step 1; .* to damaged-2$"):
            assert checkpoints.restore(abstract(state)).step == 1
        checkpoints.save(2, state, {"epoch": 2})
        assert checkpoints.restore(abstract(state)).metadata == {"epoch": 2}
    moved = tmp_path / "damaged-2-2" / "metadata" / "metadata"
    assert json.loads(moved.read_text())["metadata"] == {"epoch": 3}


def test_another_model_is_not_damage(tmp_path):
    state = make_state()
    save_all(tmp_path, {1: state, 2: state})
    with pytest.raises(
        UsageError, match=r"conv%2F1/kernel is float32\[4, 3\] there and float32\[4, 5\]"
    ):
        Checkpoints(tmp_path).restore(abstract(make_state(width=5)))
    fewer = abstract(state)._replace(extra=None, step={"count": abstract(state.step)})
    pattern = (
        r"step is int32\[\] there and absent here, extra/mask is .* and 4 more: use the config"
    )
    with pytest.raises(UsageError, match=pattern):
        Checkpoints(tmp_path).restore(fewer)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UsageError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UsageError, match=r"state leaf a/0 is a float: .* jnp\.array"):
            checkpoints.save(1, {"a": [1.0]}, {})
        with pytest.raises(UsageError, match=r"metadata must be plain JSON.*set"):
            checkpoints.save(1, {"a": jnp.ones(1)}, {"x": {1}})
        checkpoints.save(3, {"a": jnp.ones(1)}, {})
        for step in (3, 2):
            with pytest.raises(UsageError, match=rf"checkpoint {step} is not newer than 3 in "):
                checkpoints.save(step, {"a": jnp.ones(1)}, {})


@pytest.fixture
def small_files():
    """Let no file grow beyond 100 kB: what a full disk looks like to the writer."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on=True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if on else old[0], old[1]))

    yield limit
    limit(False)


def test_full_disk_is_one_line_and_keeps_the_good_ones(tmp_path, small_files, caplog):
    def big(step):
        return {"w": jnp.asarray(np.random.default_rng(step).normal(size=100_000))}

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, big(1), {})
    checkpoints.wait()
    small_files()
    line = (
        f"checkpoint 2 was not written to {tmp_path}: File too large; the last good one is step 1"
    )
    checkpoints.save(2, big(2), {})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(3, big(3), {})
    assert str(caught.value) == line
    assert sorted(os.listdir(tmp_path)) == ["1"], "the unfinished part is gone"
    with pytest.raises(CheckpointError, match="checkpoint 2 was not"), checkpoints:
        checkpoints.save(2, big(2), {})

    def fail_while_saving():
        with checkpoints:
            checkpoints.save(3, big(3), {})
            raise ZeroDivisionError

    with pytest.warns(UserWarning, match="checkpoint 3 was not"), pytest.raises(ZeroDivisionError):
        fail_while_saving()
    small_files(False)
    with checkpoints:
        checkpoints.save(2, big(2), {})
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(abstract(big(2))).state, big(2))
    assert not caplog.records


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoint 1 was not written .* no earlier one$"):
        Checkpoints(tmp_path / "file" / "run").save(1, {"a": jnp.ones(1)}, {})


SAVER = """
import sys, itertools, jax.numpy as jnp, jax
from seal_jax.training.checkpoints import Checkpoints
target = {"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}
checkpoints = Checkpoints(sys.argv[1], keep=2)
restored = checkpoints.restore(target)
print("start", flush=True)
for step in itertools.count(restored.step + 1 if restored else 1):
    checkpoints.save(step, {"w": jnp.full(200_000, step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    target = {"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}
    last = 0
    for saves in (2, 1, 5):
        command = [sys.executable, "-W", "error", "-c", SAVER, str(tmp_path)]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            bound = threading.Timer(120, process.kill)  # of a hang alone: then a line is missing
            bound.start()
            assert process.stdout.readline() == b"start\n"
            # `save` returns while its checkpoint is written; the one before it is complete then.
            begun = [int(process.stdout.readline()) for _ in range(saves)][-1]
            process.send_signal(signal.SIGKILL)
            bound.cancel()
        checkpoints = Checkpoints(tmp_path, keep=2)
        restored = checkpoints.restore(target)
        assert begun == last + saves
        assert restored is not None
        assert restored.step >= begun - 1
        last = restored.step
        assert restored.metadata == {"step": last}
        np.testing.assert_array_equal(restored.state["w"], np.full(200_000, last, np.float32))
    with checkpoints:
        checkpoints.save(last + 1, {"w": jnp.zeros(200_000)}, {})
    assert checkpoints.steps() == [*checkpoints.steps()[:-1], last + 1]
    assert all(name.isdigit() for name in os.listdir(tmp_path)), "leftovers are cleared"
