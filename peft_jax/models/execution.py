"""How a model is computed, as opposed to what it computes."""

import dataclasses

import jax.numpy as jnp

from kernels_pallas.dispatch import IMPLEMENTATIONS
from peft_jax.core.validation import check_choice

COMPUTE_DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots", "offload")
ATTENTION = ("auto", "dense", "chunked", "fused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """Choices that leave the function the same (up to rounding) and change its speed and memory.

    Attributes:
      compute_dtype: the dtype of activations. Norm statistics, attention's softmax, rotary tables
        and logits are float32 whatever it is.
      remat: what the backward pass keeps of each transformer block. "none": everything; "full":
        the block's input only, the rest is computed again; "dots": also the outputs of linear
        maps; "offload": as "full", with the inputs waiting in the host's pinned memory.
      scan_layers: one compiled block in a `jax.lax.scan` over the layers, or the blocks unrolled.
        Unrolled compiles longer.
      attention: "dense" holds all scores; "chunked" holds one block of scores at a time and
        computes them again in the backward pass; "fused" is cuDNN's kernel, on GPUs and for 16-bit
        activations; "auto" is fused where that works, else dense for short rows and chunked for
        long ones (`peft_jax.models.attention.choose_attention`). The choice is logged once.
      kernels: how adapters' rotations are multiplied by: "xla"; "pallas", an error where there is
        no Pallas kernel; "auto", Pallas where there is a kernel for the platform and the shapes,
        else XLA, with a line in the log that says why; "interpret", Pallas's TPU kernels
        interpreted, very slowly, to look for mistakes.

    Raises:
      ValueError: a value that is not known; near matches are named.

    Example:
      >>> ExecutionSettings(compute_dtype="bfloat16", remat="full").dtype
      dtype(bfloat16)
    """

    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "auto"
    kernels: str = "auto"

    def __post_init__(self) -> None:
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_choice("remat", self.remat, REMAT)
        check_choice("attention", self.attention, ATTENTION)
        check_choice("kernels", self.kernels, IMPLEMENTATIONS)
        if not isinstance(self.scan_layers, bool):
            raise ValueError(f"scan_layers must be True or False, but is {self.scan_layers!r}")

    @property
    def dtype(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return jnp.dtype(self.compute_dtype)
