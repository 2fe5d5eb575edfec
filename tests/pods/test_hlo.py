"""What chips send each other, read from programs' texts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mathv2_jax import sharding
from mathv2_jax.pods import hlo

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %a)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %gather = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}, metadata={op_name="a"}
  %start = (bf16[4,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
  ROOT %both = (s32[], bf16[8,4]{1,0}) tuple(%x, %done)
}

%condition (q: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %q = (s32[], bf16[8,4]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> f32[2,3] {
  %x = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}) while(%x), condition=%condition, body=%body
  %pair = (f32[2,3]{1,0}, f32[5]{0}) all-reduce(%x, %x), to_apply=%add
  ROOT %out = f32[2,3]{1,0} ragged-all-to-all(%pair), replica_groups={{0,1}}
}
"""


def test_a_loops_collectives_count_as_often_as_it_turns():
    found = hlo.collectives(TEXT)
    assert found.bytes_by_kind == {
        "all-gather": 5 * (64 + 64),
        "all-reduce": 24 + 20,
        "ragged-all-to-all": 24,
    }
    assert found.unknown_loops == ()


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    found = hlo.collectives(TEXT.replace("direction=LT", "direction=NE"))
    assert found.unknown_loops == ("loop",) and found.bytes_by_kind["all-gather"] == 128


def test_a_loop_whose_condition_tells_nothing_is_as_long_as_is_known_of_its_scopes():
    text = TEXT.replace("direction=LT", "direction=NE").replace(
        "body=%body", 'body=%body, metadata={op_name="jit(decode)/while" stack_frame_id=3}'
    )
    asked = []

    def length(scopes):
        asked.append(scopes)
        return 2.5

    found = hlo.collectives(text, length)
    assert found.bytes_by_kind["all-gather"] == 2.5 * 128 and found.unknown_loops == ()
    assert asked == ["jit(decode)/while"]
    assert hlo.collectives(TEXT, lambda scopes: 9.0) == hlo.collectives(TEXT)  # it says so itself
    assert hlo.collectives(text, lambda scopes: None).unknown_loops == ("loop",)


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("HloModule nothing")


def test_a_program_of_this_platform_is_read():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=8))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def sums(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: y + jnp.sum(x * y, axis=0, keepdims=True), x)

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 10), jnp.float32, sharding=rows)
        text = jax.jit(sums, out_shardings=rows).lower(x).compile().as_text()
    assert hlo.collectives(text).bytes_by_kind == {"all-reduce": 3 * 10 * 4}


def test_a_collective_that_is_spread_over_fusions_counts_once():
    part = """%part{n} (x: bf16[8,4]) -> bf16[8,4] {{
  %x = bf16[8,4]{{1,0}} parameter(0)
  ROOT %gather{n} = bf16[8,4]{{1,0}} all-gather(%x), channel_id={channel}, dimensions={{0}}
}}

"""
    call = "  %on{n} = bf16[8,4]{{1,0}} fusion(%x), kind=kCustom, calls=%part{n}\n"
    entry = "ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {\n  %x = bf16[8,4]{1,0} parameter(0)\n"

    def text(*channels):
        parts = [part.format(n=n, channel=c) for n, c in enumerate(channels)]
        return "".join([*parts, entry, *(call.format(n=n) for n in range(len(channels))), "}\n"])

    assert hlo.collectives(text(7)).bytes_by_kind == {"all-gather": 64}
    assert hlo.collectives(text(7, 7, 7)).bytes_by_kind == {"all-gather": 64}
    assert hlo.collectives(text(7, 8, 7)).bytes_by_kind == {"all-gather": 128}
