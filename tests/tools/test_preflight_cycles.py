"""Cycles, trip counts and loops, counted by hand on shortened output of the TPU compiler."""

# The lines of HLO stay as the compiler writes them.
# ruff: noqa: E501

import pytest

from seal_jax.errors import UsageError
from tools.preflight.costs import add_up, walk
from tools.preflight.hlo import parse
from tools.preflight.report import analyse_text

# A scan of 5 steps, each with a scan of 7. Per inner step 32 + 512, per outer step 2898, once 2930.
NESTED = """\
HloModule jit_nested, is_scheduled=true

FileNames
1 "/home/user/train.py"
2 "/venv/lib/python3.11/site-packages/flax/linen/linear.py"

FunctionNames
1 "nested"

FileLocations
1 {file_name_id=1 function_name_id=1 line=14 end_line=14 column=8 end_column=8}
2 {file_name_id=2 function_name_id=1 line=294 end_line=294 column=8 end_column=8}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%fused_computation.1 (param_0: f32[256,256]) -> f32[256,256] {
  %param_0 = f32[256,256]{1,0:T(8,128)S(1)} parameter(0)
  %fusion.9 = f32[256,256]{1,0} fusion(%param_0), kind=kLoop, calls=%fused_computation.2, backend_config={"window_config":{"estimated_cycles":"99999"}}
  ROOT %tanh.1 = f32[256,256]{1,0} tanh(%fusion.9)
}

%fused_computation.2 (param_1: f32[256,256]) -> f32[256,256] {
  ROOT %param_1 = f32[256,256]{1,0} parameter(0)
}

%region_3.3 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%a, %b)
}

%inner_body (wide.param.5: (s32[], f32[256,256], s32[])) -> (s32[], f32[256,256], s32[]) {
  %constant.4 = s32[]{:T(128)} constant(1)
  %wide.param.5 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.111 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=0
  %add.23 = s32[]{:T(128)} add(%get-tuple-element.111, %constant.4), metadata={op_name="jit(nested)/while/body/closed_call/while/body/add" stack_frame_id=1}
  %get-tuple-element.118 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=2
  %get-tuple-element.112 = f32[256,256]{1,0:T(8,128)S(1)} get-tuple-element(%wide.param.5), index=1
  %copy.21 = f32[256,256]{1,0:T(8,128)S(1)} copy(%get-tuple-element.112), backend_config={"window_config":{"estimated_cycles":"32","is_mask":false}}
  %fusion.8 = f32[256,256]{1,0:T(8,128)S(1)} fusion(%copy.21), kind=kOutput, calls=%fused_computation.1, metadata={op_name="jit(nested)/while/body/closed_call/while/body/closed_call/dot_general" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"512"},"debug":"\\n{(colors:2"}
  ROOT %tuple.35 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%add.23, %fusion.8, %get-tuple-element.118)
}

%inner_condition (wide.param.1: (s32[], f32[256,256], s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(7)
  %wide.param.1 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.61 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.6 = pred[]{:T(512)} compare(%get-tuple-element.61, %constant.9), direction=LT
}

%outer_body (wide.param.4: (s32[], f32[256,256], s32[])) -> (s32[], f32[256,256], s32[]) {
  %constant.19 = s32[]{:T(128)} constant(0)
  %constant.5 = s32[]{:T(128)} constant(1)
  %constant.14 = f32[]{:T(128)} constant(0)
  %wide.param.4 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %copy.20 = s32[]{:T(128)} copy(%constant.19)
  %get-tuple-element.127 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=0
  %copy.10 = s32[]{:T(128)S(6)} copy(%get-tuple-element.127)
  %add.20 = s32[]{:T(128)} add(%copy.10, %constant.5)
  %get-tuple-element.128 = f32[256,256]{1,0:T(8,128)S(1)} get-tuple-element(%wide.param.4), index=1
  %get-tuple-element.129 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=2
  %reduce.2 = f32[]{:T(128)} reduce(%get-tuple-element.128, %constant.14), dimensions={0,1}, to_apply=%region_3.3, backend_config={"window_config":{"estimated_cycles":"2898"}}
  %tuple.33 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%copy.20, %get-tuple-element.128, %constant.5)
  %while.26 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) while(%tuple.33), condition=%inner_condition, body=%inner_body, metadata={op_name="jit(nested)/while/body/closed_call/while" stack_frame_id=1}
  %get-tuple-element.136 = f32[256,256]{1,0:T(8,128)S(1)} get-tuple-element(%while.26), index=1
  ROOT %tuple.38 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%add.20, %get-tuple-element.136, %get-tuple-element.129)
}

%outer_condition (wide.param.3: (s32[], f32[256,256], s32[])) -> pred[] {
  %wide.param.3 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.74 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=0
  %get-tuple-element.75 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=2
  ROOT %lt.7 = pred[]{:T(512)} compare(%get-tuple-element.74, %get-tuple-element.75), direction=LT
}

ENTRY %main.6_spmd (param.4: f32[256,256]) -> f32[256,256] {
  %constant.20 = s32[]{:T(128)} constant(0)
  %constant.21 = s32[]{:T(128)} constant(5)
  %param.4 = f32[256,256]{1,0:T(8,128)} parameter(0), sharding={replicated}, metadata={op_name="x[\\'a\\']"}
  %copy.7 = s32[]{:T(128)} copy(%constant.20)
  %convert.4 = f32[256,256]{1,0:T(8,128)S(1)} convert(%param.4), backend_config={"window_config":{"estimated_cycles":"2930"}}
  %sort.1 = f32[256,256]{1,0:T(8,128)S(1)} sort(%convert.4), dimensions={0}, to_apply=%region_3.3
  %tuple.36 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%copy.7, %sort.1, %constant.21)
  %while.25 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) while(%tuple.36), condition=%outer_condition, body=%outer_body, metadata={op_name="jit(nested)/while" stack_frame_id=1}
  ROOT %get-tuple-element.38 = f32[256,256]{1,0:T(8,128)S(1)} get-tuple-element(%while.25), index=1
}
"""

