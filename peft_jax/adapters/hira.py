"""Implements HiRA: a low-rank product that multiplies the kernel entry by entry."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax.adapters.kernel_change import changed_product
from peft_jax.adapters.method import (
    AdapterMethod,
    Arrays,
    Axes,
    GradientFactors,
    drop_inputs,
)
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.core import Kernel
from peft_jax.core.validation import check_fraction, check_positive_int

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(AdapterMethod):
    """Hadamard high-rank adaptation, y = x (W + W ⊙ A B).

    The change has a rank of up to r times that of W. As r products with W it would cost r times the
    base, so its entries are formed, some columns at a time: see `changed_product`. The gradients of
    A and B come from that of the kernel, in the same pieces. So a step has the products of full
    fine-tuning, and not its memory. Trainable arrays: `a` [d_in, r], uniform within ±1/√d_in, and
    `b` [r, d_out], zero.

    Attributes:
      rank: Rank r.
      dropout: Probability that an input of W ⊙ A B is dropped while training.

    Source: Huang, Ko, Zhuang, Tang and Zhang, 2025, HiRA: Parameter-Efficient Hadamard High-Rank
    Adaptation for Large Language Models, ICLR, eq. 3.
    """

    name: ClassVar[str] = "hira"
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_fraction("dropout", self.dropout)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the rank exceeds both sides of the kernel."""
        if self.rank > max(shape):
            raise ValueError(
                f"rank is {self.rank}, but {self.name} on the kernel of {module}"
                f" [{shape[0]}, {shape[1]}] needs a rank of at most {min(shape)}; set it with"
                " rank_pattern, or exclude the module"
            )

    def check_shared_experts(self, module: str) -> None:
        """Raises ValueError, because the change depends on the kernel."""
        raise ValueError(
            f"{module} belongs to experts, which cannot share an adapter of {self.name}, because it"
            " multiplies the entries of each one's kernel; leave experts out, or use another"
            " method, such as lora"
        )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns A uniform within ±1/√d_in and B zero; no constant arrays."""
        del gradient
        d_in, d_out = shape
        bound = 1.0 / math.sqrt(d_in)
        a = jax.random.uniform(key, (d_in, self.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((self.rank, d_out), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard A as the kernel's input and B as its output."""
        return {"a": (d_in, None), "b": (None, d_out)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns A and B."""
        del constant, dropout_key
        return dict(trainable)

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns the axes of both factors."""
        return self.axes(d_in, d_out)[0]

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x (W + W ⊙ A B)."""

        def change(
            kernel: Float[Array, "d_in columns"] | None, first: Int[Array, ""], columns: int
        ) -> Float[Array, "d_in columns"]:
            assert kernel is not None
            b = jax.lax.dynamic_slice_in_dim(arrays["b"], first, columns, axis=1)
            return kernel * _product(arrays["a"], b)

        inputs = drop_inputs(x, self.dropout, dropout_key)
        return changed_product(x, base, change, inputs=inputs, of_kernel=True)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + W ⊙ A B."""
        return base.astype(jnp.float32) * (1.0 + _product(arrays["a"], arrays["b"]))

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of HiRA."""
        return (HiRAForm,)


def _product(
    a: Float[Array, "d_in rank"], b: Float[Array, "rank columns"]
) -> Float[Array, "d_in columns"]:
    """Returns A B in float32."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=HIGHEST)


@dataclasses.dataclass(frozen=True)
class HiRAForm(RenamingForm):
    """`hira_A` [r, d_in] is Aᵀ and `hira_B` [d_out, r] is Bᵀ."""

    method: HiRA
    peft_type = "HIRA"
    names = ("hira_A", "hira_B")
    arrays = ("a", "b")
    transposed = True
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "hira_dropout": ("dropout", 0.0),
        "r": ("rank", 32),
    }
    written: ClassVar[Mapping[str, Any]] = {"fan_in_fan_out": False, "init_weights": True}
    exact = True
    understood = PeftSettings(
        read={"hira_dropout": float, "r": int},
        # PEFT 0.21 gives all modules the rank r, whatever rank_pattern says.
        irrelevant=frozenset({"init_weights", "rank_pattern"}),
        compared=("r",),
    )

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [r, d_in] and [d_out, r]."""
        return {"hira_A": (self.method.rank, d_in), "hira_B": (d_out, self.method.rank)}
