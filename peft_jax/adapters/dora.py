"""Implements DoRA: trainable column norms of the kernel, and a low-rank product for directions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.lora import LORA_SETTINGS, LoRA, LoRAForm, lora_settings
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import PeftForm, Shapes
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation, y = (x W + s (x A) B) ⊙ m / n.

    n [d_out] holds the norms of the columns of W + s A B, and m their trainable values, which start
    at the norms of the columns of W. The gradient takes n as a constant. The merged kernel is not
    formed: with C = s A B, n² = |W|² + 2 ⟨W, C⟩ + |C|² by column, and

        ⟨W, C⟩ = Σ (Aᵀ W) ⊙ s B,    |C|² = Σ (Aᵀ A s B) ⊙ s B    (sums over the rank).

    Aᵀ W is a product of r rows with the base kernel. Trainable arrays: `a`, `b` as in `LoRA`,
    `magnitude` [d_out]. Constant array: `norm` [d_out], the norms |W| of the base.

    Source: Liu et al., 2024, arXiv 2402.09353, eq. 5 and section 4.3. Dropout applies to the input
    of A only. Hugging Face PEFT also multiplies the dropped input by (m / n - 1) W, a second
    product with the base.
    """

    name: ClassVar[str] = "dora"
    learning_rate: ClassVar[float] = 2e-4
    no_decay: ClassVar[tuple[str, ...]] = ("magnitude",)
    uses_kernel: ClassVar[bool] = True

    def init(
        self,
        key: jax.Array,
        shape: tuple[int, int],
        gradient: GradientFactors | None = None,
        *,
        kernel: Float[Array, "d_in d_out"] | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Returns LoRA's factors and the norms of the kernel's columns, trainable and constant.

        Raises:
          ValueError: `kernel` is None.
        """
        if kernel is None:
            raise ValueError(f"kernel must be given, because {self.name} starts from its norms")
        trainable, _ = super().init(key, shape, gradient)
        constant = self.kernel_constants(kernel)
        return {**trainable, "magnitude": constant["norm"]}, constant

    def kernel_constants(self, kernel: Float[Array, "d_in d_out"]) -> Arrays:
        """Returns the norms of the kernel's columns."""
        return {"norm": jnp.linalg.norm(kernel, axis=0)}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard norms as the kernel's output."""
        trainable, _ = super().axes(d_in, d_out)
        return {**trainable, "magnitude": (d_out,)}, {"norm": (d_out,)}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns A, s B, m, and |W|² + |s A B|² by column, without a gradient."""
        arrays = super().prepare(trainable, {}, dropout_key=dropout_key)
        a, b = (jax.lax.stop_gradient(arrays[name]).astype(jnp.float32) for name in ("a", "b"))
        gram = jnp.matmul(a.T, a, precision=HIGHEST)
        of_product = jnp.sum(jnp.matmul(gram, b, precision=HIGHEST) * b, axis=0)
        squares = jnp.square(constant["norm"].astype(jnp.float32)) + of_product
        return {**arrays, "magnitude": trainable["magnitude"], "squares": squares}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns the axes of the factors and of the norms."""
        return {
            "a": (d_in, None),
            "b": (None, d_out),
            "magnitude": (d_out,),
            "squares": (d_out,),
        }

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x W + (x A)(s B)) ⊙ m / n."""
        y = super().project(x, base, arrays, dropout_key=dropout_key)
        return y * self._factor(base, arrays, x.dtype).astype(x.dtype)

    @part("low_rank")
    def _factor(self, base: Kernel, arrays: Arrays, dtype: Any) -> Float[Array, " d_out"]:
        """Returns m / n in float32; Aᵀ W is computed in the dtype of the activations."""
        a, b = (jax.lax.stop_gradient(arrays[name]) for name in ("a", "b"))
        rows = linear(a.T.astype(dtype), jax.lax.stop_gradient(base)).astype(jnp.float32)
        cross = jnp.sum(rows * b.astype(jnp.float32), axis=0)
        norm = jnp.sqrt(arrays["squares"] + 2.0 * cross)
        return arrays["magnitude"].astype(jnp.float32) / norm

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns (W + s A B) ⊙ m / n."""
        kernel = super().merge(base, arrays)
        norm = jnp.linalg.norm(kernel, axis=0)
        return kernel * (arrays["magnitude"].astype(jnp.float32) / norm)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns LoRA's form with magnitudes."""
        return (DoRAForm,)


@dataclasses.dataclass(frozen=True)
class DoRAForm(LoRAForm):
    """LoRA's tensors and `lora_magnitude_vector` [d_out]; PEFT computes the base's norms."""

    method: DoRA
    marks: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    names = (*LoRAForm.names, "lora_magnitude_vector")
    exact = False
    understood = dataclasses.replace(
        LORA_SETTINGS, fixed={**LORA_SETTINGS.fixed, "use_dora": (True,)}
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> DoRA:
        """Returns DoRA with the rank, alpha and dropout of the configuration."""
        del modules
        return DoRA(**lora_settings(config))

    def settings(self) -> dict[str, Any]:
        """Returns LoRA's settings with `use_dora`."""
        return super().settings() | {"use_dora": True}

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns LoRA's shapes and [d_out]."""
        return super().shapes(d_in, d_out) | {"lora_magnitude_vector": (d_out,)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Transposes the factors, and leaves the base's norms to PEFT."""
        return super().export(arrays) | {"lora_magnitude_vector": arrays["magnitude"]}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Transposes the factors."""
        trainable, constant = super().restore(tensors)
        return {**trainable, "magnitude": tensors["lora_magnitude_vector"]}, constant
