"""Tests the time of small programs against a recount by hand."""

import dataclasses

import numpy as np
import pytest

from peft_jax.cost import estimate_program, find_chip, network_of, read_program
from peft_jax.cost.timeline import ELEMENTWISE, HOP, LINKS, MEMORY, PRODUCTS

V5P = find_chip("TPU v5p") or find_chip("TPU v5")
assert V5P is not None
RING = "replica_groups={{0,1,2,3,4,5,6,7}}, x"


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]


NETWORK = network_of([Device((0, 0, n)) for n in range(8)], "v6e", 1, 1)
"""Eight chips in a line: not closed, so they receive at half of the rate."""


def estimate(body: str, *, computations: str = "", chip=V5P):
    text = f"""HloModule m
{computations}
ENTRY %main (a: bf16[4096,4096], b: bf16[4096,4096]) -> bf16[4096,4096] {{
  %a = bf16[4096,4096]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[4096,4096]{{1,0:T(8,128)(2,1)}} parameter(1)
{body}
}}
"""
    return estimate_program(read_program(text), chip=chip, network=NETWORK)


SIZE = 4096 * 4096 * 2
PRODUCT = 2 * 4096**3 / (459e12 * PRODUCTS)
GATHER = 7 / 8 * SIZE / (180e9 * LINKS / 2) + 8 * HOP
DOT = "bf16[4096,4096]{1,0} convolution(%a, %b), dim_labels=bf_io->bf"
START = (
    f"(bf16[512,4096]{{1,0}}, bf16[4096,4096]{{1,0}}) all-gather-start(%s), channel_id=1, {RING}"
)
SHARD = "  %s = bf16[512,4096]{1,0} slice(%a), slice={[0:512], [0:4096]}\n"
SLICED = 2 * SIZE / 8 / (2765e9 * MEMORY)


def test_product_takes_its_operations():
    found = estimate(f"  ROOT %c = {DOT}")
    assert found.flops == 2 * 4096**3
    assert found.total == pytest.approx(PRODUCT)
    assert found.by_kind()["products"] == pytest.approx(PRODUCT)


def test_elementwise_operation_takes_its_memory():
    found = estimate("  ROOT %c = bf16[4096,4096]{1,0} add(%a, %b)")
    assert found.total == pytest.approx(3 * SIZE / (2765e9 * MEMORY))
    assert found.by_kind()["memory"] == found.total


def test_array_in_on_chip_memory_costs_its_arithmetic_only():
    """Assumes half of the 14.3e12 operations/s that the vector units take."""
    body = """  %x = bf16[4096,4096]{1,0:S(1)} bitcast(%a)
  ROOT %c = bf16[4096,4096]{1,0:S(1)} exponential(%x)"""
    found = estimate(body)
    rate = 8 * 128 * 4 * 2 * 1.75e9 * ELEMENTWISE
    assert found.total == pytest.approx(4 * 4096**2 / rate)
    assert found.by_kind()["elementwise"] == found.total


def test_synchronous_gather_is_added():
    body = SHARD + f"  %g = bf16[4096,4096]{{1,0}} all-gather(%s), channel_id=1, {RING}\n"
    found = estimate(body + f"  ROOT %c = {DOT}")
    assert found.total == pytest.approx(SLICED + GATHER + PRODUCT)
    assert found.unhidden() == pytest.approx(GATHER)
    assert found.hidden() == 0
    (transfer,) = (one for one in found.transfers if one.kind == "links")
    assert not transfer.asynchronous


@pytest.mark.parametrize("products", [0, 1, 2])
def test_asynchronous_gather_is_hidden_as_far_as_the_products_between_last(products):
    """One product hides nearly all of the gather, two hide it."""
    lines = [SHARD, f"  %t = {START}\n"]
    lines += [f"  %c{n} = {DOT}\n" for n in range(products)]
    lines += ["  ROOT %g = bf16[4096,4096]{1,0} all-gather-done(%t)"]
    found = estimate("".join(lines))
    assert PRODUCT < GATHER < 2 * PRODUCT
    exposed = max(GATHER - products * PRODUCT, 0)
    assert found.unhidden() == pytest.approx(exposed)
    assert found.hidden() == pytest.approx(GATHER - exposed)
    assert found.total == pytest.approx(SLICED + products * PRODUCT + exposed)


def test_two_transfers_on_the_same_links_take_turns():
    body = f"""{SHARD}  %t = {START}
  %u = {START}
  %c = {DOT}
  %g = bf16[4096,4096]{{1,0}} all-gather-done(%t)
  ROOT %h = bf16[4096,4096]{{1,0}} all-gather-done(%u)"""
    assert estimate(body).total == pytest.approx(SLICED + 2 * GATHER)


