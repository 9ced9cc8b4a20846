"""Adapts this library's models to EleutherAI's lm-evaluation-harness.

Tokenization and truncation follow the harness's backend for transformers
(`lm_eval.models.huggingface.HFLM`), so that results are comparable.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from peft_jax.data import BadRowError, Encoder, Example, Piece
from peft_jax.generation import GenerationSettings, Loaded, generate_text_from_tokens
from peft_jax.generation.from_tokens import context_length
from peft_jax.runtime.progress import Reporter

from .chat_text import ChatText
from .responses import ResponseStore
from .scoring import ScoringRow, TokenScorer

_UNBOUNDED_LENGTH = 2048
"""Maximum length for a model with unbounded positions, as in the harness."""

_NEW_TOKENS = 256
"""Maximum new tokens of a task that sets no limit, as in the harness."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1, 1.0),
    "num_return_sequences": (1,),
}
"""Unsupported generation settings, with the values that have no effect."""

_SEED_STRIDE = 1_000_003
"""Difference between the seeds of repeated samples of a prompt."""

Score = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding generates it."""


def longest_text(context: int | None, max_length: int | None) -> int:
    """Returns the maximum number of tokens of a text with its continuation.

    Args:
      context: Context length of the model; None if positions are unbounded.
      max_length: Requested maximum; None: the context length, or 2,048 if unbounded.

    Raises:
      ValueError: `max_length` is below 2 or exceeds the context length.
    """
    if max_length is not None and not 1 < max_length <= (context or max_length):
        raise ValueError(
            f"max_length is {max_length} but must be from 2"
            + (f" to {context}, the model's context length" if context else " up")
        )
    return max_length or context or _UNBOUNDED_LENGTH


def new_tokens_of(gen_kwargs: Mapping[str, Any] | None) -> int:
    """Returns the maximum new tokens of the harness's generation settings."""
    return normalize_gen_kwargs(dict(gen_kwargs or {}), _NEW_TOKENS)["max_gen_toks"]


def check_room(new_tokens: int, max_length: int) -> None:
    """Rejects a number of new tokens that leaves no room for a prompt, with ValueError."""
    if new_tokens >= max_length:
        raise ValueError(
            f"max_new_tokens is {new_tokens}, which leaves no room for a prompt in the maximum"
            f" length of {max_length} tokens; give a smaller --max_new_tokens"
        )


