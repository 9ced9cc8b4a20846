"""Continues tokenized prompts in batches, each with one loop on the device."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int32, UInt32

from peft_jax.adapters import StackedAdapters
from peft_jax.core import VIRTUAL, Tree, VirtualTokens
from peft_jax.generation.decoding import Controls, DecodeState, read_prompts, write_tokens
from peft_jax.generation.ends import end_tokens
from peft_jax.generation.padded_prompts import PaddedPrompts, length_bucket
from peft_jax.generation.sampling import Sampling
from peft_jax.generation.settings import GenerationSettings
from peft_jax.generation.stats import GenerationStats, Stopwatch
from peft_jax.models import CausalLM

FinishReason = Literal["eos", "stop_string", "max_new_tokens", "context"]
"""Reason for a continuation's end: an end token, a stop string, the maximum number of new tokens,
or a full context."""

FindStop = Callable[[int, Int32[np.ndarray, " new"]], int | None]
"""Maps a prompt's index and new tokens to the number of tokens to keep; None to continue.
The result must not change when more tokens are added."""

STOP_INTERVAL = 32
"""Number of tokens between two searches for stop strings, which only the host can find."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Continuation of one prompt.

    Attributes:
      tokens: New tokens including the end token, int32 [n].
      finish_reason: Reason for its end.
    """

    tokens: Int32[np.ndarray, " new"]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Result of `generate`.

    Attributes:
      completions: Continuations, in the order of the prompts.
      stats: Counts and seconds.
    """

    completions: tuple[Completion, ...]
    stats: GenerationStats


def generate(
    model: CausalLM,
    params: Tree,
    prompts: Sequence[Sequence[int] | np.ndarray],
    settings: GenerationSettings | None = None,
    *,
    find_stop: FindStop | None = None,
    row_sharding: jax.sharding.NamedSharding | None = None,
    adapters: StackedAdapters | None = None,
    row_adapters: Sequence[str | None] = (),
) -> Generated:
    """Continues tokenized prompts on the device.

    Prompts and batches are padded to buckets. Each bucket compiles two programs once, and another
    one when tokens are first sampled. One loop on the device writes a batch and ends when all its
    rows have ended. The host does not see single tokens.

    Args:
      model: Model. Parameters should have its compute dtype; others are cast again for every token.
      params: Parameters of the model, with adapters bound (`AdapterSpec.bind`) or merged.
      prompts: Tokens of each prompt.
      settings: Generation settings. Default: greedy decoding.
      find_stop: Finds where a continuation stops. With it the loop pauses every `STOP_INTERVAL`
        tokens, which does not change the result.
      row_sharding: Sharding of batch rows over the parameters' devices, see
        `peft_jax.parallel.batch_sharding`. None: every device computes all rows. Only for a single
        process.
      adapters: Adapters of which each prompt uses one; `params` are then those of the base.
      row_adapters: Name of each prompt's adapter, or None for the base alone.

    Returns:
      The continuations, without their prompts.

    Raises:
      ValueError: A prompt is empty, fills the model's context, or has tokens outside the
        vocabulary; an end token is outside the vocabulary; or `row_adapters` does not name an
        adapter for each prompt.
      FloatingPointError: The logits are not finite.

    Example:
      >>> from peft_jax.models import build_model
      >>> model = build_model({
      ...     "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1,
      ...     "num_attention_heads": 2, "intermediate_size": 16})
      >>> params = model.init_params(jax.random.key(0))
      >>> settings = GenerationSettings(max_new_tokens=3, eos_ids=())
      >>> found = generate(model, params, [[1, 2, 3], [4]], settings)
      >>> [completion.tokens.shape for completion in found.completions]
      [(3,), (3,)]
    """
    settings = settings or GenerationSettings()
    if settings.eos_ids is None:
        settings = dataclasses.replace(settings, eos_ids=end_tokens(model))
    context = context_length(model, params)
    rows = [_as_tokens(index, prompt, model, context) for index, prompt in enumerate(prompts)]
    numbers = _adapter_numbers(adapters, row_adapters, len(rows))
    row_keys = _row_keys(rows, settings.seed)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    completions: dict[int, Completion] = {}
    stats = GenerationStats()
    for start in range(0, len(rows), settings.batch_size):
        indices = by_length[start : start + settings.batch_size]
        found, spent = _generate_batch(
            model,
            params if adapters is None else _ByRow(adapters, params, numbers[indices]),
            {index: rows[index] for index in indices},
            row_keys[indices],
            settings,
            find_stop,
            row_sharding,
        )
        completions |= found
        stats += spent
    in_order = tuple(completions[index] for index in range(len(rows)))
    return Generated(completions=in_order, stats=stats)


