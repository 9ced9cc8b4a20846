"""Generation on the device: one program reads the prompts, one writes token after token.

B batch, P prompt tokens, N new tokens, V vocab. Each program is compiled once for a bucket of
shapes; everything else that differs between calls is an array.
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
    """What may differ between calls of one program; a pytree.

    Attributes:
      sampling: how tokens are drawn; None takes the likeliest, which is another program.
      row_keys: [B, 2], the data of each row's random key, for JAX's threefry generator.
      limits: the most tokens each row may get.
      ends: whether a token ends a continuation.
    """

    sampling: Sampling | None
    row_keys: UInt32[Array, "batch 2"]
    limits: Int32[Array, " batch"]
    ends: Bool[Array, " vocab"]


@struct.dataclass
class DecodeState:
    """What is written so far; a pytree.

    Attributes:
      cache: the keys and values of all tokens but each row's last one.
      last: [B], each row's last token, which the model has still to read.
      tokens: [B, N], the new tokens; what stands at `counts` and after it means nothing.
      counts: [B], how many new tokens each row has.
      done: [B], the rows that get no more.
      finite: [B], whether all logits that a token was chosen by were numbers.
      step: the number of columns of `tokens` that are written, a scalar.
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
    """Fills the cache with the prompts, all but the last token of each.

    The last token is read by the loop that writes, as every later one is: so there is one place
    where logits are computed and tokens chosen.

    Args:
      params: the model's parameters, adapters bound or merged.
      tokens: [B, P], the prompts without their last tokens, padded on the left: they end together.
      segment_ids: [B, P], 1 where there is a token, 0 at padding.
      last: [B], the last tokens.
      model: the model; static.
      new_tokens: N, for how many there is room; static.
    """
    batch, prompt = tokens.shape
    cache = model.init_cache(batch, prompt + new_tokens, model.execution.dtype)
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
      params: the model's parameters, adapters bound or merged.
      state: what is written so far.
      controls: what else there is to know.
      stopped: rows that are done for reasons known to the host.
      until: the number of columns to stop at in any case, at most N.
      model: the model; static.
    """
    state = dataclasses.replace(state, done=state.done | stopped)

    def goes_on(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    def write_one(state: DecodeState) -> DecodeState:
        segment_ids = (~state.done).astype(jnp.int32)
        hidden, cache = _read(model, params, state.last[:, None], segment_ids[:, None], state.cache)
        logits = model.logits(params, hidden[:, 0])
        return _write(dataclasses.replace(state, cache=cache), logits, controls)

    return jax.lax.while_loop(goes_on, write_one, state)


def _read(
    model: CausalLM,
    params: Tree,
    tokens: Int32[Array, "batch tokens"],
    segment_ids: Int32[Array, "batch tokens"],
    cache: KVCache,
) -> tuple[Float[Array, "batch tokens embed"], KVCache]:
    """The hidden states of the tokens, and the cache with them."""
    hidden, filled = model.hidden_states(params, tokens, segment_ids=segment_ids, cache=cache)
    return hidden, cast(KVCache, filled)


def _write(
    state: DecodeState, logits: Float32[Array, "batch vocab"], controls: Controls
) -> DecodeState:
    """Chooses each row's next token and writes it, in rows that are not done."""
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
    """A key for each row and step."""
    keys = jax.random.wrap_key_data(controls.row_keys, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
