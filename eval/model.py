"""Our models as EleutherAI's lm-evaluation-harness wants them.

What the harness's own backend for transformers does (`lm_eval.models.huggingface.HFLM`) is done
here too, so that numbers are comparable: where a context and its continuation are cut, what is put
before a text, and which tokens are left out of one that is too long.
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

_NO_END = 2048
"""The longest text for a model whose positions have no end; the harness's own choice."""

_NEW_TOKENS = 256
"""The most new tokens where a task names none; the harness's own choice."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1, 1.0),
    "num_return_sequences": (1,),
}
"""Settings of generation that are not implemented, with the values that change nothing."""

_SEED_STRIDE = 1_000_003
"""How far apart the seeds of a prompt's repetitions are."""

Score = tuple[float, bool]
"""The log-likelihood of a continuation in nats, and whether it is what greedy decoding writes."""


def longest_text(context: int | None, max_length: int | None) -> int:
    """How many tokens a text may have, its continuation included.

    Args:
      context: what the model was made for; None where its positions have no end.
      max_length: what was asked for; None: what the model was made for, or 2,048.

    Raises:
      ValueError: it is not positive or more than the model was made for.
    """
    if max_length is not None and not 1 < max_length <= (context or max_length):
        raise ValueError(
            f"max_length is {max_length}; it must be from 2 to {context or 'any number'}, what"
            " the model was made for"
        )
    return max_length or context or _NO_END


def new_tokens_of(gen_kwargs: Mapping[str, Any] | None) -> int:
    """The most new tokens that the harness's settings of generation ask for."""
    return normalize_gen_kwargs(dict(gen_kwargs or {}), _NEW_TOKENS)["max_gen_toks"]


def check_room(new_tokens: int, max_length: int) -> None:
    """Raises ValueError unless a prompt has room beside so many new tokens."""
    if new_tokens >= max_length:
        raise ValueError(
            f"up to {new_tokens} new tokens are asked for, which leaves no room for a prompt in the"
            f" {max_length} tokens that fit; ask for fewer with --max_new_tokens"
        )


class HarnessModel(TemplateLM):
    """A causal language model of this library, for `lm_eval.evaluator.evaluate`.

    Requests are sorted by length and cut into batches, which are shared out over the devices.
    Continuations of one context that differ in their last token only are read once. What has been
    answered before is taken from the store.

    Args:
      loaded: the model, its parameters and its tokenizer.
      row_sharding: how the rows of a batch are shared out over devices.
      batch_size: rows of a batch.
      max_length: the longest text in tokens; None: what the model was made for, or 2,048 where its
        positions have no end.
      seed: of sampling.
      split_special_tokens: tokenize control tokens in prompts, the assistant's turns aside, as the
        characters that they are; as the setting of that name in training's data.
      store: what was answered before, and where answers go.
      reporter: shows progress.

    Raises:
      ValueError: `max_length` is not positive or more than the model was made for.
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
        self.max_length = longest_text(context_length(loaded.model), max_length)
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
        """How many requests were too long and lost their beginnings, since it was last set; those
        that were answered before are among them."""

    # Tokens.

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token, which stands for a text that has not begun."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        begin = self.tokenizer.bos_token_id
        token = self.eot_token_id if begin is None else begin
        if token is None:
            raise ValueError(
                "the tokenizer has neither a begin nor an end token, one of which a text without a"
                " context is put behind"
            )
        return token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, behind what the tokenizer puts before one, unless it is there.

        What a chat template wrote has the tokens that training has, and nothing before them.
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
        """The tokens of a text in which only a chat template's control tokens are such.

        Args:
          string: the text.
          begin: put what the tokenizer has before a text, unless a template wrote it.

        Raises:
          ValueError: the tokenizer has no other token for a control token's character.
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
            raise ValueError(f"a prompt cannot be tokenized: {error.detail}") from error

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's records."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without a generation prompt its last turn is left open.

        Raises:
          ValueError: the template refuses the conversation.
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
            message = f"the tokenizer's chat template refuses a prompt: {error.detail}"
            raise ValueError(message) from error

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, max_length=1, split_special_tokens=self._split)

    # Log-likelihoods.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        """The log-likelihood of each continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts; long ones in windows, each token scored once."""
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
                raise ValueError(f"there is no token to score in {texts[1]!r} after {texts[0]!r}")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, and {self.max_length} fit:"
                    f" {texts[1][:60]!r}…"
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
        """Scores continuations after their contexts.

        Args:
          pairs: the tokens of each context and continuation, at least one each.
          what: what they are called in the progress.

        Yields:
          After each batch, scores by index.
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
        """Continues each context until one of its stop strings."""
        return self.complete([(r.args[0], self.settings_of(r.args[1])) for r in requests])

    def settings_of(self, gen_kwargs: dict[str, Any]) -> GenerationSettings:
        """The harness's settings of generation as ours.

        Raises:
          ValueError: one is not implemented and would change what is generated.
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
                " implemented; known: until, max_gen_toks, do_sample, temperature, top_k, top_p"
            )
        return settings

    def complete(self, requests: Sequence[tuple[str, GenerationSettings]]) -> list[str]:
        """What each text is continued by, without its stop string.

        The same request several times is answered differently each time where tokens are sampled,
        and alike in every run with the same seed.

        Args:
          requests: texts, and how each is continued.

        Raises:
          ValueError: a request leaves no room for a prompt in the model's context.
          FloatingPointError: the model's logits are not finite.
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
        """How many prompts leave no room for what they are to be continued by."""
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
        """Continues requests of the same settings, the longest first, batch by batch."""
        check_room(settings.max_new_tokens, self.max_length)
        room = self.max_length - settings.max_new_tokens
        prompts = {index: self.tok_encode(requests[index][0]) for index in indices}
        # An empty prompt is put behind what begins a text.
        prompts = {i: prompt[-room:] or [self.prefix_token_id] for i, prompt in prompts.items()}
        # Each time that the same prompt is continued it is with another seed.
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
    """Continuations of one context that differ in their last token only, as one row.

    Args:
      read: the context, and what the continuations have in common.
      continuations: their tokens.

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
    """What of the settings decides what is generated."""
    record = dataclasses.asdict(settings)
    del record["batch_size"]
    return record
