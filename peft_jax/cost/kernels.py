"""Counts the work of kernels (Pallas), which the compiler does not see into.

A kernel states its cost, or is known by its name. Its small matrices fill the matrix unit as badly
as those of any other product.
"""

import dataclasses
import re

from peft_jax.core.scopes import find_mean_share
from peft_jax.cost.hlo import Array, Instruction
from peft_jax.cost.products import Product
from peft_jax.cost.traffic import Traffic

_STATED = re.compile(r'"cost_estimate":\{([^}]*)\}')
_NUMBER = re.compile(r'"(\w+)":"(-?\d+)"')
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of queries, keys and values in each of splash attention's kernels."""
_RAGGED = "ragged-dot"
"""Beginning of the names of the kernels that multiply each row by its group's matrix."""
_FUSED_PRODUCTS = 5
"""Products of the kernel that computes all gradients at once."""
_WORK_A_SCORE = 6
"""Elementwise operations for a score: for the maximum, the sum, their updates and the cast."""


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Work of a kernel.

    Attributes:
      flops: Operations of its products.
      computed: Operations that the matrix unit spends on them.
      traffic: Bytes of main memory and elementwise work.
    """

    flops: float
    computed: float
    traffic: Traffic


def count_kernel(one: Instruction, operands: tuple[Array, ...], *, tile: int) -> KernelWork | None:
    """Returns the work of a kernel; None if the instruction is none, or nothing is known of it.

    Args:
      one: Instruction.
      operands: Arrays of its operands.
      tile: Number of rows and columns of a matrix unit.
    """
    if one.opcode != "custom-call" or '"tpu_custom_call"' not in one.attributes:
        return None
    if found := _SPLASH.search(one.op_name) or _SPLASH.search(one.name):
        return _splash(one, found[1], operands, tile)
    stated = _STATED.search(one.attributes)
    if stated is None:
        return None
    numbers = {name: max(float(number), 0.0) for name, number in _NUMBER.findall(stated[1])}
    flops = numbers.get("flops", 0.0)
    traffic = Traffic(
        bytes=numbers.get("bytes_accessed", 0.0),
        transcendental=numbers.get("transcendentals", 0.0),
    )
    if one.name.startswith(_RAGGED):
        return _ragged(one, operands, flops, traffic.bytes)
    return KernelWork(flops, flops * _waste(operands, tile), traffic)


def _ragged(
    one: Instruction, operands: tuple[Array, ...], flops: float, stated: float
) -> KernelWork:
    """Returns the work of a ragged product for the mean number of rows; see `mean_share`.

    The matrices of all groups are read or written, however few rows they have.
    """
    share = find_mean_share(one.op_name)
    arrays = (*operands, *one.result)
    matrices = min(sum(array.bytes for array in arrays if len(array.shape) == 3), stated)
    moved = matrices + share * (stated - matrices)
    return KernelWork(share * flops, share * flops, Traffic(bytes=moved))


def _waste(operands: tuple[Array, ...], tile: int) -> float:
    """Returns how many times a matrix unit's work exceeds that of a kernel's square matrices.

    A rotation multiplies by its operands [..., b, b]. Operations grow with b, which weighs them.
    """
    sizes = [
        array.shape[-1]
        for array in operands
        if len(array.shape) > 2 and array.shape[-1] == array.shape[-2]
    ]
    if not sizes:
        return 1.0
    spent = sum(
        Product(groups=1, rows=tile * tile, columns=b, summed=b).computed(tile) / b for b in sizes
    )
    return spent / sum(2.0 * tile * tile * b for b in sizes)


def _splash(one: Instruction, name: str, operands: tuple[Array, ...], tile: int) -> KernelWork:
    """Returns the work of splash attention with a causal mask.

    Its operands are queries [..., H, T, D], and keys and values [..., K, S, D], after the mask's.
    """
    factors = [array for array in operands if len(array.shape) >= 3 and array.dtype[0] in "bf"]
    query, key = factors[0], factors[1]
    *heads, tokens, features = query.shape
    block = re.search(r'block_kv\\*": (\d+)', one.attributes)
    diagonal = int(block[1]) if block else 0
    pairs = tokens * (key.shape[-2] + diagonal) / 2
    groups = 1
    for size in heads:
        groups *= size
    count = _PRODUCTS[name]
    if name == "dkv" and re.search(r'use_fused_bwd_kernel\\*": true', one.attributes):
        count = _FUSED_PRODUCTS
    # Half of the products sum over features, and the others have features as columns.
    product = Product(groups=groups, rows=tokens, columns=features, summed=pairs / tokens)
    scores = float(groups * pairs)
    moved = float(sum(array.bytes for array in (*operands, *one.result)))
    traffic = Traffic(bytes=moved, elementwise=_WORK_A_SCORE * scores, transcendental=scores)
    return KernelWork(count * product.flops, count * product.computed(tile), traffic)