class HarnessModel(TemplateLM):
    """Causal language model for `lm_eval.evaluator.evaluate`.

    Requests are sorted by length and batched, and the rows of a batch are sharded over devices.
    Continuations of one context that differ only in their last token share one forward pass.
    Earlier responses are taken from the store.

    Args:
      loaded: Model, parameters and tokenizer.
      row_sharding: Sharding of the rows of a batch.
      batch_size: Rows per batch.
      max_length: Maximum tokens of a text; None: the model's context length, or 2,048 if its
        positions are unbounded.
      seed: Sampling seed.
      split_special_tokens: Whether control tokens in prompts are tokenized as characters, except
        in the assistant's turns. The data setting of that name does the same in training.
      store: Store of responses.
      reporter: Shows progress.

    Raises:
      ValueError: `max_length` is below 2 or exceeds the context length.
    """

    backend = "causal"

    def __init__(
        self,
        loaded: Loaded,
        *,
        row_sharding: jax.sharding.NamedSharding,
        batch_size: int = 16,
        max_length: int | None = None,
        seed: int = 0,
        split_special_tokens: bool = False,
        store: ResponseStore | None = None,
        reporter: Reporter | None = None,
    ):
        super().__init__()
        self.tokenizer = loaded.tokenizer
        self.max_length = longest_text(context_length(loaded.model, loaded.params), max_length)
        self._loaded = loaded
        self._row_sharding = row_sharding
        self._batch_size = batch_size
        self._seed = seed
        self._split = split_special_tokens
        self.store = store if store is not None else ResponseStore()
        self.reporter = reporter or Reporter()
        self._scorer = TokenScorer(
            loaded.model, loaded.params, row_sharding=row_sharding, batch_size=batch_size
        )
        self.truncated = 0
        """Number of truncated requests since this was last set; stored responses count too."""

    # Tokens.

    @property
    def eot_token_id(self) -> int:
        """Returns the tokenizer's end token, which the harness uses for an empty context."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Returns the token that replaces an empty context.

        Raises:
          ValueError: The tokenizer has neither a begin nor an end token.
        """
        begin = self.tokenizer.bos_token_id
        token = self.eot_token_id if begin is None else begin
        if token is None:
            raise ValueError(
                "the tokenizer has neither a begin nor an end token; one of them is needed to score"
                " text without a context"
            )
        return token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenizes a text, with a begin token unless it already has one.

        The output of a chat template is tokenized as in training, without a begin token.
        """
        if isinstance(string, ChatText) and string.ids is not None:
            return list(string.ids)
        if self._split:
            return self._split_ids(string, begin=add_special_tokens is not False)
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            begun = isinstance(string, ChatText) or (begin and string.startswith(begin))
            add_special_tokens = not begun
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _split_ids(self, string: str, *, begin: bool) -> list[int]:
        """Tokenizes a text in which only a chat template may write control tokens.

        Args:
          string: Text to tokenize.
          begin: Whether to add the begin token, unless a template wrote the text.

        Raises:
          ValueError: The tokenizer cannot split one of the control tokens.
        """
        encoder = self._encoder
        chat = string if isinstance(string, ChatText) else ChatText(string, templated=0)
        others = encoder.control_spans(str(chat)[chat.templated :])
        done = chat.templated
        plain = (*chat.plain, *((done + start, done + stop) for start, stop in others))
        example = Example(
            pieces=(Piece(text=str(string), in_loss=False), Piece(text="", in_loss=True)),
            templated=not begin or isinstance(string, ChatText),
            plain=plain,
        )
        try:
            return encoder.prompt_ids(example).tolist()
        except BadRowError as error:
            raise ValueError(f"cannot tokenize a prompt: {error.detail}") from error

    @property
    def tokenizer_name(self) -> str:
        """Returns the tokenizer's name for the harness's records."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation; without a generation prompt, its last turn stays open.

        Raises:
          ValueError: The template rejects the conversation.
        """
        encoder = self._encoder
        try:
            if add_generation_prompt:
                example = encoder.renderer.prompt(chat_history)
                ids = encoder.prompt_ids(example).tolist()
                return ChatText(example.prompt, ids, example.plain)
            rendered = encoder.renderer.continued(chat_history)
            return ChatText(rendered.text, plain=rendered.plain)
        except BadRowError as error:
            message = f"the tokenizer's chat template rejects a prompt: {error.detail}"
            raise ValueError(message) from error

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, max_length=1, split_special_tokens=self._split)

    # Log-likelihoods.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        """Returns the log-likelihood of each continuation given its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Returns the log-likelihood of whole texts; windows of a long one score a token once."""
        texts = [request.args[0] for request in requests]
        totals = {
            text: known
            for text in dict.fromkeys(texts)
            if (known := self.store.get("rolling", text)) is not None
        }
        windows = {
            text: [make_disjoint_window(window) for window in self._windows(text)]
            for text in dict.fromkeys(texts)
            if text not in totals
        }
        owners = [text for text, parts in windows.items() for _ in parts]
        missing = {text: len(parts) for text, parts in windows.items()}
        sums: dict[str, float] = collections.defaultdict(float)
        totals |= {text: 0.0 for text, count in missing.items() if not count}
        pairs = [pair for parts in windows.values() for pair in parts]
        for scored in self._score(pairs, "windows of text"):
            for index, (score, _) in scored.items():
                text = owners[index]
                sums[text] += score
                missing[text] -= 1
                if not missing[text]:
                    totals[text] = sums[text]
                    self.store.add(sums[text], "rolling", text)
        return [totals[text] for text in texts]

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        return get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Score]:
        found: dict[int, Score] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            known = self.store.get("loglikelihood", *texts)
            if known is not None:
                found[index] = (float(known[0]), bool(known[1]))
        waiting = [index for index in range(len(requests)) if index not in found]
        pairs = []
        for index in waiting:
            texts, context, continuation = requests[index]
            if not continuation:
                raise ValueError(
                    f"the continuation {texts[1]!r} of {texts[0]!r} has no tokens to score"
                )
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, but max_length is"
                    f" {self.max_length}: {texts[1][:60]!r}…"
                )
            pairs.append((context, continuation))
        for scored in self._score(pairs, "choices"):
            for place, score in scored.items():
                index = waiting[place]
                found[index] = score
                self.store.add(list(score), "loglikelihood", *requests[index][0])
        return [found[index] for index in range(len(requests))]

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], what: str
    ) -> Iterator[dict[int, Score]]:
        """Scores continuations given their contexts.

        Args:
          pairs: Tokens of each context and continuation, neither of them empty.
          what: Name of the continuations in the progress.

        Yields:
          Scores by index, after each batch.
        """
        groups: dict[tuple[tuple[int, ...], int], list[int]] = collections.defaultdict(list)
        for index, (context, continuation) in enumerate(pairs):
            whole = [*context, *continuation]
            read = tuple(whole[-(self.max_length + 1) : -1])
            groups[read, len(continuation)].append(index)
        members = list(groups.values())
        rows = [
            _row(read, [pairs[index][1] for index in indices])
            for (read, _), indices in groups.items()
        ]
        with self.reporter.counting(what, len(pairs)) as counter:
            for batch in self._scorer(rows):
                scores: dict[int, Score] = {}
                for number, scored in batch.items():
                    shared = len(pairs[members[number][0]][1]) - 1
                    for place, index in enumerate(members[number]):
                        own = [*range(shared), shared + place]
                        scores[index] = (
                            float(np.sum(scored.scores[own], dtype=np.float64)),
                            bool(scored.likeliest[own].all()),
                        )
                counter.advance(len(scores))
                yield scores

    # Generation.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generates after each context until one of its stop strings."""
        return self.complete([(r.args[0], self.settings_of(r.args[1])) for r in requests])

    def settings_of(self, gen_kwargs: dict[str, Any]) -> GenerationSettings:
        """Converts the harness's generation settings.

        Raises:
          ValueError: A setting is unsupported and would change the output.
        """
        given = dict(normalize_gen_kwargs(gen_kwargs, _NEW_TOKENS))
        until = handle_stop_sequences(given.pop("until", None), eos=self.tokenizer.eos_token)
        sampled = given.pop("do_sample")
        temperature = float(given.pop("temperature", 0.0))
        top_k = given.pop("top_k", None)
        settings = GenerationSettings(
            max_new_tokens=given.pop("max_gen_toks"),
            temperature=temperature if sampled else 0.0,
            top_k=top_k or None,
            top_p=float(given.pop("top_p", 1.0)),
            stop_strings=tuple(dict.fromkeys(string for string in until if string)),
            eos_ids=self._loaded.eos_ids,
            seed=self._seed,
            batch_size=self._batch_size,
        )
        unknown = {key: value for key, value in given.items() if value not in _NEUTRAL.get(key, ())}
        if unknown:
            raise ValueError(
                f"generation with {', '.join(f'{k}={v!r}' for k, v in unknown.items())} is not"
                " supported; known: until, max_gen_toks, do_sample, temperature, top_k, top_p"
            )
        return settings

    def complete(self, requests: Sequence[tuple[str, GenerationSettings]]) -> list[str]:
        """Returns the completion of each prompt, without its stop string.

        With sampling, repeated requests get different completions, which the seed reproduces.

        Args:
          requests: Prompts, each with its generation settings.

        Raises:
          ValueError: A request leaves no room for a prompt in the model's context.
          FloatingPointError: The model's logits are not finite.
        """
        seen: collections.Counter[tuple[str, GenerationSettings]] = collections.Counter()
        found: dict[int, str] = {}
        keys = []
        groups: dict[tuple[GenerationSettings, int], list[int]] = collections.defaultdict(list)
        for index, (text, settings) in enumerate(requests):
            repetition = 0 if settings.greedy else seen[text, settings]
            seen[text, settings] += 1
            keys.append(("generate", text, _record(settings), repetition))
            known = self.store.get(*keys[index])
            if known is not None:
                found[index] = known
            else:
                groups[settings, repetition].append(index)
        self.truncated += self._too_long(requests)
        waiting = sum(map(len, groups.values()))
        with self.reporter.counting("generated", waiting) as counter:
            for (settings, repetition), indices in groups.items():
                for batch, texts in self._complete_alike(requests, indices, settings, repetition):
                    for index, text in zip(batch, texts, strict=True):
                        found[index] = text
                        self.store.add(text, *keys[index])
                    counter.advance(len(batch))
        return [found[index] for index in range(len(requests))]

    def _too_long(self, requests: Sequence[tuple[str, GenerationSettings]]) -> int:
        """Counts the prompts that are too long for their completions to fit."""
        lengths = {text: len(self.tok_encode(text)) for text in {text for text, _ in requests}}
        return sum(
            lengths[text] + settings.max_new_tokens > self.max_length for text, settings in requests
        )

    def _complete_alike(
        self,
        requests: Sequence[tuple[str, GenerationSettings]],
        indices: Sequence[int],
        settings: GenerationSettings,
        repetition: int,
    ) -> Iterator[tuple[Sequence[int], list[str]]]:
        """Completes requests with the same settings in batches, the longest first."""
        check_room(settings.max_new_tokens, self.max_length)
        room = self.max_length - settings.max_new_tokens
        prompts = {index: self.tok_encode(requests[index][0]) for index in indices}
        # The model cannot continue an empty prompt.
        prompts = {i: prompt[-room:] or [self.prefix_token_id] for i, prompt in prompts.items()}
        # Repeated samples of a prompt need different seeds.
        settings = dataclasses.replace(settings, seed=settings.seed + _SEED_STRIDE * repetition)
        longest_first = sorted(indices, key=lambda index: len(prompts[index]), reverse=True)
        for start in range(0, len(longest_first), settings.batch_size):
            batch = longest_first[start : start + settings.batch_size]
            generated = generate_text_from_tokens(
                self._loaded.model,
                self._loaded.params,
                self.tokenizer,
                [prompts[index] for index in batch],
                settings,
                row_sharding=self._row_sharding,
            )
            yield batch, generated.texts


def _row(read: Sequence[int], continuations: Sequence[Sequence[int]]) -> ScoringRow:
    """Packs continuations of one context that differ only in their last token into one row.

    Args:
      read: Tokens of the context and of the continuations' common prefix.
      continuations: Tokens of each continuation.

    Example:
      >>> row = _row([5, 6, 7], [[7, 8], [7, 9]])
      >>> row.before.tolist(), row.targets.tolist()
      ([1, 2, 2], [7, 8, 9])
    """
    last = len(read) - 1
    shared = continuations[0][:-1]
    before = [*range(last - len(shared), last), *[last] * len(continuations)]
    targets = [*shared, *(tokens[-1] for tokens in continuations)]
    return ScoringRow(*(np.asarray(values, np.int32) for values in (read, before, targets)))


def _record(settings: GenerationSettings) -> dict[str, Any]:
    """Returns the settings that determine the output."""
    record = dataclasses.asdict(settings)
    del record["batch_size"]
    return record
