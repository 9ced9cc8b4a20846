"""Tests collectives read from compiled programs against what the programs must send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from peft_jax.cost import estimate_program, network_of, read_program
from peft_jax.cost.collectives import _groups

MIB = 2**20


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def collectives_of_text(text, *, devices=8, slices=1):
    network = network_of([object()] * devices, "cpu", 1, slices)
    return estimate_program(read_program(text), chip=None, network=network).collectives


def collectives_of(function, mesh, spec, out, shape, *, slices=1):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
    text = jax.jit(mapped).lower(x).compile().as_text()
    return collectives_of_text(text, slices=slices)


GATHER = lambda x: jax.lax.all_gather(x, "inner", tiled=True)  # noqa: E731
REDUCE = lambda x: jax.lax.psum(x, "inner")  # noqa: E731
SCATTER = lambda x: jax.lax.psum_scatter(x, "inner", tiled=True)  # noqa: E731


@pytest.mark.parametrize(
    ("function", "spec", "out", "kind", "share"),
    [
        (GATHER, P("inner"), P(), "all-gather", 3 / 4),
        (REDUCE, P(), P(), "all-reduce", 2 * 3 / 4),
        (SCATTER, P(), P("inner"), "reduce-scatter", 3 / 4),
    ],
    ids=["gather", "reduce", "scatter"],
)
def test_received_bytes_of_a_collective(mesh, function, spec, out, kind, share):
    """The array has one MiB, and each group four devices."""
    (one,) = collectives_of(function, mesh, spec, out, (512, 512))
    assert (one.kind, one.group, one.times) == (kind, 4, 1)
    assert one.bytes == pytest.approx(share * MIB)
    assert not one.between_slices


def test_collective_in_a_loop_counts_once_per_iteration(mesh):
    def function(x):
        def body(x, _):
            return jnp.sin(jax.lax.psum(x, "inner")), None

        return jax.lax.scan(body, x, None, length=11)[0]

    found = collectives_of(function, mesh, P(), P(), (512, 512))
    assert sum(one.total for one in found) == pytest.approx(11 * 1.5 * MIB)


def test_collectives_of_one_shard_map_count_each(mesh):
    """They have the same channel, but each sends its own array."""

    def function(x):
        first = jax.lax.all_gather(x, "inner", tiled=True)
        second = jax.lax.all_gather(jnp.sin(x), "inner", tiled=True)
        return first @ second.T

    found = collectives_of(function, mesh, P("inner"), P(), (512, 512))
    assert [one.kind for one in found] == ["all-gather"] * 2
    assert sum(one.total for one in found) == pytest.approx(2 * 0.75 * MIB)


@pytest.mark.parametrize(("axis", "crosses"), [("inner", False), ("outer", True)])
def test_collectives_between_slices_are_recognized(mesh, axis, crosses):
    found = collectives_of(lambda x: jax.lax.psum(x, axis), mesh, P(), P(), (512, 512), slices=2)
    assert {one.between_slices for one in found} == {crosses}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_groups_are_read_in_every_notation(text, groups):
    found = _groups(text)
    assert sorted(map(sorted, found.tolist())) == groups


# Part of a TPU program: one collective spread over three fusions in a loop, with one channel.
SPREAD = """HloModule m

%start (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], x
}

%done (q: bf16[4,8]) -> bf16[8,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %h = bf16[8,8]{1,0:T(8,128)} all-gather(%q), channel_id=7, replica_groups=[2,2]<=[4], x
}

%all-reduce-scatter.1 (r: f32[8,8]) -> f32[4,8] {
  %r = f32[8,8]{1,0} parameter(0)
  %s = f32[8,8]{1,0} all-reduce(%r), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = f32[4,8]{1,0} dynamic-slice(%s), dynamic_slice_sizes={4,8}
}

%condition (c: (s32[], bf16[4,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  %c = (s32[]{:T(128)}, bf16[4,8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={x}
}

%body (b: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %b = (s32[], bf16[4,8]) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  %v = bf16[4,8]{1,0} get-tuple-element(%b), index=1
  %f1 = bf16[8,8]{1,0} fusion(%v), kind=kCustom, calls=%start
  %f2 = bf16[8,8]{1,0} fusion(%f1), kind=kCustom, calls=%done
  %f3 = f32[4,8]{1,0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %z = (s32[], bf16[4,8]) tuple(%next, %f3)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %w0 = (s32[], bf16[4,8]{1,0}) tuple(%zero, %x)
  %w = (s32[], bf16[4,8]{1,0}) while(%w0), condition=%condition, body=%body, metadata={x}
  ROOT %y = bf16[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collective_spread_over_fusions_counts_once():
    gather, scatter = collectives_of_text(SPREAD, devices=4)
    assert (gather.kind, gather.times, gather.bytes) == ("all-gather", 28, 64)
    assert (scatter.kind, scatter.times, scatter.bytes) == ("reduce-scatter", 28, 128)


def test_text_without_hlo_is_rejected():
    with pytest.raises(ValueError, match="HLO"):
        collectives_of_text("hello")


def test_asynchronous_collective_counts_only_its_result():
    text = """ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}, x
  ROOT %d = f32[8]{0} all-gather-done(%s)
}
"""
    (one,) = collectives_of_text(text, devices=2)
    np.testing.assert_allclose(one.bytes, 8 * 4 / 2)