def context_length(model: CausalLM, params: Tree) -> int | None:
    """Returns the number of tokens that a row can have; None if it is unlimited (ALiBi).

    Args:
      model: Model.
      params: Its parameters. Virtual tokens that are bound take a part of the context.
    """
    longest = getattr(model.config, "max_positions", None)
    virtual: VirtualTokens | None = params.get(VIRTUAL)
    return longest if longest is None or virtual is None else longest - virtual.count


def _as_tokens(
    index: int, prompt: Sequence[int] | np.ndarray, model: CausalLM, context: int | None
) -> Int32[np.ndarray, " prompt"]:
    """Returns a prompt as an array, or rejects it if the model cannot continue it."""
    tokens = np.asarray(prompt, np.int64)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(
            f"prompt {index} must be a sequence of at least one token, but has the shape"
            f" {list(tokens.shape)}"
        )
    unknown = tokens[(tokens < 0) | (tokens >= model.config.vocab_size)]
    if unknown.size:
        raise ValueError(
            f"prompt {index} has the token {unknown[0]}, but the model's tokens are 0 to"
            f" {model.config.vocab_size - 1}"
        )
    if context is not None and tokens.size >= context:
        raise ValueError(
            f"prompt {index} has {tokens.size} tokens, but the model's context is {context}; give"
            f" at most {context - 1}"
        )
    return tokens.astype(np.int32)


def _row_keys(rows: Sequence[np.ndarray], seed: int) -> UInt32[np.ndarray, "rows 2"]:
    """Returns each row's key data: a digest of the seed, the prompt and its repetition count."""
    seen: collections.Counter[bytes] = collections.Counter()
    keys = np.zeros((len(rows), 2), np.uint32)
    for index, row in enumerate(rows):
        prompt = row.astype("<i4").tobytes()
        text = f"{seed} {seen[prompt]} ".encode() + prompt
        keys[index] = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), "<u4")
        seen[prompt] += 1
    return keys


@dataclasses.dataclass(frozen=True)
class _ByRow:
    """Parameters of the base, with adapters for the rows of a batch, int32 [rows]."""

    adapters: StackedAdapters
    params: Tree
    numbers: Int32[np.ndarray, " rows"]

    def bind(self, rows: int) -> Tree:
        """Returns the parameters for a batch that is padded to a number of rows."""
        padding = (0, rows - len(self.numbers))
        return self.adapters.bind(self.params, jax.device_put(np.pad(self.numbers, padding)))


def _adapter_numbers(
    adapters: StackedAdapters | None, names: Sequence[str | None], prompts: int
) -> Int32[np.ndarray, " prompts"]:
    """Returns the number of each prompt's adapter; empty without adapters."""
    if adapters is None:
        if names:
            raise ValueError(f"row_adapters is {list(names)}, but adapters is None; give both")
        return np.zeros(0, np.int32)
    if len(names) != prompts:
        raise ValueError(
            f"row_adapters has {len(names)} names, but there are {prompts} prompts; name an adapter"
            " for each, or None for the base alone"
        )
    return adapters.rows(names)