def test_permutes_in_opposite_directions_run_together():
    def start(name, pairs):
        return (
            f"  %{name} = (bf16[4096,4096]{{1,0}}, bf16[4096,4096]{{1,0}}, u32[], u32[])"
            f" collective-permute-start(%a), channel_id=1, source_target_pairs={{{pairs}}}, x\n"
        )

    up = ",".join(f"{{{n},{n + 1}}}" for n in range(7))
    down = ",".join(f"{{{n + 1},{n}}}" for n in range(7))
    done = "  %{} = bf16[4096,4096]{{1,0}} collective-permute-done(%{})\n"
    one = SIZE / (90e9 * LINKS) + HOP
    same = start("t", up) + start("u", up) + done.format("d", "t") + done.format("e", "u")
    both = start("t", up) + start("u", down) + done.format("d", "t") + done.format("e", "u")
    end = f"  ROOT %c = {DOT}"
    assert estimate(same + end).total == pytest.approx(2 * one + PRODUCT)
    assert estimate(both + end).total == pytest.approx(one + PRODUCT)


OFFLOADED = f"""
%offloaded (s: bf16[512,4096]) -> bf16[4096,4096] {{
  %p = bf16[512,4096]{{1,0}} parameter(0)
  ROOT %g = bf16[4096,4096]{{1,0}} all-gather(%p), channel_id=1, {RING}
}}
"""


def test_collective_on_the_sparse_core_runs_from_its_update():
    body = f"""{SHARD}  %t = ((bf16[512,4096]), bf16[4096,4096]) async-start(%s), calls=%offloaded
  %c = {DOT}
  %u = ((bf16[512,4096]), bf16[4096,4096]) async-update(%t)
  %d = {DOT}
  ROOT %g = bf16[4096,4096]{{1,0}} async-done(%u)"""
    found = estimate(body, computations=OFFLOADED)
    assert found.total == pytest.approx(SLICED + PRODUCT + GATHER)
    assert found.hidden() == pytest.approx(PRODUCT)
    assert [one.kind for one in found.collectives] == ["all-gather"]


LOOP = """
%condition (c: (u32[], bf16[4096,4096])) -> pred[] {
  %c = (u32[], bf16[4096,4096]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  %n = u32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (u32[], bf16[4096,4096])) -> (u32[], bf16[4096,4096]) {
  %p = (u32[], bf16[4096,4096]) parameter(0)
  %j = u32[] get-tuple-element(%p), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%j, %two)
  %v = bf16[4096,4096]{1,0} get-tuple-element(%p), index=1
  %w = bf16[4096,4096]{1,0} convolution(%v, %v), dim_labels=bf_io->bf, NAMED
  ROOT %z = (u32[], bf16[4096,4096]) tuple(%next, %w)
}
"""
LOOP = LOOP.replace("NAMED", 'metadata={op_name="jit(f)/mlp/dot"}')
WHILE = """  %zero = u32[] constant(0)
  %w0 = (u32[], bf16[4096,4096]) tuple(%zero, %a)
  %loop = (u32[], bf16[4096,4096]) while(%w0), condition=%condition, body=%body
"""


def test_windowed_loop_counts_by_its_steps_and_hides_transfers():
    body = f"""{SHARD}  %t = {START}
{WHILE}  ROOT %g = bf16[4096,4096]{{1,0}} all-gather-done(%t)"""
    found = estimate(body, computations=LOOP)
    assert found.flops == 4 * 2 * 4096**3
    assert found.by_part()["mlp"]["products"] == pytest.approx(4 * PRODUCT)
    assert found.hidden() == pytest.approx(min(4 * PRODUCT, GATHER), rel=1e-3)


FUSION = """
%fused (p: bf16[16,4096,4096], i: s32[], u: bf16[4096,4096]) -> bf16[16,4096,4096] {
  %p = bf16[16,4096,4096]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = bf16[4096,4096]{1,0} parameter(2)
  %o = s32[] constant(0)
  %x = bf16[1,4096,4096]{2,1,0} dynamic-slice(%p, %i, %o, %o), dynamic_slice_sizes={1,4096,4096}
  %y = bf16[4096,4096]{1,0} bitcast(%x)
  %z = bf16[4096,4096]{1,0} add(%y, %u)
  %w = bf16[1,4096,4096]{2,1,0} bitcast(%z)
  ROOT %r = bf16[16,4096,4096]{2,1,0} dynamic-update-slice(%p, %w, %i, %o, %o)
}
"""


