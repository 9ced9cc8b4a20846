"""Implements GraLoRA: a low-rank product for every block of the kernel."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes, plain_number, setting
from peft_jax.core.validation import check_count, check_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraLoRA(LoRA):
    """Granular low-rank adaptation, y = x W + s x Δ, where every block of Δ has its own factors.

    The kernel is divided into k by k blocks of rank q = r / k. With A [d_in, r] in k blocks of rows
    and k groups of q columns, and B [r, d_out] in k groups of rows and k blocks of columns, the
    block (n, j) of Δ is A[n, j] B[n, j]. So there are as many parameters as with LoRA of rank r,
    and Δ has a rank of up to k r.

    Δ is one product of rank k r: the factors of each block stand in columns and rows of their own,
    which are zero elsewhere. So a token costs as much as with LoRA of rank k r. Trainable arrays:
    `a`, uniform within ±√(k / d_in), and `b`, zero; with `hybrid_rank`, also `a_general` and
    `b_general`, which are LoRA's.

    Attributes:
      rank: Rank r, divisible by `blocks`.
      alpha: Numerator of the scale s = alpha / (rank + hybrid_rank).
      rank_stabilized: Divide by the root of the same sum instead.
      blocks: Number k of blocks along each side of the kernel.
      hybrid_rank: Rank of a product over the whole kernel beside those of the blocks; 0 for none.
      dropout: As in `LoRA`.

    Source: Jung et al., 2025, arXiv 2505.20355, section 3.

    Example:
      >>> GraLoRA(rank=8, alpha=16.0, blocks=4).scale
      2.0
    """

    name: ClassVar[str] = "gralora"

    rank: int = 32
    alpha: float = 64.0
    blocks: int = 2
    hybrid_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("blocks", self.blocks)
        check_count("hybrid_rank", self.hybrid_rank)
        if self.rank % self.blocks:
            raise ValueError(
                f"rank is {self.rank}, but must be divisible by {self.blocks} (blocks):"
                f" {max(self.rank - self.rank % self.blocks, self.blocks)} would work"
            )

    @property
    def scale(self) -> float:
        """Factor s on the products."""
        total = self.rank + self.hybrid_rank
        return self.alpha / (math.sqrt(total) if self.rank_stabilized else total)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the kernel has no such blocks, or the rank is too large."""
        if any(size % self.blocks for size in shape):
            common = math.gcd(*shape)
            sizes = [n for n in range(1, 9) if common % n == 0 and self.rank % n == 0]
            raise ValueError(
                f"blocks is {self.blocks}, but must divide both sides of the kernel of {module}"
                f" [{shape[0]}, {shape[1]}]: {', '.join(map(str, sizes))} would work; or exclude"
                " the module"
            )
        super().check_kernel(module, shape)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns A uniform within ±√(k / d_in) and B zero; no constant arrays."""
        del gradient
        d_in, d_out = shape
        of_blocks, general = jax.random.split(key)
        bound = math.sqrt(self.blocks / d_in)
        trainable = {
            "a": jax.random.uniform(of_blocks, (d_in, self.rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((self.rank, d_out), jnp.float32),
        }
        if self.hybrid_rank:
            size, bound = (d_in, self.hybrid_rank), 1.0 / math.sqrt(d_in)
            trainable |= {
                "a_general": jax.random.uniform(general, size, jnp.float32, -bound, bound),
                "b_general": jnp.zeros((self.hybrid_rank, d_out), jnp.float32),
            }
        return trainable, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard each A as the kernel's input and each B as its output."""
        a, b = (d_in, None), (None, d_out)
        general = {"a_general": a, "b_general": b} if self.hybrid_rank else {}
        return {"a": a, "b": b, **general}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the factors [d_in, k r] and [k r, d_out] of s Δ.

        Columns of the first are ordered by block of outputs, block of inputs, and place within the
        block's rank. The general factors come last.
        """
        del constant, dropout_key
        a, b = trainable["a"], trainable["b"]
        k, (d_in, d_out) = self.blocks, (a.shape[0], b.shape[1])
        a = a.reshape(d_in, k, 1, -1) * _of_block(d_in, k)[:, None, :, None]
        b = b.reshape(1, self.rank, d_out) * _of_block(d_out, k).T[:, None, :]
        a, b = a.reshape(d_in, k * self.rank), b.reshape(k * self.rank, d_out)
        if self.hybrid_rank:
            a = jnp.concatenate([a, trainable["a_general"]], axis=1)
            b = jnp.concatenate([b, trainable["b_general"]], axis=0)
        return {"a": a, "b": self.scale * b}

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        if type(self) is not GraLoRA:
            return None
        return HybridGraLoRAForm(self) if self.hybrid_rank else GraLoRAForm(self)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the forms without and with a product over the whole kernel."""
        return (GraLoRAForm, HybridGraLoRAForm)


