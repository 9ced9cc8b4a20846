"""Reads `quantization_config`: how a checkpoint packs its kernels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

NF4, GPTQ, AWQ, FP8 = "bitsandbytes", "gptq", "awq", "fp8"
PACKINGS = (NF4, GPTQ, AWQ, FP8)
"""Packings that are unpacked while they are loaded, by their `quant_method`."""

_NAMED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    NF4: {
        "load_in_4bit": (True,),
        "load_in_8bit": (False,),
        "bnb_4bit_quant_type": ("nf4",),
        "bnb_4bit_quant_storage": ("uint8",),
    },
    GPTQ: {
        "bits": (4,),
        "desc_act": (False,),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "pack_dtype": ("int32",),
    },
    AWQ: {"bits": (4,), "version": ("gemm",), "zero_point": (True,)},
    FP8: {"fmt": ("e4m3",)},
}
"""Implemented values of the settings that decide what the stored numbers mean."""

_REQUIRED = {
    NF4: ("load_in_4bit", "bnb_4bit_quant_type"),
    GPTQ: ("bits", "group_size"),
    AWQ: ("bits", "group_size"),
    FP8: ("weight_block_size",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How the kernels of a checkpoint are packed.

    Attributes:
      method: One of `PACKINGS`.
      group_size: Number of inputs that share a scale, -1 for all; 0 where the files say it.
      block_shape: Numbers of outputs and of inputs that share a scale of "fp8".
      zero_offset: Number that is added to stored zero points.
    """

    method: str
    group_size: int = 0
    block_shape: tuple[int, int] = (0, 0)
    zero_offset: int = 0


def is_packed(settings: Mapping[str, Any] | None) -> bool:
    """Returns whether a `quantization_config` is one of `PACKINGS`, or should be."""
    return settings is not None and settings.get("quant_method") in PACKINGS


def read_packing(settings: Mapping[str, Any]) -> Packing:
    """Reads a `quantization_config`.

    Settings that say how to compute, or which modules are not packed, are not read: kernels are
    unpacked, and the stored tensors say which are packed.

    Raises:
      ValueError: The packing, or one of its settings, is not implemented.

    Example:
      >>> read_packing({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"})
      Packing(method='awq', group_size=128, block_shape=(0, 0), zero_offset=0)
    """
    method = settings.get("quant_method")
    if method not in PACKINGS:
        raise ValueError(
            f"config.json sets quantization_config with quant_method = {method!r}, but kernels can"
            f" be unpacked from {', '.join(PACKINGS)} only; load the unquantized checkpoint"
        )
    for name in _REQUIRED[method]:
        if settings.get(name) is None:
            raise ValueError(f"config.json sets quantization_config of {method} without {name}")
    for name, works in _NAMED[method].items():
        value = settings.get(name)
        found = value.lower() if isinstance(value, str) else value
        if found is not None and found not in works:
            raise ValueError(
                f"config.json sets quantization_config of {method} with {name} = {value!r}, but it"
                f" is implemented for {' or '.join(map(repr, works))} only"
            )
    if method == FP8:
        return Packing(method=method, block_shape=_read_block(settings["weight_block_size"]))
    if method == NF4:
        return Packing(method=method)
    # The first version of the files stores zero points less one.
    is_first = method == GPTQ and settings.get("checkpoint_format", "gptq") == "gptq"
    return Packing(
        method=method,
        group_size=_read_group(method, settings["group_size"]),
        zero_offset=int(is_first),
    )


def _read_group(method: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise ValueError(
            f"config.json sets quantization_config of {method} with group_size = {size!r}, but it"
            " must be a whole number above 0, or -1 for all inputs"
        )
    return size


def _read_block(shape: Any) -> tuple[int, int]:
    is_pair = isinstance(shape, list) and len(shape) == 2
    if not is_pair or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(
            f"config.json sets quantization_config of {FP8} with weight_block_size = {shape!r}, but"
            " it must be two whole numbers above 0"
        )
    return shape[0], shape[1]
