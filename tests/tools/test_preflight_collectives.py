"""Collectives, counted by hand on shortened output of the TPU compiler."""

# The lines of HLO stay as the compiler writes them.
# ruff: noqa: E501

import pytest

from tools.preflight.costs import axis_of, cause, collect, walk
from tools.preflight.hlo import Instruction, parse

AXES = {"seed": 2, "data": 4}

PROGRAM = """\
HloModule jit_epoch, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%scattered (param_0: f32[64,256]) -> f32[64,256] {
  %param_0 = f32[64,256]{1,0} parameter(0)
  ROOT %all-reduce.7 = f32[64,256]{1,0} all-reduce(%param_0), channel_id=7, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(epoch)/shard_map/metrics/psum"}
}

%scattered_rest (param_2: f32[64,256]) -> f32[64,256] {
  %param_2 = f32[64,256]{1,0} parameter(0)
  ROOT %all-reduce.9 = f32[64,256]{1,0} all-reduce(%param_2), channel_id=7, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(epoch)/shard_map/metrics/psum"}
}

%async_computation (param_1: f32[4,8]) -> f32[16,8] {
  %param_1 = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.8 = f32[16,8]{1,0} all-gather(%param_1), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(epoch)/shard_map/while/body/all_gather"}
}

%body (p: (s32[], f32[16], f32[3,3,3,16])) -> (s32[], f32[16], f32[3,3,3,16]) {
  %p = (s32[]{:T(128)}, f32[16]{0:T(128)}, f32[3,3,3,16]{3,2,1,0:T(4,128)}) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %one)
  %g = f32[16]{0:T(128)} get-tuple-element(%p), index=1
  %h = f32[3,3,3,16]{3,2,1,0:T(4,128)} get-tuple-element(%p), index=2
  %all-reduce.98 = (f32[16]{0:T(128)S(1)}, /*index=1*/f32[3,3,3,16]{3,2,1,0:T(4,128)S(1)}) all-reduce(%g, /*index=1*/%h), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(epoch)/shard_map/while/body/closed_call/gradient_reduce/psum" stack_frame_id=97}, backend_config={"barrier_config":{"barrier_type":"CUSTOM","id":"0"},"debug":"\\nStrategyRing{colors:1 cores:{4}(1"}
  %all-reduce.99 = bf16[32]{0:T(128)S(1)} all-reduce(%g), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(epoch)/shard_map/while/body/closed_call/transpose(jvp(Net))/batch_norm/bn1/psum"}
  %all-reduce.97 = bf16[32]{0:T(128)S(1)} all-reduce(%g), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(epoch)/shard_map/while/body/closed_call/jvp(Net)/batch_norm/bn2/psum"}
  %shard = f32[4,8]{1,0} constant({...})
  %all-gather-start.1 = ((f32[4,8]{1,0}), f32[16,8]{1,0}) async-start(%shard), calls=%async_computation
  %all-gather-done.1 = f32[16,8]{1,0} async-done(%all-gather-start.1)
  %g.1 = f32[16]{0} get-tuple-element(%all-reduce.98), index=0
  %h.1 = f32[3,3,3,16]{3,2,1,0} get-tuple-element(%all-reduce.98), index=1
  ROOT %out = (s32[], f32[16]{0}, f32[3,3,3,16]{3,2,1,0}) tuple(%next, %g.1, %h.1)
}

%condition (q: (s32[], f32[16], f32[3,3,3,16])) -> pred[] {
  %q = (s32[], f32[16]{0}, f32[3,3,3,16]{3,2,1,0}) parameter(0)
  %twenty = s32[] constant(20)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%j, %twenty), direction=LT
}

ENTRY %main (x: f32[64,256], g: f32[16], h: f32[3,3,3,16]) -> f32[64,256] {
  %x = f32[64,256]{1,0} parameter(0)
  %g.2 = f32[16]{0} parameter(1)
  %h.2 = f32[3,3,3,16]{3,2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16]{0}, f32[3,3,3,16]{3,2,1,0}) tuple(%zero, %g.2, %h.2)
  %while.1 = (s32[], f32[16]{0}, f32[3,3,3,16]{3,2,1,0}) while(%init), condition=%condition, body=%body
  %collective-permute-start = (f32[64,256]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, metadata={op_name="jit(epoch)/shard_map/ppermute"}
  %collective-permute-done = f32[64,256]{1,0:T(8,128)S(1)} collective-permute-done(%collective-permute-start), metadata={op_name="jit(epoch)/shard_map/ppermute"}
  %reduce-scatter.1 = f32[16,256]{1,0} reduce-scatter(%x), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%add, metadata={op_name="jit(epoch)/shard_map/reduce_scatter"}
  %fusion.2 = f32[64,256]{1,0} fusion(%x), kind=kCustom, calls=%scattered_rest
  ROOT %fusion.1 = f32[64,256]{1,0} fusion(%x), kind=kCustom, calls=%scattered
}
"""


def test_collectives_by_hand():
    found = collect(walk(parse(PROGRAM)), AXES)
    table = {
        (each.operation, each.cause): (
            each.axis,
            each.in_loop,
            each.count,
            each.runs,
            each.arrays,
            each.bytes,
        )
        for each in found
    }
    block = 64 * 256 * 4
    assert table == {
        ("all-reduce", "gradient_reduce"): ("data", True, 1, 20, 2, 4 * (16 + 432)),
        ("all-reduce", "batch_norm"): ("data", True, 2, 40, 2, 2 * 32 * 2),
        ("all-gather", "all_gather"): ("data", True, 1, 20, 1, 16 * 8 * 4),
        ("collective-permute", "ppermute"): ("data", False, 1, 1, 1, block),
        ("reduce-scatter", "reduce_scatter"): ("data", False, 1, 1, 1, block),
        ("all-reduce", "metrics"): ("data", False, 1, 1, 1, block),
    }


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "data"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "seed"),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", "both"),
        ("replica_groups={}", "both"),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", "none"),
        ("replica_groups=[2,4]<=[8]", "data"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "seed"),
        ("replica_groups=[1,8]<=[8]", "both"),
        ("replica_groups=mesh['seed'=2,'data'=4] {'data'}", "data"),
        ("replica_groups=mesh['seed'=2,'data'=4] {'seed'}", "seed"),
        ("replica_groups=mesh['seed'=2,'data'=4] {'seed','data'}", "both"),
        ("dimensions={0}", "unknown"),
    ],
)
def test_axis(groups, axis):
    made = Instruction("r", "f32[]", "all-reduce", "%x", f", {groups}, to_apply=%add", "", "", None)
    assert axis_of(made, AXES) == axis
    assert axis_of(made, None) == "unknown"


def test_an_axis_of_length_one_never_varies():
    made = Instruction("r", "f32[]", "all-reduce", "%x", ", replica_groups={{0,1,2}}", "", "", None)
    assert axis_of(made, {"seed": 1, "data": 3}) == "data"


def test_cause_takes_the_innermost_scope_also_under_differentiation():
    scopes = frozenset(["batch_norm", "gradient_reduce"])
    assert cause("jit(f)/gradient_reduce/transpose(jvp(batch_norm))/psum", scopes) == "batch_norm"
    assert cause("jit(f)/jit(main)/while/body/psum", scopes) == "psum"
    assert cause("", scopes) == "unnamed"
