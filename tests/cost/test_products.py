"""Tests products read from HLO against their shapes, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from peft_jax.cost import estimate_program, network_of, read_program
from peft_jax.cost.products import Product, read_product


def product_of(left: str, right: str, line: str) -> Product:
    text = (
        f"ENTRY %main (l: {left}, r: {right}) -> f32[] {{\n  %l = {left} parameter(0)\n"
        f"  %r = {right} parameter(1)\n  ROOT {line}\n}}\n"
    )
    main = read_program(text).computations["main"]
    found = read_product(
        main.root, main.instructions["l"].result[0], main.instructions["r"].result[0]
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("left", "right", "line", "expected"),
    [
        pytest.param(
            "bf16[4096,2048]",
            "bf16[2048,512]",
            "%c = bf16[4096,512] convolution(%l, %r), dim_labels=bf_io->bf",
            (1, 4096, 512, 2048),
            id="plain",
        ),
        pytest.param(
            "bf16[4,512,16,128]",
            "bf16[4,512,128,1]",
            "%c = f32[4,512,16,512] convolution(%l, %r), window={size=4x1 stride=3x1"
            " lhs_dilate=4x1}, dim_labels=0b1f_0oi1->0b1f",
            (4, 512 * 16, 512, 128),
            id="batched",
        ),
        pytest.param(
            "bf16[4,512,16,128]",
            "bf16[4,512,16,512]",
            "%c = f32[4,128,512,1] convolution(%l, %r), window={size=4x16 stride=3x1"
            " lhs_dilate=4x1}, dim_labels=0f1b_0i1o->0bf1",
            (4, 128, 512, 512 * 16),
            id="two summed axes",
        ),
        pytest.param(
            "bf16[4,512,128,1]",
            "bf16[4,512,16,512]",
            "%c = f32[4,128,512,16] convolution(%l, %r), window={size=4x16 stride=3x1"
            " pad=0_0x15_15 lhs_dilate=4x1 rhs_reversal=0x1}, dim_labels=0fb1_0o1i->0bf1",
            (4, 128, 512 * 16, 512),
            id="another axis of the kernel",
        ),
        pytest.param(
            "bf16[8,64,32]",
            "bf16[8,32,16]",
            "%c = f32[8,64,16] dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2},"
            " rhs_batch_dims={0}, rhs_contracting_dims={1}",
            (8, 64, 16, 32),
            id="dot",
        ),
        pytest.param(
            "bf16[8,64,32]",
            "bf16[8,32,16]",
            '%c = (f32[8,64,16], s8[4]) custom-call(%l, %r), custom_call_target="__cublas$gemm",'
            ' backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}}}',
            (8, 64, 16, 32),
            id="cuBLAS",
        ),
    ],
)
def test_products_of_compiled_programs(left, right, line, expected):
    found = product_of(left, right, line)
    assert (found.groups, found.rows, found.columns, found.summed) == expected


def test_precision_takes_several_passes():
    line = "%c = f32[256,256] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    plain = product_of("f32[256,256]", "f32[256,256]", line)
    highest = product_of(
        "f32[256,256]", "f32[256,256]", line + ", operand_precision={highest,highest}"
    )
    assert highest.flops == plain.flops
    assert highest.computed(128) == 6 * plain.computed(128)


def test_products_of_8_bits_are_recognized():
    line = "%c = s32[256,256] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert product_of("s8[256,256]", "s8[256,256]", line).narrow
    assert not product_of("bf16[256,256]", "s8[256,256]", line).narrow


@pytest.mark.parametrize(
    ("product", "waste"),
    [
        (Product(groups=1, rows=4096, columns=4096, summed=4096), 1),
        (Product(groups=1, rows=4096, columns=16, summed=4096), 8),
        (Product(groups=1, rows=4096, columns=4096, summed=16), 8),
        (Product(groups=128, rows=4096, columns=32, summed=32), 16),
        (Product(groups=128, rows=32, columns=32, summed=32), 64),
    ],
)
def test_small_products_leave_the_matrix_unit_empty(product, waste):
    """Of a unit of 128 x 128: r of 16 uses an eighth; blocks of 32 a quarter of both axes."""
    assert product.computed(128) == waste * product.flops


def test_flops_of_a_program_are_those_of_its_products():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(function).lower(jnp.ones((32, 64)), jnp.ones((5, 64, 64))).compile().as_text()
    timeline = estimate_program(
        read_program(text), chip=None, network=network_of([object()], "cpu", 1, 1)
    )
    assert timeline.flops == 5 * 2 * 32 * 64 * 64
