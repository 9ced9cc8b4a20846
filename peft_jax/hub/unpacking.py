"""Puts unpacked kernels in place of the tensors of a quantized checkpoint."""

from collections.abc import Mapping
from typing import Any

from peft_jax.hub.packed_fp8 import Fp8Kernel
from peft_jax.hub.packed_int4 import AwqKernel, GptqKernel
from peft_jax.hub.packed_nf4 import Nf4Kernel
from peft_jax.hub.packed_tensors import PackedKernel
from peft_jax.hub.tensors import StoredTensor
from peft_jax.models.packed_kernels import AWQ, FP8, GPTQ, NF4, is_packed, read_packing

_KINDS: dict[str, type[PackedKernel]] = {
    NF4: Nf4Kernel,
    GPTQ: GptqKernel,
    AWQ: AwqKernel,
    FP8: Fp8Kernel,
}


def unpack_tensors(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any] | None
) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint, with kernels in place of what holds them.

    Args:
      tensors: Stored tensors by name.
      settings: `quantization_config` of the checkpoint; None if it has none.

    Raises:
      ValueError: A packing or a setting is not implemented, or a kernel is incomplete; the message
        names it.
    """
    if not is_packed(settings):
        return dict(tensors)
    packing = read_packing(settings or {})
    kind, found = _KINDS[packing.method], dict(tensors)
    for name in tensors:
        if not name.endswith(kind.ends[0]):
            continue
        stem = name.removesuffix(kind.ends[0])
        parts = {end: found.pop(stem + end) for end in kind.ends if stem + end in found}
        if missing := [end for end in kind.required if end not in parts]:
            raise ValueError(f"the checkpoint has {name}, but not {stem}{missing[0]}")
        kernel = stem if kind.ends[1] == "" else f"{stem}weight"
        found[kernel] = kind.make(kernel, parts, packing)
    return found
