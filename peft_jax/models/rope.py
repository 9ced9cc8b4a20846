"""Rotary position embeddings.

B batch, T tokens, H head dimension.

Source: Su et al., 2021, arXiv 2104.09864. Feature i is paired with feature i + H/2, as in GPT-NeoX
and in Hugging Face's Llama checkpoints, or with its neighbor, as in the paper.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core.validation import check_positive
from peft_jax.models.rope_scaling import Frequencies, LongRopeScaling, Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotarySettings:
    """Settings of a rotary embedding.

    Attributes:
      head_dim: Number of a head's features that are rotated, the first ones; even. Usually H.
      theta: Base; pair i is rotated by theta^(-2i/head_dim) radians per token.
      scaling: Scaling of the frequencies to a longer context, or None.
    """

    head_dim: int
    theta: float = 10000.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        check_positive("rope_theta", self.theta)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}, but must be even: rotary embeddings pair a head's"
                " features"
            )
        if isinstance(self.scaling, LongRopeScaling):
            found = len(self.scaling.short_factor)
            if found != self.head_dim // 2:
                raise ValueError(
                    f"short_factor has {found} numbers, but must have one for each of the"
                    f" {self.head_dim // 2} pairs of rotated features"
                )

    def frequencies(self) -> Frequencies:
        """Returns the scaled frequency of each pair, in radians per token, in float64.

        Example:
          >>> RotarySettings(head_dim=4, theta=100.0).frequencies()
          array([1. , 0.1])
        """
        frequencies = self._unscaled()
        return frequencies if self.scaling is None else self.scaling.scale(frequencies, self.theta)

    def _unscaled(self) -> Frequencies:
        pairs = np.arange(self.head_dim // 2, dtype=np.float64)
        return self.theta ** (-2.0 * pairs / self.head_dim)

    def tables(
        self,
        positions: Int[Array, "batch tokens"],
        *,
        slots: int | Int[Array, ""] | None = None,
    ) -> tuple[Float32[Array, "batch tokens pairs"], Float32[Array, "batch tokens pairs"]]:
        """Returns cosines and sines [B, T, head_dim/2], times the scaling's magnitude.

        LongRoPE's set of factors is chosen for all rows at once: the long one if a position lies
        beyond the original context. With a cache, it is the long one if the cache has more slots
        than the original context has tokens, so that all keys are rotated by the same angles.

        Args:
          positions: [B, T].
          slots: Number of slots of the cache, or of positions of longer rows beside these; None
            without them.
        """
        frequencies = jnp.asarray(self.frequencies(), jnp.float32)
        if isinstance(self.scaling, LongRopeScaling):
            long = jnp.asarray(self.scaling.scale_long(self._unscaled()), jnp.float32)
            length = jnp.max(positions) + 1 if slots is None else slots
            is_long = length > self.scaling.original_max_position_embeddings
            frequencies = jnp.where(is_long, long, frequencies)
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        magnitude = jnp.float32(1.0 if self.scaling is None else self.scaling.magnitude)
        cosines, sines = jax.lax.platform_dependent(
            angles, cpu=_computed_once, default=lambda angles: (jnp.cos(angles), jnp.sin(angles))
        )
        return cosines * magnitude, sines * magnitude


def _computed_once(angles: Float32[Array, "*shape"]) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, computed in a loop that XLA cannot fuse into their users.

    On a CPU, XLA would otherwise recompute them for every head of every unrolled layer.
    """
    both = jax.lax.map(
        lambda index: jax.lax.cond(index == 0, jnp.cos, jnp.sin, angles), jnp.arange(2)
    )
    return both[0], both[1]


def rotate(
    x: Float[Array, "batch tokens *heads head_dim"],
    cosines: Float32[Array, "batch tokens pairs"],
    sines: Float32[Array, "batch tokens pairs"],
    *,
    scale: float = 1.0,
    neighbors: bool = False,
) -> Float[Array, "batch tokens *heads head_dim"]:
    """Rotates features of every head by their pair's angle, and scales all features.

    With P pairs, the first 2 P features are rotated, i along with i + P. If pairs are neighbors,
    2 i is rotated along with 2 i + 1, and stored at i and i + P, which changes no product of
    queries and keys.

    Args:
      x: Queries or keys.
      cosines: Cosines of the pairs' angles.
      sines: Their sines.
      scale: Multiplier of all features.
      neighbors: Whether pairs are neighbors.

    Example:
      >>> x, angle = jnp.arange(4.0).reshape(1, 1, 4), jnp.zeros((1, 1, 2))
      >>> rotate(x, jnp.cos(angle), jnp.sin(angle), neighbors=True).tolist()
      [[[0.0, 2.0, 1.0, 3.0]]]
    """
    axes, pairs = tuple(range(2, x.ndim - 1)), cosines.shape[-1]
    cosines, sines = jnp.expand_dims(cosines, axes), jnp.expand_dims(sines, axes)
    wide = x.astype(jnp.float32) * scale
    first, second, *rest = jnp.split(wide, _ends(x, pairs), axis=-1)
    if neighbors:
        turned = wide[..., : 2 * pairs].reshape(*x.shape[:-1], pairs, 2)
        first, second = turned[..., 0], turned[..., 1]
    both = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate((*both, *rest), axis=-1).astype(x.dtype)


def _ends(x: Array, pairs: int) -> list[int]:
    """Returns where to split a head: after the first features of the pairs, and the second."""
    return [pairs] if x.shape[-1] == 2 * pairs else [pairs, 2 * pairs]
