"""Flops and bytes of compiled programs against closed forms, and what cycles are spent on."""

# The lines of HLO stay as the compiler writes them.
# ruff: noqa: E501

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from seal_jax.core.settings import Settings, Train
from tools.preflight import command
from tools.preflight.chips import CHIPS
from tools.preflight.costs import Collective
from tools.preflight.hlo import parse
from tools.preflight.report import Memory, Run, analyse_text
from tools.preflight.roofline import (
    ADVICE,
    Operation,
    collective_seconds,
    instruction_bytes,
    operations,
    spent,
)


def flops(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    module = parse(jax.jit(function).lower(*arguments).compile().as_text())
    return sum(operation.flops * operation.runs for operation in operations(module))


def test_a_scan_of_products_and_convolutions():
    def body(carry, _):
        matrix, images, kernel = carry
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (jnp.tanh(matrix @ matrix), images, kernel), None

    def program(*carry):
        return jax.lax.scan(body, carry, None, length=6)[0]

    # Of 8 places the outer two in a row of the kernel reach only 7 inputs: 7 + 8 + 7 products along an axis.
    convolution = 2 * 2 * 5 * 5 * 22**2
    assert flops(program, (32, 32), (2, 8, 8, 5), (3, 3, 5, 5)) == 6 * (2 * 32**3 + convolution)


def test_products_of_batches():
    assert flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (3, 4, 5), (3, 6, 5)) == (
        2 * 3 * 4 * 5 * 6
    )


@pytest.mark.parametrize(
    ("options", "images", "kernel", "expected"),
    [
        # Strided, valid: 4 outputs, all 3 places.
        ({"window_strides": (2,), "padding": "VALID"}, (2, 9, 4), (3, 4, 6), 2 * 2 * 6 * 4 * 4 * 3),
        # In two groups each output feature sees half of the input features.
        (
            {"window_strides": (1,), "padding": "VALID", "feature_group_count": 2},
            (2, 9, 4),
            (3, 2, 6),
            2 * 2 * 6 * 2 * 7 * 3,
        ),
        # Holes in the input: 17 places of 9 inputs, 15 outputs, of which 8 see 2 inputs and 7 see 1.
        (
            {"window_strides": (1,), "padding": [(0, 0)], "lhs_dilation": (2,)},
            (2, 9, 4),
            (3, 4, 6),
            2 * 2 * 6 * 4 * (8 * 2 + 7),
        ),
        # Holes in the kernel: it spans 5 of 9 inputs.
        (
            {"window_strides": (1,), "padding": "VALID", "rhs_dilation": (2,)},
            (2, 9, 4),
            (3, 4, 6),
            2 * 2 * 6 * 4 * 5 * 3,
        ),
    ],
)
def test_convolutions(options, images, kernel, expected):
    def convolve(a, b):
        return jax.lax.conv_general_dilated(
            a, b, dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    assert flops(convolve, images, kernel) == expected


# Four products of 8x8 matrices, as the TPU compiler writes them: one of four places of a window meets no hole.
BATCHED = """\
HloModule jit_f

%fused (param_0: f32[4,8,8], param_1: f32[4,8,8]) -> f32[4,8,8] {
  %param_0 = f32[4,8,8]{2,1,0} parameter(0)
  %param_1 = f32[4,8,8]{2,1,0} parameter(1)
  ROOT %convolution-base-dilated.1 = f32[4,8,8]{1,2,0:T(8,128)} convolution(%param_0, %param_1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%rows (data: u8[5000,128], start: s32[]) -> u8[2,128] {
  %data = u8[5000,128]{1,0} parameter(0)
  %start = s32[] parameter(1)
  ROOT %slice.1 = u8[2,128]{1,0} dynamic-slice(%data, %start, %start), dynamic_slice_sizes={2,128}
}

%put (all: f32[100,16], row: f32[1,16], at: s32[]) -> f32[100,16] {
  %all = f32[100,16]{1,0} parameter(0)
  %row = f32[1,16]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %update.1 = f32[100,16]{1,0} dynamic-update-slice(%all, %row, %at, %at)
}

ENTRY %main (a: f32[4,8,8], b: f32[4,8,8], c: u8[5000,128], d: f32[100,16], e: f32[1,16], i: s32[]) -> f32[100,16] {
  %a = f32[4,8,8]{2,1,0} parameter(0)
  %b = f32[4,8,8]{2,1,0:T(8,128)S(1)} parameter(1)
  %c = u8[5000,128]{1,0} parameter(2)
  %d = f32[100,16]{1,0} parameter(3)
  %e = f32[1,16]{1,0} parameter(4)
  %i = s32[]{:S(6)} parameter(5)
  %product = f32[4,8,8]{1,2,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"700"}}
  %taken = u8[2,128]{1,0} fusion(%c, %i), kind=kLoop, calls=%rows
  %copy-start.1 = (f32[4,8,8]{2,1,0:S(1)}, f32[4,8,8]{2,1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = f32[4,8,8]{2,1,0:S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[4,8,8]{2,1,0}), f32[1,8,8]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:8], [0:8]}
  %slice-done.1 = f32[1,8,8]{2,1,0:S(1)} slice-done(%slice-start.1)
  ROOT %put.1 = f32[100,16]{1,0} fusion(%d, %e, %i), kind=kLoop, calls=%put
}
"""


def test_a_batched_product_written_as_a_convolution():
    (product,) = [each for each in operations(parse(BATCHED)) if each.flops]
    assert (product.flops, product.cycles) == (4 * 2 * 8**3, 700)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("product", 4 * 4 * 64 * 2),  # one operand is in on-chip memory
        ("taken", 2 * 2 * 128),  # two rows of 5,000
        ("copy-start.1", 4 * 4 * 64),
        ("copy-done.1", 0),
        ("slice-start.1", 4 * 64),
        ("put.1", 2 * 4 * 16),  # in place: the row is read and written
    ],
)
def test_bytes_from_and_to_hbm(name, expected):
    module = parse(BATCHED)
    main = module.computations["main"]
    assert instruction_bytes(module, main, main.instructions[name]) == expected


