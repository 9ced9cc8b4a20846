"""Samples the next token from logits.

Axes: B batch, V vocab.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from peft_jax.generation.settings import GenerationSettings


@struct.dataclass
class Sampling:
    """Sampling parameters as arrays, so that other values need no compilation; a pytree.

    Attributes:
      temperature: Divisor of logits, above 0; float32 [].
      top_k: Number of likeliest tokens to keep; V keeps all; int32 [].
      top_p: Minimum probability of the kept tokens together; 1 keeps all; float32 [].
    """

    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]

    @classmethod
    def of(cls, settings: GenerationSettings, vocab_size: int) -> "Sampling":
        """Returns the sampling parameters of `settings`."""
        top_k = vocab_size if settings.top_k is None else min(settings.top_k, vocab_size)
        return cls(
            temperature=jax.device_put(np.float32(settings.temperature)),
            top_k=jax.device_put(np.int32(top_k)),
            top_p=jax.device_put(np.float32(settings.top_p)),
        )


def draw(
    logits: Float32[Array, "batch vocab"], sampling: Sampling, keys: Key[Array, " batch"]
) -> Int32[Array, " batch"]:
    """Samples the next token of each row with the row's own key.

    Logits are divided by the temperature. Then the `top_k` likeliest are kept, and of these the
    fewest that reach the probability `top_p`. This is the order of transformers' `generate`.
    """
    # Subtracting the largest first avoids overflow at low temperatures.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    scaled = keep_likeliest((logits - largest) / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def keep_likeliest(
    logits: Float32[Array, "batch vocab"], sampling: Sampling
) -> Float32[Array, "batch vocab"]:
    """Sets logits that `top_k` and then `top_p` exclude to minus infinity.

    Tokens as likely as the last one kept are kept too.
    """
    vocab_size = logits.shape[-1]
    logits = jax.lax.cond(
        sampling.top_k < vocab_size,
        lambda: jnp.where(top_k_mask(logits, sampling.top_k), logits, -jnp.inf),
        lambda: logits,
    )
    return jax.lax.cond(
        sampling.top_p < 1,
        lambda: jnp.where(top_p_mask(logits, sampling.top_p), logits, -jnp.inf),
        lambda: logits,
    )


def top_k_mask(
    logits: Float32[Array, "batch vocab"], top_k: Int32[Array, ""]
) -> Bool[Array, "batch vocab"]:
    """Returns a mask of the `top_k` largest logits of each row, and any equal to the last."""

    def enough(kept: Bool[Array, "batch vocab"]) -> Bool[Array, " batch"]:
        return jnp.sum(kept, axis=-1, dtype=jnp.int32) >= top_k

    return _fewest_largest(logits, enough)


def top_p_mask(
    logits: Float32[Array, "batch vocab"], top_p: Float32[Array, ""]
) -> Bool[Array, "batch vocab"]:
    """Returns a mask of the fewest largest logits that reach `top_p`, and any equal to the last."""
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    wanted = top_p * jnp.sum(mass, axis=-1)

    def enough(kept: Bool[Array, "batch vocab"]) -> Bool[Array, " batch"]:
        return jnp.sum(jnp.where(kept, mass, 0.0), axis=-1) >= wanted

    return _fewest_largest(logits, enough)


def _fewest_largest(
    logits: Float32[Array, "batch vocab"],
    enough: Callable[[Bool[Array, "batch vocab"]], Bool[Array, " batch"]],
) -> Bool[Array, "batch vocab"]:
    """Returns a mask of the fewest largest logits of each row that are `enough`.

    The smallest kept logit is found bit by bit, in 32 passes over the logits. Sorting takes many
    times as long.
    """
    ranks = _ranks(logits)

    def set_bit(passed: Int32[Array, ""], smallest: UInt32[Array, " batch"]):
        bit = jnp.uint32(1) << (31 - passed).astype(jnp.uint32)
        higher = smallest | bit
        return jnp.where(enough(ranks >= higher[:, None]), higher, smallest)

    start = jnp.zeros(logits.shape[0], jnp.uint32)
    smallest = jax.lax.fori_loop(0, 32, set_bit, start)
    return ranks >= smallest[:, None]


def _ranks(values: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns integers in the order of the values: their bits, inverted if negative."""
    values = jnp.where(values == 0.0, 0.0, values)  # -0.0 and 0.0 must have the same rank
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
