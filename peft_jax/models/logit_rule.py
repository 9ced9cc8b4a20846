"""Computes logits: the products of the head, a scale, and a soft cap.

Axes: D embed, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from peft_jax.core import Kernel, linear
from peft_jax.core.validation import check_positive


def head_products(
    hidden: Float[Array, "*batch embed"], kernel: Kernel
) -> Float32[Array, "*batch vocab"]:
    """Returns the products of hidden states and the head's kernel [D, V], in float32.

    They are accumulated in float32 if the kernel is one array.
    """
    if isinstance(kernel, jax.Array):
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return linear(hidden, kernel).astype(jnp.float32)


def soft_cap(x: Float32[Array, "*shape"], cap: float) -> Float32[Array, "*shape"]:
    """Returns cap · tanh(x / cap), which is near x for small x and stays within ±cap.

    Source: Bello et al., 2016, arXiv 1611.09940; Gemma Team, 2024, arXiv 2408.00118.
    """
    return cap * jnp.tanh(x / cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitRule:
    """Computes logits from the products z of the head: cap · tanh((z / divisor) / cap).

    Every place that computes logits applies it: `CausalLM.logits`, the chunked loss, evaluation and
    generation.

    Attributes:
      divisor: Number that the products are divided by.
      cap: Soft cap; None for none.

    Raises:
      ValueError: A number is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> LogitRule(cap=30.0)(jnp.array([1.0, 1e6])).round(2)
      Array([ 1., 30.], dtype=float32)
    """

    divisor: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        check_positive("divisor", self.divisor)
        if self.cap is not None:
            check_positive("cap", self.cap)

    @property
    def is_identity(self) -> bool:
        """Whether the products are the logits."""
        return self.divisor == 1.0 and self.cap is None

    def __call__(self, products: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns the logits of the head's products."""
        logits = products if self.divisor == 1.0 else products / self.divisor
        return logits if self.cap is None else soft_cap(logits, self.cap)

    def slope(self, logits: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns the derivative of the logits with respect to the products."""
        slope = jnp.full_like(logits, 1.0 / self.divisor)
        if self.cap is None:
            return slope
        return slope * (1.0 - jnp.square(logits / self.cap))


PRODUCTS = LogitRule()
"""The rule of most families: the products of the head are the logits."""