def test_bytes_where_the_compiler_counts_them_too():
    x = jax.ShapeDtypeStruct((64, 48), jnp.float32)
    compiled = jax.jit(lambda a, b: jnp.tanh(a).T @ (b * 2 + a)).lower(x, x).compile()
    moved = sum(operation.bytes for operation in operations(parse(compiled.as_text())))
    # Without loops or slices the cost analysis of XLA counts every array that is read or written, as here.
    assert moved == compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(
    ("kind", "megahertz"),
    # As published, but for the v6e: 918 TFLOP/s of four multipliers of 256x256.
    [("TPU v4", 1050), ("TPU v5 lite", 1500), ("TPU v5", 1750), ("TPU v6 lite", 1750)],
)
def test_clocks(kind, megahertz):
    assert CHIPS[kind].clock == pytest.approx(megahertz * 1e6, rel=2e-3)


def test_what_cycles_are_spent_on():
    chip = CHIPS["TPU v5 lite"]
    per_cycle = chip.bandwidth / chip.clock
    found = [
        Operation(cycles=2_000, runs=3, flops=10**9, bytes=0),
        Operation(cycles=10_000, runs=2, flops=0, bytes=int(6_000 * per_cycle)),
        Operation(cycles=10_000, runs=1, flops=0, bytes=int(4_000 * per_cycle)),
        Operation(cycles=90_000, runs=1, flops=80_000 * chip.flops_per_cycle, bytes=10**6),
        Operation(cycles=None, runs=1, flops=0, bytes=0),
    ]
    assert spent(found, chip) == {
        "convolutions and products": 90_000,
        "memory bandwidth": 20_000,
        "vector arithmetic": 10_000,
        "latency of small operations": 6_000,
    }
    assert set(spent(found, chip)) < set(ADVICE)