CONDITIONAL = """\
HloModule jit_f

%cheap (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%x.1), backend_config={"window_config":{"estimated_cycles":"10"}}
}

%dear (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  ROOT %copy.2 = f32[8]{0} copy(%x.2), backend_config={"window_config":{"estimated_cycles":"300"}}
}

ENTRY %main (p: s32[], x: f32[8]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %conditional.1 = f32[8]{0} conditional(%p, %x, %x), branch_computations={%cheap, %dear}
}
"""


def test_nested_loops_multiply_and_fusions_count_once():
    cycles = add_up(parse(NESTED))
    assert cycles.total == 2930 + 5 * (2898 + 7 * (32 + 512))
    loops = {loop.name: (loop.trips, loop.runs, loop.cycles) for loop in cycles.loops}
    assert loops == {
        "while.25": (5, 1, 5 * (2898 + 7 * 544)),
        "while.26": (7, 5, 35 * 544),
    }
    assert cycles.unestimated == {"sort": 1}
    assert not cycles.unknown


def test_the_costliest_bring_their_name_and_the_users_own_line():
    first, second, *_ = add_up(parse(NESTED)).costliest
    assert (first.name, first.cycles, first.runs) == ("fusion.8", 35 * 512, 35)
    assert first.op_name.endswith("closed_call/dot_general")
    assert first.source == "/home/user/train.py:14"
    assert (second.name, second.cycles) == ("reduce.2", 5 * 2898)


@pytest.mark.parametrize(
    ("steps", "scan", "serial"),
    [(None, "while.25", ["while.26"]), (5, "while.25", ["while.26"]), (35, "while.26", [])],
)
def test_serial_loops_leave_out_the_step_scan_and_what_is_around_it(steps, scan, serial):
    cycles = add_up(parse(NESTED))
    assert cycles.step_loop(steps).name == scan
    assert [loop.name for loop in cycles.serial_loops(steps)] == serial


def test_without_a_loop_of_that_many_steps_every_loop_is_serial():
    cycles = add_up(parse(NESTED))
    assert cycles.step_loop(6) is None
    assert len(cycles.serial_loops(6)) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("copy(%constant.20)", "copy(%param.9)"),  # start unknown
        (  # the bound changes
            "tuple(%add.20, %get-tuple-element.136, %get-tuple-element.129)",
            "tuple(%add.20, %get-tuple-element.136, %add.20)",
        ),
        ("%add.20 = s32[]{:T(128)} add(", "%add.20 = s32[]{:T(128)} multiply("),
        ("%get-tuple-element.75), direction=LT", "%get-tuple-element.75), direction=GT"),
    ],
)
def test_an_unknown_trip_count_is_said(old, new):
    assert old in NESTED
    report = analyse_text(NESTED.replace(old, new), steps=None)
    assert [loop.name for loop in report.cycles.unknown] == ["while.25"]
    assert report.cycles.total == 2930 + 2898 + 7 * 544
    assert "at least 9,636" in report.as_text()
    assert report.as_dict()["unknown_trip_counts"] == ["while.25"]


def test_the_compilers_own_trip_count_wins():
    known = 'body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}'
    cycles = add_up(parse(NESTED.replace("body=%inner_body", known)))
    assert {loop.name: loop.trips for loop in cycles.loops} == {"while.25": 5, "while.26": 3}


@pytest.mark.parametrize(
    ("start", "bound", "direction", "move", "trips"),
    [
        (0, 5, "LE", "add", 6),
        (9, 2, "GT", "subtract", 7),
        (9, 2, "GE", "subtract", 8),
        (0, 5, "NE", "add", 5),
        (7, 5, "LT", "add", 0),
    ],
)
def test_trip_counts_of_other_directions(start, bound, direction, move, trips):
    text = (
        NESTED.replace(
            "%constant.20 = s32[]{:T(128)} constant(0)", f"%constant.20 = s32[] constant({start})"
        )
        .replace(
            "%constant.21 = s32[]{:T(128)} constant(5)", f"%constant.21 = s32[] constant({bound})"
        )
        .replace(
            "%get-tuple-element.75), direction=LT", f"%get-tuple-element.75), direction={direction}"
        )
        .replace("%add.20 = s32[]{:T(128)} add(", f"%add.20 = s32[]{{:T(128)}} {move}(")
    )
    assert add_up(parse(text)).loops[0].trips == trips


def test_a_conditional_counts_its_costliest_branch():
    cycles = add_up(parse(CONDITIONAL))
    assert (cycles.total, cycles.conditionals) == (300, 1)
    taken = {visit.instruction.name: visit.taken for visit in walk(parse(CONDITIONAL))}
    assert (taken["copy.1"], taken["copy.2"]) == (False, True)


def test_report_per_step_and_text():
    report = analyse_text(NESTED, axes={"seed": 2, "data": 4}, steps=5)
    assert report.cycles_per_step == report.cycles.total / 5
    text = report.as_text()
    for part in ("5 steps a call", "while.26", "Collectives: none", "sort 1x", "train.py:14"):
        assert part in text
    assert report.fits is None
    assert report.seconds is None


def test_steps_must_be_positive():
    from tools.preflight import analyse

    with pytest.raises(UsageError, match=r"^steps=0 must be positive, or None if unknown$"):
        analyse(None, steps=0)
