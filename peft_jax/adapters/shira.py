"""Implements SHiRA: trainable values at few random entries of the kernel."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.adapters.kernel_change import changed_product
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.adapters.random_entries import entries
from peft_jax.core import Kernel
from peft_jax.core.validation import check_count, check_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(AdapterMethod):
    """Sparse high-rank adaptation, y = x (W + S), where S is zero but for n random entries.

    S has as many entries as LoRA of rank r, n = r (d_in + d_out), and any rank. No device
    multiplies by it as it is: some columns at a time are filled with zeros, see `changed_product`,
    and the gradient of the same columns of the kernel gives that of the values. So a step has the
    products of full fine-tuning, and not its memory. Trainable array: `values` [n], zero. Constant
    array: `indices` [2, n], the outputs and the inputs of the entries.

    Attributes:
      rank: Rank r of a LoRA with as many parameters.
      seed: Seed of the entries, which are the same in all kernels of a shape. Hugging Face PEFT
        draws the same ones from `random_seed`.

    Source: Bhardwaj et al., 2024, arXiv 2406.13175, section 4, with random masks.
    """

    name: ClassVar[str] = "shira"
    learning_rate: ClassVar[float] = 3e-4

    rank: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_count("seed", self.seed)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the kernel has fewer entries than would be trained."""
        d_in, d_out = shape
        most = d_in * d_out // (d_in + d_out)
        if self.rank > most:
            fix = f"a rank of at most {most} would work; or " if most else ""
            raise ValueError(
                f"rank is {self.rank}, but {self.name} would train {self._count(d_in, d_out)}"
                f" entries of the kernel of {module} [{d_in}, {d_out}], which has {d_in * d_out};"
                f" {fix}exclude the module"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zero values, and the entries in the order of the outputs."""
        del key, gradient
        d_in, d_out = shape
        count = self._count(d_in, d_out)
        outputs, inputs = entries(self.seed, d_out, d_in, count)
        order = np.lexsort((inputs, outputs))
        indices = np.stack([outputs[order], inputs[order]]).astype(np.int32)
        return {"values": jnp.zeros((count,), jnp.float32)}, {"indices": jnp.asarray(indices)}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that are not sharded."""
        del d_in, d_out
        return {"values": (None,)}, {"indices": (None, None)}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the values and their entries."""
        del dropout_key
        return {**trainable, **constant}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x (W + S)."""
        del dropout_key
        values = arrays["values"].astype(jnp.float32)
        outputs, inputs = arrays["indices"]

        def change(
            kernel: Float[Array, "d_in columns"] | None, first: Int[Array, ""], columns: int
        ) -> Float[Array, "d_in columns"]:
            del kernel
            at = outputs - first
            at = jnp.where((at >= 0) & (at < columns), at, columns)  # others are dropped
            zeros = jnp.zeros((x.shape[-1], columns), jnp.float32)
            return zeros.at[inputs, at].add(values, mode="drop")

        return changed_product(x, base, change, inputs=x, of_kernel=False)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + S."""
        outputs, inputs = arrays["indices"]
        values = arrays["values"].astype(jnp.float32)
        return base.astype(jnp.float32).at[inputs, outputs].add(values)

    def _count(self, d_in: int, d_out: int) -> int:
        """Returns the number n of trained entries."""
        return self.rank * (d_in + d_out)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of SHiRA."""
        return (SHiRAForm,)


@dataclasses.dataclass(frozen=True)
class SHiRAForm(RenamingForm):
    """`shira_weight` [n] holds the values, `shira_indices` [2, n] their outputs and inputs."""

    method: SHiRA
    peft_type = "SHIRA"
    names = ("shira_weight", "shira_indices")
    arrays = ("values", "indices")
    constant = ("indices",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 32),
        "random_seed": ("seed", 0),
    }
    written: ClassVar[Mapping[str, Any]] = {
        "fan_in_fan_out": False,
        "init_weights": True,
        "mask_type": "random",
    }
    integers = ("shira_indices",)
    exact = True
    understood = PeftSettings(
        read={"r": int, "random_seed": int},
        # How PEFT has drawn the entries, which are in the file.
        irrelevant=frozenset({"init_weights", "mask_type"}),
        compared=("r",),
    )

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [n] and [2, n]."""
        count = self.method.rank * (d_in + d_out)
        return {"shira_weight": (count,), "shira_indices": (2, count)}

    def check(self, tensors: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises ValueError if an entry is not in the kernel."""
        indices = tensors["shira_indices"]
        if indices.min() < 0 or (indices.max(axis=1) >= (d_out, d_in)).any():
            lowest, highest = indices.min(axis=1), indices.max(axis=1)
            raise ValueError(
                f"shira_indices with outputs from {lowest[0]} to {highest[0]} and inputs from"
                f" {lowest[1]} to {highest[1]}, but the kernel has {d_out} outputs and {d_in}"
                " inputs"
            )