def _of_block(size: int, blocks: int) -> Float[Array, "size blocks"]:
    """Returns 1 where an index belongs to a block, else 0."""
    return jnp.repeat(jnp.eye(blocks, dtype=jnp.float32), size // blocks, axis=0)


@dataclasses.dataclass(frozen=True)
class GraLoRAForm(PeftForm):
    """`gralora_A` [k, d_in / k, r] and `gralora_B` [k, r, d_out / k] are the blocks of A and B."""

    method: GraLoRA
    peft_type = "GRALORA"
    only_bias = "gralora_only"
    names: ClassVar[tuple[str, ...]] = ("gralora_A", "gralora_B")
    exact = True
    understood = PeftSettings(
        read={
            "alpha": float,
            "gralora_dropout": float,
            "gralora_k": int,
            "hybrid_r": int,
            "r": int,
        },
        irrelevant=frozenset({"init_weights"}),
        compared=("alpha", "gralora_k", "hybrid_r", "r"),
    )

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Returns whether there is no product over the whole kernel."""
        return super().reads(config) and not config.get("hybrid_r")

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> GraLoRA:
        """Returns GraLoRA with the settings of the configuration."""
        del modules
        return GraLoRA(
            rank=setting(config, "r", 32),
            alpha=float(setting(config, "alpha", 64)),
            blocks=setting(config, "gralora_k", 2),
            hybrid_rank=setting(config, "hybrid_r", 0),
            dropout=float(setting(config, "gralora_dropout", 0.0)),
        )

    def settings(self) -> dict[str, Any]:
        """Returns the ranks, the number of blocks, and the alpha that gives the method's scale."""
        method = self.method
        return {
            "alpha": plain_number(method.scale * (method.rank + method.hybrid_rank)),
            "fan_in_fan_out": False,
            "gralora_dropout": method.dropout,
            "gralora_k": method.blocks,
            "hybrid_r": method.hybrid_rank,
            "init_weights": True,
            "r": method.rank,
        }

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [k, d_in / k, r] and [k, r, d_out / k]."""
        k, r = self.method.blocks, self.method.rank
        return {"gralora_A": (k, d_in // k, r), "gralora_B": (k, r, d_out // k)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Divides the factors into blocks."""
        k, r = self.method.blocks, self.method.rank
        return {
            "gralora_A": arrays["a"].reshape(k, -1, r),
            "gralora_B": arrays["b"].reshape(r, k, -1).swapaxes(0, 1),
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Joins the blocks."""
        r = self.method.rank
        return {
            "a": tensors["gralora_A"].reshape(-1, r),
            "b": tensors["gralora_B"].swapaxes(0, 1).reshape(r, -1),
        }, {}


@dataclasses.dataclass(frozen=True)
class HybridGraLoRAForm(GraLoRAForm):
    """Also has the factors of the whole kernel, which are those of LoRA."""

    names = (*GraLoRAForm.names, "gralora_A_general.weight", "gralora_B_general.weight")

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Returns whether there is a product over the whole kernel."""
        return config.get("peft_type") == cls.peft_type and bool(config.get("hybrid_r"))

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns the shapes of the blocks, and [h, d_in] and [d_out, h]."""
        h = self.method.hybrid_rank
        return super().shapes(d_in, d_out) | {
            "gralora_A_general.weight": (h, d_in),
            "gralora_B_general.weight": (d_out, h),
        }

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Divides the factors into blocks, and transposes the general ones."""
        return super().export(arrays) | {
            "gralora_A_general.weight": arrays["a_general"].T,
            "gralora_B_general.weight": arrays["b_general"].T,
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Joins the blocks, and transposes the general factors."""
        trainable, constant = super().restore(tensors)
        return {
            **trainable,
            "a_general": tensors["gralora_A_general.weight"].T,
            "b_general": tensors["gralora_B_general.weight"].T,
        }, constant
