"""Topologies: the errors anywhere, and one real compilation where the TPU compiler is installed."""

import importlib.util
import json
import os
import re

import jax
import jax.numpy as jnp
import pytest

from seal_jax.errors import USAGE, UsageError
from tools.preflight import analyse, command, mesh_for, prepare_environment, topology

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
NAMES = (
    "TPU_SKIP_MDS_QUERY",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_HOSTNAMES",
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
)


@pytest.fixture(autouse=True)
def _environment_restored(monkeypatch):
    # `setenv` first, so that what the code sets is taken back after the test.
    for name in NAMES:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # libtpu ends the process at a flag that only the CPU's compiler knows.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    # What is compiled for a chip that is not here can be written to the cache, but not read from it.
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)


@pytest.mark.parametrize("name", ["", "v5e", "v5e:2*4", "2x4", "v5e:", "v5e:8"])
def test_ill_formed_topology(name):
    with pytest.raises(UsageError) as error:
        mesh_for(name, seed=1, data=1)
    message = str(error.value)
    assert message.startswith(f"topology={name!r} is not of the form KIND:AxB; examples: v5e:1x1,")
    assert "\n" not in message


def test_axes_must_be_positive():
    with pytest.raises(UsageError, match=r"^seed=0 must be at least 1$"):
        mesh_for("v5e:2x4", seed=0, data=8)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UsageError, match=r'run: pip install "seal_jax\[preflight\]"$'):
        mesh_for("v5e:2x4", seed=2, data=4)


@pytest.mark.parametrize(
    ("name", "accelerator"),
    [("v5e:2x4", "v5litepod-8"), ("v5p:2x2x1", "v5p-8"), ("v6e:4x4", "v6e-16"), ("v9:2x2", "v9-4")],
)
def test_prepare_environment(monkeypatch, name, accelerator):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    prepare_environment(name)
    assert os.environ["TPU_ACCELERATOR_TYPE"] == accelerator
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
@pytest.mark.parametrize(
    ("name", "seed", "message"),
    [
        ("v5e:2x4", 3, r"has 8 chips; choose seed \* data = 8$"),
        ("v99:2x4", 2, "is refused by libtpu .*; examples: "),
        ("v5e:2x3", 2, "is refused by libtpu .*; examples: "),
    ],
)
def test_topologies_that_do_not_serve(name, seed, message):
    with pytest.raises(UsageError, match=message):
        mesh_for(name, seed=seed, data=4)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v4:2x2x1", "TPU v4"),
        ("v5e:2x2", "TPU v5 lite"),
        ("v5p:2x2x1", "TPU v5"),
        ("v6e:2x2", "TPU v6 lite"),
    ],
)
def test_every_kind_has_a_device_for_each_chip(name, kind):
    mesh = mesh_for(name, seed=2, data=2)
    assert {device.device_kind for device in mesh.devices.flat} == {kind}
    assert len({tuple(device.coords) for device in mesh.devices.flat}) == 4
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=sharding)
    report = analyse(jax.jit(jnp.matmul).lower(x, x).compile())
    assert report.flops == 2 * 2048**3
    assert report.dominant[0] == "convolutions and products"
    # A large product: below the published peak, by clock and multipliers together, and not far below.
    assert 0.5 < report.mfu < 1


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_a_real_compilation():
    mesh = mesh_for("v5e:2x4", seed=2, data=4)
    assert mesh.axis_names == ("seed", "data")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}

    def body(x):
        def step(x, _):
            y = jnp.tanh(x[0] @ x[0])
            with jax.named_scope("gradient_reduce"):
                y, size = jax.lax.pmean((y, y.sum()), "data")
            return y[None], size

        return jax.lax.scan(step, x, None, length=6)

    sharding = jax.sharding.NamedSharding(mesh, jax.P("seed"))
    program = jax.shard_map(
        body, mesh=mesh, in_specs=jax.P("seed"), out_specs=(jax.P("seed"), jax.P()), check_vma=False
    )
    x = jax.ShapeDtypeStruct((2, 256, 256), jnp.float32, sharding=sharding)
    report = analyse(jax.jit(program, donate_argnums=0).lower(x).compile(), steps=6)

    assert (report.device_kind, report.axes) == ("TPU v5 lite", {"seed": 2, "data": 4})
    assert report.memory.donated == 256 * 256 * 4
    assert report.fits
    assert "fits: " in report.as_text()
    (reduced,) = report.collectives
    assert (reduced.operation, reduced.axis, reduced.cause) == (
        "all-reduce",
        "data",
        "gradient_reduce",
    )
    assert (reduced.in_loop, reduced.runs, reduced.bytes) == (True, 6, 4 * (256 * 256 + 1))
    assert report.cycles.step_loop(6).trips == 6
    assert report.serial_loops == ()
    assert report.flops == 6 * 2 * 256**3
    assert report.seconds == pytest.approx(
        report.cycles.total / (197e12 / 131072) + report.collective_seconds
    )
    # One 256-cubed product fills four 128x128 multipliers for 256 cycles at the least.
    assert report.cycles_per_step > 256


def test_bad_options(tmp_path, capfd):
    def line(*options):
        assert command.run(["--config=configs/digits.py", *options]) == USAGE
        return capfd.readouterr().err

    said = line(f"--json={tmp_path}")
    assert said.startswith(f"error: --json={tmp_path} must be a file in a folder that exists")
    assert line("--jsn=x").startswith("error: --jsn=x is not an option of preflight; settings are")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_exit_codes(tmp_path, capfd):
    arguments = ["--config=configs/digits_resnet8.py:normal", "--config.train.seeds=1"]
    output = tmp_path / "report.json"
    assert command.run([*arguments, "--topology=v5e:1x1", "--price=2", f"--json={output}"]) == 0
    record = json.loads(output.read_text())
    assert record["fits"]
    assert record["dollars"] == pytest.approx(2 * record["hours"])
    assert record["hours"] == pytest.approx(4 * 32 * record["seconds"] / 3600)  # a call is an epoch

    large = [
        "--config.data.name=cifar10",
        "--config.data.image_size=128",
        "--config.train.batch_size=8192",
    ]
    assert command.run([*arguments, *large, "--topology=v5e:1x1"]) == 3
    assert "does not fit: RESOURCE_EXHAUSTED" in capfd.readouterr().out
    assert command.run([*arguments, "--topology=v99:1x1,v5e:1x1"]) == USAGE
    said = capfd.readouterr().out
    assert "v99:1x1, 1 seed(s): topology='v99:1x1' is refused by libtpu" in said
    assert re.search(r"v5e:1x1 +1 +1 +yes", said)
