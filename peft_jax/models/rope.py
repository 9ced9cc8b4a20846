"""Rotary position embeddings and their scaling to longer contexts.

B batch, T tokens, H head dimension.

Source: Su et al., 2021, arXiv 2104.09864. Feature i is paired with feature i + H/2, as in GPT-NeoX
and in Hugging Face's Llama checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from peft_jax.core import did_you_mean
from peft_jax.core.validation import check_positive
from peft_jax.models.attributes import check_kind, given

Frequencies = Float64[np.ndarray, "pairs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: divides every frequency by `factor`.

    Attributes:
      factor: Ratio of the new context length to the original one.

    Source: Chen et al., 2023, arXiv 2306.15595.
    """

    factor: float

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """Returns the scaled frequencies, in radians per token."""
        del theta
        return frequencies / self.factor

    @property
    def magnitude(self) -> float:
        """Multiplier of cosines and sines."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: divides low frequencies by `factor` and keeps high ones.

    Frequencies in between are interpolated.

    Attributes:
      factor: Divisor of low frequencies.
      low_freq_factor: Wavelengths above original / low_freq_factor count as low frequencies.
      high_freq_factor: Wavelengths below original / high_freq_factor count as high frequencies.
      original_max_position_embeddings: Context length of pretraining, in tokens.

    Source: the `llama3` rope type of Meta's Llama 3.1 release.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_positive(field.name, getattr(self, field.name))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}, but must be above low_freq_factor ="
                f" {self.low_freq_factor}"
            )

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """Returns the scaled frequencies, in radians per token."""
        del theta
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)

    @property
    def magnitude(self) -> float:
        """Multiplier of cosines and sines."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: interpolates low frequencies, keeps high ones and scales the attention scores.

    Attributes:
      factor: Ratio of the new context length to the original one.
      original_max_position_embeddings: Context length of pretraining, in tokens.
      attention_factor: Multiplier of cosines and sines; None for the paper's 0.1 ln(factor) + 1.
      beta_fast: Pairs with more turns than this over the original context are kept.
      beta_slow: Pairs with fewer turns than this are fully interpolated.
      truncate: Whether to round the ends of the ramp outwards to whole pairs.

    Source: Peng et al., 2023, arXiv 2309.00071, section 3.2 and eq. 21-23.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            check_positive(name, getattr(self, name))

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """Returns the scaled frequencies, in radians per token."""
        pairs = len(frequencies)
        low, high = (self._pair_with_turns(beta, pairs, theta) for beta in self._betas)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        interpolated = np.clip((np.arange(pairs) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return frequencies * (1.0 - interpolated + interpolated / self.factor)

    @property
    def _betas(self) -> tuple[float, float]:
        return self.beta_fast, self.beta_slow

    def _pair_with_turns(self, turns: float, pairs: int, theta: float) -> float:
        """Returns the fractional index of the pair with so many turns over the original context."""
        wavelength = self.original_max_position_embeddings / turns
        return pairs * math.log(wavelength / (2 * math.pi)) / math.log(theta)

    @property
    def magnitude(self) -> float:
        """Multiplier of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


Scaling = LinearScaling | Llama3Scaling | YarnScaling

_SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotarySettings:
    """Settings of a rotary embedding.

    Attributes:
      head_dim: H; even.
      theta: Base; pair i is rotated by theta^(-2i/H) radians per token.
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

    def frequencies(self) -> Frequencies:
        """Returns the scaled frequency of each pair, in radians per token, in float64.

        Example:
          >>> RotarySettings(head_dim=4, theta=100.0).frequencies()
          array([1. , 0.1])
        """
        pairs = np.arange(self.head_dim // 2, dtype=np.float64)
        frequencies = self.theta ** (-2.0 * pairs / self.head_dim)
        return frequencies if self.scaling is None else self.scaling.scale(frequencies, self.theta)

    def tables(
        self, positions: Int[Array, "batch tokens"]
    ) -> tuple[Float32[Array, "batch tokens pairs"], Float32[Array, "batch tokens pairs"]]:
        """Returns cosines and sines [B, T, H/2], times the scaling's magnitude."""
        frequencies = jnp.asarray(self.frequencies(), jnp.float32)
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
) -> Float[Array, "batch tokens *heads head_dim"]:
    """Rotates features i and i + H/2 of every head by their pair's angle, and scales them."""
    axes = tuple(range(2, x.ndim - 1))
    cosines, sines = jnp.expand_dims(cosines, axes), jnp.expand_dims(sines, axes)
    first, second = jnp.split(x.astype(jnp.float32) * scale, 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


ROTARY_ATTRIBUTES = frozenset(
    {
        "max_position_embeddings",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
)
"""Attributes of `config.json` that `read_rotary` reads."""


def read_rotary(hf_config: Mapping[str, Any], *, head_dim: int) -> RotarySettings:
    """Reads the rotary embedding from a `config.json` of transformers 4 or 5.

    transformers 5 writes `rope_parameters`, which holds `rope_type` and `rope_theta`. Earlier
    versions write `rope_theta` and `rope_scaling`, which holds `type` or `rope_type`.

    Args:
      hf_config: The parsed `config.json`.
      head_dim: H.

    Raises:
      ValueError: The rope type is not implemented, or one of its parameters is missing or
        unknown.
    """
    for name in ("rope_parameters", "rope_scaling"):
        check_kind(hf_config, name)
    new, old = (hf_config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ValueError(
            f"config.json sets rope_parameters = {new!r} and rope_scaling = {old!r}, which disagree"
        )
    parameters = {name: value for name, value in (new or old).items() if value is not None}
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"config.json's rope_parameters differ by layer type ({', '.join(nested)}), which is"
            " not implemented"
        )
    for name in ("rope_theta", "partial_rotary_factor", "rope_type", "type"):
        check_kind(parameters, name, where="config.json's rope parameters set")
    theta = parameters.pop("rope_theta", given(hf_config, "rope_theta", 10000.0))
    partial = parameters.pop(
        "partial_rotary_factor", given(hf_config, "partial_rotary_factor", 1.0)
    )
    if partial != 1.0:
        raise ValueError(
            f"config.json sets partial_rotary_factor = {partial!r}, but only 1.0 is implemented"
        )
    old_type = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", old_type)
    return RotarySettings(
        head_dim=head_dim,
        theta=float(theta),
        scaling=_read_scaling(kind, parameters, hf_config),
    )


def _read_scaling(
    kind: str, parameters: dict[str, Any], hf_config: Mapping[str, Any]
) -> Scaling | None:
    if kind == "default":
        known: set[str] = set()
    elif kind in _SCALINGS:
        known = {field.name for field in dataclasses.fields(_SCALINGS[kind])}
    else:
        raise ValueError(
            f"config.json sets the rope type {kind!r}, which is not implemented"
            f"{did_you_mean(kind, ('default', *_SCALINGS))}"
        )
    if "original_max_position_embeddings" in known:
        original = given(
            hf_config,
            "original_max_position_embeddings",
            parameters.get(
                "original_max_position_embeddings", hf_config.get("max_position_embeddings")
            ),
        )
        parameters = {**parameters, "original_max_position_embeddings": original}
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(
                f"config.json sets {name} = {value!r} for the rope type {kind!r}, which is not"
                f" known{did_you_mean(name, known)}"
            )
    if kind == "default":
        return None
    for name in parameters:
        check_kind(parameters, name, where="config.json's rope parameters set")
    settings = _SCALINGS[kind]
    required = {
        field.name
        for field in dataclasses.fields(settings)
        if field.default is dataclasses.MISSING and parameters.get(field.name) is None
    }
    if required:
        raise ValueError(
            f"config.json sets the rope type {kind!r} without {', '.join(sorted(required))}"
        )
    return settings(**parameters)
