"""Rotary position embeddings and their scaling to longer contexts.

B batch, T tokens, H head dimension.

Source: Su et al., 2021, arXiv 2104.09864. Feature i is paired with feature i + H/2, as in GPT-NeoX
and in Hugging Face's Llama checkpoints, or with its neighbor, as in the paper.
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
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}, but must be at least"
                f" low_freq_factor = {self.low_freq_factor}"
            )

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """Returns the scaled frequencies, in radians per token."""
        del theta
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        between = self.high_freq_factor - self.low_freq_factor
        if between:
            kept = np.clip((turns - self.low_freq_factor) / between, 0.0, 1.0)
        else:
            kept = (turns >= self.low_freq_factor).astype(np.float64)
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
      attention_factor: Multiplier of cosines and sines; None for the paper's 0.1 ln(factor) + 1,
        or for the quotient that `mscale` and `mscale_all_dim` give.
      beta_fast: Pairs with more turns than this over the original context are kept.
      beta_slow: Pairs with fewer turns than this are fully interpolated.
      truncate: Whether to round the ends of the ramp outwards to whole pairs.
      mscale: With `mscale_all_dim`, the factor is (0.1 mscale ln(factor) + 1) divided by the same
        with `mscale_all_dim`.
      mscale_all_dim: See `mscale`.

    Source: Peng et al., 2023, arXiv 2309.00071, section 3.2 and eq. 21-23.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

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
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def score_factor(self) -> float:
        """Multiplier of attention's scores in DeepSeek's models, beside `magnitude`."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE: divides each frequency by a factor of its own, of one set for each length.

    Attributes:
      short_factor: Divisors for rows within the original context, one for each pair.
      long_factor: Divisors for longer rows.
      original_max_position_embeddings: Context length of pretraining, in tokens.
      factor: Ratio of the new context length to the original one.
      attention_factor: Multiplier of cosines and sines; None for
        sqrt(1 + ln(factor) / ln(original)).

    Source: Ding et al., 2024, arXiv 2402.13753, with the two sets of Phi-3.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("original_max_position_embeddings", "factor"):
            check_positive(name, getattr(self, name))
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                check_positive(name, value)
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"short_factor has {len(self.short_factor)} numbers, but must have as many as"
                f" long_factor = {len(self.long_factor)}"
            )

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """Returns the frequencies of rows within the original context, in radians per token."""
        del theta
        return frequencies / np.asarray(self.short_factor)

    def scale_long(self, frequencies: Frequencies) -> Frequencies:
        """Returns the frequencies of longer rows, in radians per token."""
        return frequencies / np.asarray(self.long_factor)

    @property
    def magnitude(self) -> float:
        """Multiplier of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalScaling:
    """Rotates the pairs of a part of the frequencies, the highest, and leaves the others.

    Attributes:
      part: Part of the pairs that is rotated.
      factor: Divisor of the frequencies.

    Source: the `proportional` rope type of Gemma 4.
    """

    part: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("part", "factor"):
            check_positive(name, getattr(self, name))

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """Returns the scaled frequencies, in radians per token."""
        del theta
        pairs = np.arange(len(frequencies))
        rotated = pairs < int(self.part * 2 * len(frequencies) // 2)
        return np.where(rotated, frequencies, 0.0) / self.factor

    @property
    def magnitude(self) -> float:
        """Multiplier of cosines and sines."""
        return 1.0


_ORIGINAL = "original_max_position_embeddings"

Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | ProportionalScaling

_SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
    "proportional": ProportionalScaling,
}


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


def read_rotary(
    hf_config: Mapping[str, Any],
    *,
    head_dim: int,
    default_theta: float = 10000.0,
    default_part: float | None = None,
) -> RotarySettings:
    """Reads the rotary embedding from a `config.json` of transformers 4 or 5.

    transformers 5 writes `rope_parameters`, which holds `rope_type` and `rope_theta`. Earlier
    versions write `rope_theta` and `rope_scaling`, which holds `type` or `rope_type`.

    Args:
      hf_config: The parsed `config.json`.
      head_dim: H.
      default_theta: Base where none is given.
      default_part: Part of a head's features that is rotated where none is given; None if the
        family rotates all features.

    Raises:
      ValueError: The rope type is not implemented, or one of its parameters is missing or
        unknown.
    """
    parameters = _joined_parameters(hf_config)
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"config.json's rope_parameters differ by layer type ({', '.join(nested)}), which is"
            " not implemented"
        )
    theta = given(hf_config, "rope_theta", default_theta)
    return _read_parameters(parameters, hf_config, head_dim, theta, default_part)


def read_rotary_by_type(
    hf_config: Mapping[str, Any], *, head_dim: int, thetas: Mapping[str, float]
) -> dict[str, RotarySettings]:
    """Reads the rotary embedding of each type of layer, as Gemma 3 has them.

    transformers 5 writes `rope_parameters` by type. Earlier versions write `rope_theta` and
    `rope_scaling` for full attention, and `rope_local_base_freq` for sliding attention.

    Args:
      hf_config: The parsed `config.json`.
      head_dim: H.
      thetas: Base of each type where none is given.

    Raises:
      ValueError: As `read_rotary`, or the parameters are not given by type.
    """
    bases = {
        "full_attention": given(hf_config, "rope_theta", thetas["full_attention"]),
        "sliding_attention": given(hf_config, "rope_local_base_freq", thetas["sliding_attention"]),
    }
    by_type: dict[str, Any] = {"full_attention": hf_config.get("rope_scaling")}
    check_kind(hf_config, "rope_scaling")
    if hf_config.get("rope_parameters") is not None:
        check_kind(hf_config, "rope_parameters")
        by_type = {**by_type, **hf_config["rope_parameters"]}
    for name, value in by_type.items():
        if name not in bases or not isinstance(value, Mapping | None):
            raise ValueError(
                f"config.json's rope_parameters set {name} = {value!r}, but must have parameters"
                f" for {' and '.join(bases)}"
            )
    return {
        name: _read_parameters(
            {key: value for key, value in (by_type.get(name) or {}).items() if value is not None},
            hf_config,
            head_dim,
            theta,
            None,
        )
        for name, theta in bases.items()
    }


def _joined_parameters(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("rope_parameters", "rope_scaling"):
        check_kind(hf_config, name)
    new, old = (hf_config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ValueError(
            f"config.json sets rope_parameters = {new!r} and rope_scaling = {old!r}, which disagree"
        )
    return {name: value for name, value in (new or old).items() if value is not None}


def _read_parameters(
    parameters: dict[str, Any],
    hf_config: Mapping[str, Any],
    head_dim: int,
    default_theta: float,
    default_part: float | None,
) -> RotarySettings:
    for name in ("rope_theta", "partial_rotary_factor", "rope_type", "type"):
        check_kind(parameters, name, where="config.json's rope parameters set")
    theta = parameters.pop("rope_theta", default_theta)
    if parameters.get("rope_type") == "proportional":
        # The other pairs keep their places, with a frequency of zero.
        parameters["part"] = parameters.pop("partial_rotary_factor", 1.0)
        default_part = 1.0
    part = parameters.pop(
        "partial_rotary_factor", given(hf_config, "partial_rotary_factor", default_part or 1.0)
    )
    if part != 1.0 and default_part is None:
        raise ValueError(
            f"config.json sets partial_rotary_factor = {part!r}, but only 1.0 is implemented"
        )
    if part > 1.0:
        raise ValueError(
            f"config.json sets partial_rotary_factor = {part!r}, but must have at most 1.0"
        )
    old_type = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", old_type)
    return RotarySettings(
        head_dim=int(head_dim * part),
        theta=float(theta),
        scaling=_read_scaling(kind, parameters, hf_config),
    )


def _as_float(name: str, value: Any) -> Any:
    """Returns the numbers of a parameter as floats, which JSON may write without a point."""
    if isinstance(value, list):
        return tuple(map(float, value))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and name != _ORIGINAL else value


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
    if _ORIGINAL in known:
        written = parameters.get(_ORIGINAL, hf_config.get("max_position_embeddings"))
        original = given(hf_config, _ORIGINAL, written)
        parameters = {**parameters, _ORIGINAL: original}
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
    if kind == "longrope" and parameters[_ORIGINAL] is not None:
        longest = given(hf_config, "max_position_embeddings", parameters[_ORIGINAL])
        parameters.setdefault("factor", longest / parameters[_ORIGINAL])
    parameters = {name: _as_float(name, value) for name, value in parameters.items()}
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