def test_seconds_of_collectives():
    chip = CHIPS["TPU v5 lite"]
    axes = {"seed": 2, "data": 4}
    reduced = Collective("all-reduce", "data", "gradient_reduce", True, 2, 20, 2, 8 * 10**8)
    # Two of 400 MB, ten times each, over four chips: 2 * 3 / 4 of the bytes leave each chip at 200 GB/s.
    assert collective_seconds([reduced], axes, chip) == pytest.approx(20 * 4e8 * 1.5 / 200e9)
    alone = Collective("all-reduce", "none", "metrics", True, 1, 20, 1, 10**9)
    assert collective_seconds([alone], axes, chip) == pytest.approx(20 * 1832 / chip.clock)


@pytest.fixture
def report():
    """A call of 10 steps and a second, of a run of an hour."""
    text = BATCHED.replace('"700"', f'"{round(CHIPS["TPU v5 lite"].clock)}"')
    run = Run(steps=36_000, images_per_step=256, chips=8, price=1.5)
    memory = Memory(2**31, 0, 0, 2**31, 0, None)
    found = analyse_text(text, steps=10, kind="TPU v5 lite")
    return dataclasses.replace(found, run=run, memory=memory, hbm=2**34)


def test_the_whole_run(report):
    assert report.seconds == pytest.approx(1)
    assert report.hours == pytest.approx(1)
    assert report.dollars == pytest.approx(8 * 1.5)
    assert report.images_per_second == pytest.approx(2560)
    assert report.mfu == pytest.approx(4096 / 197e12)
    # Two arrays of 1,024 bytes, two rows, the copy, its slice and the update.
    assert report.bytes_accessed == 2 * 1024 + 512 + 1024 + 256 + 128
    assert report.bandwidth_share == pytest.approx(3968 / 819e9)
    assert report.dominant == ("convolutions and products", pytest.approx(1))
    said = report.as_text()
    for part in (
        "images a second 2,560, 320 a chip",
        "hours           1.00: 36,000 steps on 8 chip(s)",
        "dollars         12.0 at 1.5 per chip-hour",
        "convolutions and products, 100 % of the time",
    ):
        assert part in said


def test_a_table_of_topologies_and_seeds(report):
    cases = [
        command.Case("train", Settings(train=Train(seeds=seeds)), None, topology, 1.5)
        for topology, seeds in (("v5e:2x4", 16), ("v5e:1x1", 1), ("v9:2x2", 4))
    ]
    beside = {"networks": 16, "seeds_per_chip": 2, "seed_batching": "map"}
    answers = [
        command.Answer("report", report.as_text(), report.as_dict() | beside),
        command.Answer("too large", "does not fit: 50 GiB", {"fits": False}),
        command.Answer("error", "is refused", {"error": "is refused"}),
    ]
    header, _, first, second, third, *notes = command.table(cases, answers).splitlines()
    assert header.split()[:4] == ["topology", "seeds", "a", "chip"]
    # 12 dollars are 0.75 for each of 16 seeds.
    assert " ".join(first.split()[:13]) == (
        "v5e:2x4 16 2 map yes 25.0 % 100 2,560 0.00000000208 % 1.00 12.0"
    )
    assert first.split()[13] == "0.750"
    assert (second.split(), third.split()) == (["v5e:1x1", "1", "no"], ["v9:2x2", "4", "?"])
    assert notes == ["v5e:1x1, 1 seed(s): does not fit: 50 GiB", "v9:2x2, 4 seed(s): is refused"]


@pytest.mark.parametrize("price", ["0", "-1", "free", "1,2", "nan", "inf"])
def test_a_price_that_is_none(price, capsys):
    assert command.run(["--config=configs/digits.py", f"--price={price}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --price={price} must be dollars per")
