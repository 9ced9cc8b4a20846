"""Execution settings: dtype, rematerialization and kernels, which leave the function the same."""

import dataclasses

import jax.numpy as jnp

from kernels_pallas.dispatch import IMPLEMENTATIONS
from peft_jax.core.validation import check_choice

COMPUTE_DTYPES = ("float32", "bfloat16")
REMAT = ("none", "products", "attention", "full", "dots", "offload")
ATTENTION = ("auto", "dense", "chunked", "fused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """Settings that change a model's speed and memory but, up to rounding, not its function.

    Attributes:
      compute_dtype: Dtype of activations. Norm statistics, attention's softmax, rotary tables and
        logits are always float32.
      remat: Values of each transformer block that are saved for the backward pass. "none" saves
        everything. "full" saves the block's input and recomputes the rest. "products" also saves
        the products of the base's kernels and the output of fused or chunked attention, which cost
        most to recompute, and recomputes norms, activations and adapters' sums. "attention" saves
        these but the products that enter the MLP's nonlinearity, which take most of the memory.
        "dots" saves the outputs of all linear maps, also adapters'. "offload" is "full" with the
        inputs in the host's pinned memory.
      scan_layers: Whether to compile one block and scan it over the layers (`jax.lax.scan`).
        Unrolled blocks take longer to compile.
      attention: "dense" stores all scores. "chunked" stores one block of scores at a time and
        recomputes them in the backward pass. "fused" is cuDNN's kernel on GPUs and JAX's splash
        kernel on TPUs, for 16-bit activations. "auto" is fused where that is supported, else dense
        for short rows and chunked for long ones (`peft_jax.models.attention.choose_attention`). The
        choice is logged once.
      kernels: Implementation of adapters' rotations. "xla" runs anywhere. "pallas" raises an error
        where there is no Pallas kernel. "auto" uses Pallas where there is a kernel for the platform
        and the shapes, else XLA, and logs why. "interpret" interprets the TPU kernels, very slowly,
        for debugging.
      async_collectives: Whether collectives run behind other work on TPUs whose compiler leaves
        them synchronous by default, v5p and v6e. That takes memory. It changes nothing elsewhere.

    Raises:
      ValueError: A value is unknown; the message suggests near matches.

    Example:
      >>> ExecutionSettings(compute_dtype="bfloat16", remat="full").dtype
      dtype(bfloat16)
    """

    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "auto"
    kernels: str = "auto"
    async_collectives: bool = True

    def __post_init__(self) -> None:
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_choice("remat", self.remat, REMAT)
        check_choice("attention", self.attention, ATTENTION)
        check_choice("kernels", self.kernels, IMPLEMENTATIONS)
        for name in ("scan_layers", "async_collectives"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, but is {value!r}")

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype object of `compute_dtype`."""
        return jnp.dtype(self.compute_dtype)
