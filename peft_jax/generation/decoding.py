"""Decodes on the device: one program reads prompts, another one writes tokens in a loop.

Axes: B batch, P prompt tokens, N new tokens, V vocab. Each program compiles once per bucket of
shapes. Everything else that differs between calls is an array.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, UInt32

from peft_jax.core import Tree
from peft_jax.generation.sampling import Sampling, draw
from peft_jax.models import CausalLM, KVCache


@struct.dataclass
class Controls:
    """Arrays that may differ between calls of one program; a pytree.

    Attributes:
      sampling: Sampling parameters; None decodes greedily, with another program.
      row_keys: Key data of each row for JAX's threefry generator, uint32 [B, 2].
      limits: Maximum number of new tokens of each row, int32 [B].
      ends: Whether a token ends a continuation, bool [V].
    """

    sampling: Sampling | None
    row_keys: UInt32[Array, "batch 2"]
    limits: Int32[Array, " batch"]
    ends: Bool[Array, " vocab"]


@struct.dataclass
class DecodeState:
    """State of the decoding loop; a pytree.

    Attributes:
      cache: Keys and values of all tokens but each row's last one.
      last: Last token of each row, which the model has not read yet, int32 [B].
      tokens: New tokens, int32 [B, N]; undefined from `counts` on.
      counts: Number of new tokens of each row, int32 [B].
      done: Whether a row is finished, bool [B].
      finite: Whether all logits of a row have been finite, bool [B].
      step: Number of written columns of `tokens`, int32 [].
    """

    cache: KVCache
    last: Int32[Array, " batch"]
    tokens: Int32[Array, "batch new"]
    counts: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    finite: Bool[Array, " batch"]
    step: Int32[Array, ""]


@functools.partial(jax.jit, static_argnames=("model", "new_tokens"))
def read_prompts(
    params: Tree,
    tokens: Int32[Array, "batch prompt"],
    segment_ids: Int32[Array, "batch prompt"],
    last: Int32[Array, " batch"],
    *,
    model: CausalLM,
    new_tokens: int,
) -> DecodeState:
    """Fills the cache with all but the last token of each prompt.

    The decoding loop reads the last token as it reads every later one. So only one place computes
    logits and selects tokens.

    Args:
      params: Model parameters, with adapters bound or merged.
      tokens: Left-padded prompts without their last tokens, int32 [B, P].
      segment_ids: 1 at tokens and 0 at padding, int32 [B, P].
      last: Last tokens, int32 [B].
      model: Model; static.
      new_tokens: Capacity N for new tokens; static.
    """
    batch, prompt = tokens.shape
    cache = model.start_cache(params, batch, prompt + new_tokens, model.execution.dtype)
    _, cache = _read(model, params, tokens, segment_ids, cache)
    return DecodeState(
        cache=cache,
        last=last,
        tokens=jnp.zeros((batch, new_tokens), jnp.int32),
        counts=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        finite=jnp.ones((batch,), bool),
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def write_tokens(
    params: Tree,
    state: DecodeState,
    controls: Controls,
    stopped: Bool[Array, " batch"],
    until: Int32[Array, ""],
    *,
    model: CausalLM,
) -> DecodeState:
    """Writes tokens until every row is done.

    Args:
      params: Model parameters, with adapters bound or merged.
      state: State so far; donated.
      controls: Sampling, limits and end tokens.
      stopped: Rows that the host has stopped, bool [B].
      until: Number of columns at which to pause, at most N.
      model: Model; static.
    """
    state = dataclasses.replace(state, done=state.done | stopped)

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    def write_one(state: DecodeState) -> DecodeState:
        segment_ids = (~state.done).astype(jnp.int32)
        hidden, cache = _read(model, params, state.last[:, None], segment_ids[:, None], state.cache)
        logits = model.logits(params, hidden[:, 0])
        return _write(dataclasses.replace(state, cache=cache), logits, controls)

    return jax.lax.while_loop(unfinished, write_one, state)


def _read(
    model: CausalLM,
    params: Tree,
    tokens: Int32[Array, "batch tokens"],
    segment_ids: Int32[Array, "batch tokens"],
    cache: KVCache,
) -> tuple[Float[Array, "batch tokens embed"], KVCache]:
    """Returns the hidden states of the tokens, and the cache with their keys and values."""
    hidden, filled = model.hidden_states(params, tokens, segment_ids=segment_ids, cache=cache)
    return hidden, cast(KVCache, filled)


def _write(
    state: DecodeState, logits: Float32[Array, "batch vocab"], controls: Controls
) -> DecodeState:
    """Selects and writes the next token of each unfinished row."""
    if controls.sampling is None:
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        chosen = draw(logits, controls.sampling, _step_keys(controls, state.step))
    chosen = jnp.where(state.done, 0, chosen)
    counts = state.counts + (~state.done).astype(jnp.int32)
    numbers = jnp.isfinite(jnp.max(logits, axis=-1))
    return dataclasses.replace(
        state,
        last=chosen,
        tokens=jax.lax.dynamic_update_slice_in_dim(
            state.tokens, chosen[:, None], state.step, axis=1
        ),
        counts=counts,
        done=state.done | controls.ends[chosen] | (counts >= controls.limits),
        finite=state.finite & (numbers | state.done),
        step=state.step + 1,
    )


def _step_keys(controls: Controls, step: Int32[Array, ""]) -> Key[Array, " batch"]:
    """Returns each row's key for a step."""
    keys = jax.random.wrap_key_data(controls.row_keys, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
