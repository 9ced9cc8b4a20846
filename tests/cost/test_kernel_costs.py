"""Tests the work of Pallas kernels against their products, counted by hand."""

import pytest

from peft_jax.cost.hlo import read_program
from peft_jax.cost.kernels import count_kernel

METADATA = r"""{kernel_metadata={
"xprof_metadata":"{\"block_kv\": 512, \"use_fused_bwd_kernel\": FUSED}"
}}"""


def kernel(
    name: str,
    *operands: str,
    cost: str = "",
    fused: str = "false",
    tile: int = 128,
    op_name: str = "",
):
    lines = [f"  %o{n} = {shape} parameter({n})" for n, shape in enumerate(operands)]
    given = ", ".join(f"%o{n}" for n in range(len(operands)))
    text = f"""ENTRY %main (x: f32[]) -> bf16[8] {{
{chr(10).join(lines)}
  ROOT %{name}.1 = {operands[-1]} custom-call({given}), custom_call_target="tpu_custom_call", \
frontend_attributes={METADATA.replace("FUSED", fused)}, metadata={{op_name="{op_name}"}}, \
backend_config={{{cost}}}
}}
"""
    main = read_program(text).computations["main"]
    arrays = tuple(main.instructions[f"o{n}"].result[0] for n in range(len(operands)))
    found = count_kernel(main.root, arrays, tile=tile)
    assert found is not None
    return found


MASK = ("s8[1,8,8]{2,1,0}", "s8[1,8,8]{2,1,0}")
QUERY, KEY = "bf16[4,64,4096,128]{3,2,1,0}", "bf16[4,8,4096,128]{3,2,1,0}"


@pytest.mark.parametrize(
    ("name", "products", "fused"),
    [
        ("splash_mha_fwd_residuals", 2, "false"),
        ("splash_mha_dq_no_residuals", 3, "false"),
        ("splash_mha_dkv_no_residuals", 4, "false"),
        ("splash_mha_dkv_no_residuals", 5, "true"),
    ],
)
def test_splash_attention_counts_half_of_all_pairs_and_the_diagonal(name, products, fused):
    found = kernel(name, *MASK, QUERY, KEY, KEY, fused=fused)
    pairs = 4096 * (4096 + 512) / 2
    assert found.flops == products * 2 * 4 * 64 * pairs * 128
    assert found.computed == found.flops
    assert found.traffic.transcendental == 4 * 64 * pairs


def test_wider_matrix_units_are_half_empty_for_128_features():
    found = kernel("splash_mha_fwd_residuals", *MASK, QUERY, KEY, KEY, tile=256)
    assert found.computed == 2 * found.flops


@pytest.mark.parametrize(("block", "waste"), [(128, 1), (64, 4), (32, 16)])
def test_rotations_by_small_blocks_leave_the_matrix_unit_empty(block, waste):
    flops = 2 * 16384 * 4096 * block
    cost = f'"cost_estimate":{{"bytes_accessed":"1000","flops":"{flops}","transcendentals":"0"}}'
    blocks = f"bf16[{4096 // block},{block},{block}]{{2,1,0}}"
    found = kernel("block_rotation", "bf16[1,16384,4096]{2,1,0}", blocks, cost=cost)
    assert found.flops == flops
    assert found.computed == waste * flops
    assert found.traffic.bytes == 1000


@pytest.mark.parametrize(("mark", "share"), [("one_of_8_rows/", 1 / 8), ("", 1.0)])
def test_ragged_products_count_the_mean_number_of_rows(mark, share):
    """A kernel of 4096 rows and 16 matrices of 512 x 1024, in bfloat16."""
    flops, rows, matrices = 2 * 4096 * 512 * 1024, 2 * 4096 * (512 + 1024), 2 * 16 * 512 * 1024
    cost = f'"cost_estimate":{{"bytes_accessed":"{rows + matrices}","flops":"{flops}"}}'
    found = kernel(
        "ragged-dot-none",
        "bf16[4096,512]{1,0}",
        "bf16[16,512,1024]{2,1,0}",
        "bf16[4096,1024]{1,0}",
        cost=cost,
        op_name=f"jit(step)/mlp/{mark}ragged_dot_general/ragged-dot-none",
    )
    assert found.flops == found.computed == share * flops
    assert found.traffic.bytes == matrices + share * rows
