"""Implements OFT: block-diagonal rotations of the kernel's input."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.cayley import cayley, skew_symmetric
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import NEUTRAL, PeftForm, PeftSettings, Shapes, setting
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_fraction, check_positive_int

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(AdapterMethod):
    """Orthogonal fine-tuning of the input, y = (x M) W with M = blockdiag(Q_1, Q_2, …).

    Each block Q is a function of a skew-symmetric S, of which the b (b - 1) / 2 free entries are
    stored. With `neumann_terms`, Q = I + 2 S + 2 S² + … + S^p is the truncated series of
    (I + S)(I - S)⁻¹, which needs products only and is orthogonal up to the first dropped power.
    Without, Q = (I - S)(I + S)⁻¹ is orthogonal. Trainable array: `r` [d_in / b, b (b - 1) / 2], or
    [1, …] with `share_blocks`, initially zero.

    Attributes:
      block_size: Block size b; d_in must be divisible by it.
      neumann_terms: Number of terms of the series, at least 4, with p = `neumann_terms` - 1; 0 for
        the exact transform.
      share_blocks: Use one block for all of the input.
      dropout: Probability that a block is replaced by the identity while training. PEFT instead
        replaces a fixed share of the blocks.

    Source: Qiu et al., 2023, arXiv 2306.07280, and Qiu et al., 2025 (OFTv2), arXiv 2506.19847, for
    the side of the input and the series.
    """

    name: ClassVar[str] = "oft"
    learning_rate: ClassVar[float] = 5e-4
    maps_input: ClassVar[bool] = True

    block_size: int = 32
    neumann_terms: int = 5
    share_blocks: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("block_size", self.block_size)
        check_fraction("dropout", self.dropout)
        if self.block_size < 2:
            raise ValueError(
                f"block_size must be at least 2, but is {self.block_size}: a block of size 1 cannot"
                " rotate"
            )
        if self.neumann_terms != 0 and self.neumann_terms < 4:
            raise ValueError(
                "neumann_terms must be 0, for the exact transform, or at least 4, but is"
                f" {self.neumann_terms}"
            )

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError unless d_in is divisible by the block size."""
        d_in = shape[0]
        if d_in % self.block_size == 0:
            return
        sizes = [b for b in range(2, d_in + 1) if d_in % b == 0]
        nearest = sorted(sorted(sizes, key=lambda b: abs(b - self.block_size))[:4])
        raise ValueError(
            f"{self.name} with block_size {self.block_size} needs an input divisible by it, but"
            f" {module} has {d_in} inputs; block sizes that work: {', '.join(map(str, nearest))}"
        )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zeros, with which every block is the identity."""
        del key, gradient
        b = self.block_size
        blocks = 1 if self.share_blocks else shape[0] // b
        return {"r": jnp.zeros((blocks, b * (b - 1) // 2), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard blocks as the kernel's input; a shared one is not sharded."""
        del d_out
        return {"r": (None if self.share_blocks else d_in, None)}, {}

    @part("rotation")
    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the blocks [d_in / b, b, b], or [1, b, b]."""
        del constant
        if self.neumann_terms:
            blocks = _neumann(skew_symmetric(trainable["r"], self.block_size), self.neumann_terms)
        else:
            blocks = cayley(trainable["r"], self.block_size)
        if dropout_key is not None and self.dropout > 0:
            dropped = jax.random.bernoulli(dropout_key, self.dropout, blocks.shape[:1])
            eye = jnp.eye(self.block_size, dtype=blocks.dtype)
            blocks = jnp.where(dropped[:, None, None], eye, blocks)
        return {"blocks": blocks}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns axes that shard blocks as the kernel's input."""
        del d_out
        return {"blocks": (None if self.share_blocks else d_in, None, None)}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x M) W."""
        del dropout_key
        blocks = self._all_blocks(arrays, x.shape[-1])
        return linear(part("rotation")(block_rotation)(x, blocks), base)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns M W."""
        d_in, d_out = base.shape
        blocks = self._all_blocks(arrays, d_in).astype(jnp.float32)
        rows = base.astype(jnp.float32).reshape(-1, self.block_size, d_out)
        return jnp.matmul(blocks, rows, precision=HIGHEST).reshape(d_in, d_out)

    def _all_blocks(self, arrays: Arrays, d_in: int) -> Float[Array, "blocks b b"]:
        """Returns a block for each b inputs."""
        blocks = arrays["blocks"]
        return jnp.broadcast_to(blocks, (d_in // self.block_size, *blocks.shape[1:]))

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of OFT."""
        return (OFTForm,)


def _neumann(s: Float[Array, "blocks b b"], terms: int) -> Float[Array, "blocks b b"]:
    """Returns I + 2 S + 2 S² + … + 2 S^(p-1) + S^p with p = `terms` - 1."""
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)
    power, total = s, eye + 2.0 * s
    for _ in range(2, terms - 1):
        power = jnp.matmul(power, s, precision=HIGHEST)
        total = total + 2.0 * power
    return total + jnp.matmul(power, s, precision=HIGHEST)


@dataclasses.dataclass(frozen=True)
class OFTForm(RenamingForm):
    """`oft_R.weight` [d_in / b, b (b - 1) / 2] holds the entries above the diagonal of S."""

    method: OFT
    peft_type = "OFT"
    only_bias = "oft_only"
    names = ("oft_R.weight",)
    arrays = ("r",)
    exact = True
    understood = PeftSettings(
        read={
            "block_share": bool,
            "module_dropout": float,
            "num_cayley_neumann_terms": int,
            "use_cayley_neumann": bool,
        },
        # The block size is read from the tensors' shapes.
        irrelevant=frozenset({"eps", "init_weights", "oft_block_size", "r"}),
        fixed={"coft": NEUTRAL},
        compared=(
            "block_share",
            "num_cayley_neumann_terms",
            "oft_block_size",
            "use_cayley_neumann",
        ),
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> OFT:
        """Returns OFT with the block size of the stored tensors.

        Raises:
          ValueError: Modules have different block sizes.
        """
        entries = {shapes["oft_R.weight"][-1]: name for name, shapes in modules.items()}
        if len(entries) > 1:
            found = ", ".join(f"{_block_size(n)} in {name}" for n, name in entries.items())
            raise ValueError(
                f"has blocks of several sizes ({found}), but all modules must have the same"
            )
        terms = setting(config, "num_cayley_neumann_terms", 5)
        if setting(config, "use_cayley_neumann", True) and terms < 3:
            raise ValueError(
                f"sets num_cayley_neumann_terms = {terms}, which is not implemented: with fewer"
                " than 3 terms, blocks are far from orthogonal"
            )
        return OFT(
            block_size=_block_size(next(iter(entries))),
            # PEFT's series is the same for three terms and for four.
            neumann_terms=max(terms, 4) if setting(config, "use_cayley_neumann", True) else 0,
            share_blocks=setting(config, "block_share", False),
            dropout=float(setting(config, "module_dropout", 0.0)),
        )

    def settings(self) -> dict[str, Any]:
        """Returns the block size and the transform."""
        return {
            "block_share": self.method.share_blocks,
            "coft": False,
            "module_dropout": self.method.dropout,
            "num_cayley_neumann_terms": self.method.neumann_terms or 5,
            "oft_block_size": self.method.block_size,
            "r": 0,
            "use_cayley_neumann": self.method.neumann_terms > 0,
        }

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [d_in / b, b (b - 1) / 2]."""
        del d_out
        b = self.method.block_size
        blocks = 1 if self.method.share_blocks else d_in // b
        return {"oft_R.weight": (blocks, b * (b - 1) // 2)}


def _block_size(entries: int) -> int:
    """Returns the size of a block with this number of entries above its diagonal.

    Example:
      >>> _block_size(6)
      4
    """
    return (1 + math.isqrt(1 + 8 * entries)) // 2