def _generate_batch(
    model: CausalLM,
    params: Tree | _ByRow,
    prompts: dict[int, np.ndarray],
    row_keys: UInt32[np.ndarray, "rows 2"],
    settings: GenerationSettings,
    find_stop: FindStop | None,
    row_sharding: jax.sharding.NamedSharding | None,
) -> tuple[dict[int, Completion], GenerationStats]:
    """Continues a batch of prompts, given by index."""
    put_rows = functools.partial(jax.device_put, device=row_sharding)
    padded = PaddedPrompts.of(list(prompts.values()), multiple=_parts(row_sharding))
    filling = (0, len(padded.empty) - len(prompts))
    if isinstance(params, _ByRow):
        params = params.bind(len(padded.empty))
    context = context_length(model, params)
    limits = np.pad(_limits(list(prompts.values()), context, settings), filling)
    controls = Controls(
        sampling=None if settings.greedy else Sampling.of(settings, model.config.vocab_size),
        row_keys=put_rows(np.pad(row_keys, (filling, (0, 0)))),
        limits=put_rows(limits),
        ends=jax.device_put(_ends(settings, model)),
    )
    most = int(limits.max())
    stopwatch = Stopwatch()
    with stopwatch("prompt"):
        state = jax.block_until_ready(
            read_prompts(
                params,
                put_rows(padded.tokens),
                put_rows(padded.segment_ids),
                put_rows(padded.last),
                model=model,
                new_tokens=length_bucket(most),
            )
        )
    stops = _Stops(find_stop, list(prompts), padded.empty)
    interval = most if find_stop is None else STOP_INTERVAL
    until = 0
    while until < most and not stops.all_done:
        until = min(until + interval, most)
        stopped = put_rows(stops.stopped.copy())
        with stopwatch("decode"):
            state = jax.block_until_ready(
                write_tokens(
                    params, state, controls, stopped, jax.device_put(np.int32(until)), model=model
                )
            )
        stops.update(state)
    completions = _completions(state, list(prompts), stops, settings)
    stats = GenerationStats(
        prompts=len(prompts),
        prompt_tokens=sum(len(prompt) for prompt in prompts.values()),
        new_tokens=sum(len(completion.tokens) for completion in completions.values()),
        batches=1,
        compile_seconds=stopwatch.seconds["compile"],
        prompt_seconds=stopwatch.seconds["prompt"],
        decode_seconds=stopwatch.seconds["decode"],
    )
    return completions, stats


def _parts(sharding: jax.sharding.NamedSharding | None) -> int:
    """Returns the number of shards of the rows."""
    if sharding is None:
        return 1
    rows = sharding.mesh.size
    return rows // sharding.shard_shape((rows,))[0]


def _limits(
    prompts: Sequence[np.ndarray], context: int | None, settings: GenerationSettings
) -> Int32[np.ndarray, " rows"]:
    """Returns the maximum number of new tokens of each prompt."""
    limits = np.full(len(prompts), settings.max_new_tokens, np.int32)
    if context is None:
        return limits
    return np.minimum(limits, [context - len(prompt) for prompt in prompts]).astype(np.int32)


def _ends(settings: GenerationSettings, model: CausalLM) -> np.ndarray:
    """Returns a mask of the tokens that end a continuation."""
    ends = np.zeros(model.config.vocab_size, bool)
    for token in settings.eos_ids or ():
        if not 0 <= token < len(ends):
            raise ValueError(
                f"eos_ids has the token {token}, but the model's tokens are 0 to {len(ends) - 1}"
            )
        ends[token] = True
    return ends


class _Stops:
    """Tracks rows that have stopped, and how many of their tokens to keep.

    Attributes:
      stopped: Whether a row has stopped, bool [B].
      kept: Number of tokens to keep, by index of a prompt with a stop string.
    """

    def __init__(self, find_stop: FindStop | None, indices: Sequence[int], empty: np.ndarray):
        self.stopped = empty.copy()
        self.kept: dict[int, int] = {}
        self._find_stop = find_stop
        self._indices = indices

    @property
    def all_done(self) -> bool:
        """Whether all rows have stopped."""
        return bool(self.stopped.all())

    def update(self, state: DecodeState) -> None:
        """Searches the new tokens for stop strings."""
        if self._find_stop is None:
            return
        tokens, counts, done = jax.device_get((state.tokens, state.counts, state.done))
        for row, index in enumerate(self._indices):
            if self.stopped[row]:
                continue
            kept = self._find_stop(index, tokens[row, : counts[row]])
            if kept is not None:
                self.kept[index] = kept
            self.stopped[row] = done[row] or kept is not None


def _completions(
    state: DecodeState, indices: Sequence[int], stops: _Stops, settings: GenerationSettings
) -> dict[int, Completion]:
    """Returns the continuations in the state, by index of the prompt."""
    tokens, counts, finite = jax.device_get((state.tokens, state.counts, state.finite))
    completions = {}
    for row, index in enumerate(indices):
        if not finite[row]:
            raise FloatingPointError(
                f"the logits of prompt {index} are not finite: check the model's and the adapter's"
                " parameters for NaN or infinity, or use a dtype with a larger range"
            )
        new = tokens[row, : counts[row]]
        reason: FinishReason
        if index in stops.kept:
            new, reason = new[: stops.kept[index]], "stop_string"
        elif int(new[-1]) in (settings.eos_ids or ()):
            reason = "eos"
        else:
            reason = "max_new_tokens" if len(new) == settings.max_new_tokens else "context"
        completions[index] = Completion(tokens=np.array(new), finish_reason=reason)
    return completions