def test_fusion_reads_slices_and_writes_updates():
    """Of 16 layers, it reads one, and another array, and writes one."""
    body = """  %k = bf16[16,4096,4096]{2,1,0} parameter(2)
  %n = s32[] constant(3)
  ROOT %f = bf16[16,4096,4096]{2,1,0} fusion(%k, %n, %a), kind=kLoop, calls=%fused"""
    found = estimate(body, computations=FUSION)
    assert found.total == pytest.approx(3 * SIZE / (2765e9 * MEMORY))


def test_kernel_takes_the_cost_that_it_states():
    cost = '"cost_estimate":{"bytes_accessed":"1000000","flops":"2000000000","transcendentals":"0"}'
    body = (
        '  ROOT %k = bf16[4096,4096]{1,0} custom-call(%a), custom_call_target="tpu_custom_call",'
        ' metadata={op_name="jit(f)/rotation/pallas_call"},'
        f' backend_config={{"custom_call_config":{{{cost}}}}}'
    )
    found = estimate(body)
    assert found.flops == 2e9
    assert found.by_part()["rotation"]["products"] == pytest.approx(2e9 / (459e12 * PRODUCTS))


def test_transfer_to_the_host_takes_its_link():
    body = f"""  %t = (bf16[4096,4096]{{1,0:S(5)}}, bf16[4096,4096]{{1,0}}, u32[]) copy-start(%a)
  %c = {DOT}
  %d = bf16[4096,4096]{{1,0:S(5)}} copy-done(%t)
  ROOT %e = bf16[4096,4096]{{1,0}} bitcast(%c)"""
    found = estimate(body)
    taken = SIZE / (16e9 * LINKS)
    assert found.by_kind()["host"] == pytest.approx(taken - PRODUCT)
    assert found.hidden() == pytest.approx(PRODUCT)


def test_slowest_branch_counts():
    branches = """
%slow (p: bf16[4096,4096]) -> bf16[4096,4096] {
  %p = bf16[4096,4096]{1,0} parameter(0)
  ROOT %c = bf16[4096,4096]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%fast (q: bf16[4096,4096]) -> bf16[4096,4096] {
  ROOT %q = bf16[4096,4096]{1,0} parameter(0)
}
"""
    body = """  %which = pred[] constant(true)
  ROOT %c = bf16[4096,4096]{1,0} conditional(%which, %a, %a), branch_computations={%slow, %fast}"""
    assert estimate(body, computations=branches).total == pytest.approx(PRODUCT)


def test_kinds_and_parts_add_up():
    body = SHARD + f"  %g = bf16[4096,4096]{{1,0}} all-gather(%s), channel_id=1, {RING}\n" + WHILE
    found = estimate(body + "  ROOT %c = bf16[4096,4096]{1,0} add(%a, %b)", computations=LOOP)
    np.testing.assert_allclose(sum(found.by_kind().values()), found.total)
    parts = [sum(kinds.values()) for kinds in found.by_part().values()]
    np.testing.assert_allclose(sum(parts), found.total)
    assert parts == sorted(parts, reverse=True)


def test_unknown_chip_has_operations_and_bytes_but_no_time():
    found = estimate(f"  ROOT %c = {DOT}", chip=None)
    assert found.flops == 2 * 4096**3
    assert found.total == 0


RETILED = """
%retile (x: s8[8,512,4096]) -> s8[8,512,4096] {
  %x = s8[8,512,4096]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %k = s8[8,512,4096]{2,1,0:T(8,128)(4,1)} copy(%x)
}

%sliced (x: s8[8,512,4096], n: s32[]) -> s8[1,512,4096] {
  %x = s8[8,512,4096]{2,1,0:T(32,128)(4,1)} parameter(0)
  %f = s8[8,512,4096]{2,1,0:T(8,128)(4,1)} fusion(%x), kind=kLoop, calls=%retile
  %n = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = s8[1,512,4096]{2,1,0:T(8,128)(4,1)} dynamic-slice(%f, %n, %z, %z)
  ROOT %c = s8[1,512,4096]{2,1,0:T(32,128)(4,1)} copy(%d)
}
"""


def test_a_fusion_reads_a_slice_of_an_operand_that_it_tiles_anew():
    body = """  %x = s8[8,512,4096]{2,1,0:T(32,128)(4,1)} bitcast(%a)
  %n = s32[] constant(3)
  ROOT %c = s8[1,512,4096]{2,1,0:T(32,128)(4,1)} fusion(%x, %n), kind=kLoop, calls=%sliced"""
    found = estimate(body, computations=RETILED)
    assert found.total == pytest.approx(2 * 512 * 4096 / (2765e9 * MEMORY))
