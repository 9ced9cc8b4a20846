"""Scalings of rotary position embeddings to longer contexts, as formulas of their frequencies."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64

from peft_jax.core.validation import check_positive

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


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | ProportionalScaling
