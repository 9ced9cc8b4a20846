"""Judges: an endpoint that speaks OpenAI's protocol, or a model of this library."""

import dataclasses
import email.utils
import http.client
import json
import math
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from peft_jax.generation import GenerationSettings, Loaded, generate_text
from peft_jax.runtime.errors import EndingError
from peft_jax.runtime.printable import printable

from .exchange import SECONDS, Answer, exchange
from .requests import JudgeRequest

JUDGMENT_TOKENS = 2048
"""The most tokens of a judgment; FastChat's own choice."""

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_NO_USE_WAITING = 3600.0
"""An endpoint that asks for a longer wait than this has refused the request."""

_MOST_TOKENS = 1 << 40
"""A larger number of tokens is no count of any text."""

_LEAST_SECRET = 8
"""A shorter key ("x", "EMPTY") is a placeholder, and may be a part of any text."""

_QUOTED = 500
"""How many characters of an answer a message quotes."""

_WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(EndingError):
    """The judge did not answer; the message says why."""


class UnreadableAnswerError(JudgeError):
    """The judge did answer, and may ask to be paid, but in a form that is not known."""


class HopelessJudgeError(JudgeError):
    """The judge will not answer any request: a wrong key, address or model."""


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What a judge said.

    Attributes:
      text: in its own words.
      tokens: of the prompt and of the answer, as the endpoint counts them; None if it does not.
    """

    text: str
    tokens: tuple[int, int] | None = None


class Judge(Protocol):
    """Who rates answers."""

    @property
    def name(self) -> str:
        """The name that a score is quoted with."""

    @property
    def workers(self) -> int:
        """How many requests it is asked at a time."""

    def check(self) -> None:
        """Raises `JudgeError` if it cannot be reached."""

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Its judgment; raises `JudgeError` if there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """A judge behind an endpoint that speaks OpenAI's chat protocol.

    Attributes:
      url: its address up to and with the version, "https://api.openai.com/v1".
      name: the model that is asked.
      key: the secret that it is asked with; empty: none.
      options: further fields of each request; None takes one away.
      retries: how often a request is made again that failed for a passing reason.
      workers: how many requests are made at a time.
      seconds: how long one request may take, from its first byte to the last of its answer.
      sleep: waits so many seconds.

    Raises:
      ValueError: the address is none of http or https, no model is named, or the key cannot be sent
        in a header.
    """

    url: str
    name: str
    key: str = dataclasses.field(default="", repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retries: int = 5
    workers: int = 4
    seconds: float = SECONDS
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        address = urllib.parse.urlsplit(self.url)
        if "@" in address.netloc:
            raise ValueError(
                "--judge has a user's name or password in it; it should be an address without one,"
                " and the key in the variable that --judge_key_variable names"
            )
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ValueError(
                f"--judge is {self.url!r}; it should be an address, https://api.openai.com/v1, or"
                " local:FOLDER for a model of your own"
            )
        if address.query or address.fragment or not _is_plain(self.url):
            raise ValueError(
                f"--judge is {self.url!r}; it should be an address that paths can be put behind,"
                " without white space, ? or #"
            )
        if not self.name:
            raise ValueError("--judge_model: name the model that the endpoint is asked for")
        # A variable that was read from a file has a newline at its end.
        object.__setattr__(self, "key", self.key.strip())
        if not _is_plain(self.key):
            raise ValueError(
                "the judge's key has white space or a character in it that is not ASCII; it should"
                " be the one word that the endpoint gave out"
            )

    def check(self) -> None:
        """Asks for the models that there are, which costs nothing.

        Raises:
          JudgeError: nothing is there, it redirects, or the key is not taken. An endpoint that has
            no list of models is let pass.
        """
        try:
            answer = self._send("models")
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = self._clean(f"the judge at {self.url} cannot be reached: {error}")
            raise HopelessJudgeError(why) from error
        if answer.status in (401, 403) or _is_redirect(answer):
            raise HopelessJudgeError(self._refused(answer))

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Asks, and asks again after a while where that may help.

        Raises:
          HopelessJudgeError: the endpoint refuses the key, knows neither path nor model, or
            redirects.
          UnreadableAnswerError: it answered in a form that is not known.
          JudgeError: it did not answer in spite of all retries.
        """
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [
                {"role": "system", "content": request.system},
                {"role": "user", "content": request.prompt},
            ],
            "temperature": 0,
            "max_tokens": JUDGMENT_TOKENS,
            **self.options,
        }
        body = {field: value for field, value in body.items() if value is not None}
        wait = _FIRST_WAIT
        for attempt in range(self.retries + 1):
            asked_for: float | None = None
            try:
                answer = self._send("chat/completions", body)
            except (OSError, http.client.HTTPException) as error:
                failure = self._clean(f"{type(error).__name__}: {error}")
            else:
                if 200 <= answer.status < 300:
                    return self._read(answer)
                failure = self._refused(answer)
                if answer.status in (401, 403, 404) or _is_redirect(answer):
                    raise HopelessJudgeError(failure)
                if answer.status not in _WORTH_ANOTHER_TRY:
                    raise JudgeError(failure)
                asked_for = _retry_after(answer.headers.get("Retry-After"))
                if asked_for is not None and asked_for > _NO_USE_WAITING:
                    raise JudgeError(f"{failure} (it asks to wait {asked_for:g} s)")
            if attempt < self.retries:
                self.sleep(min(asked_for or wait, _LONGEST_WAIT))
                wait *= 2
        raise JudgeError(f"{failure} (after {self.retries} retries)")

    def _send(self, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        url = f"{self.url.rstrip('/')}/{path}"
        return exchange(url, key=self.key, body=body, seconds=self.seconds)

    def _read(self, answer: Answer) -> Judgment:
        """Returns the judgment of an answer.

        Raises:
          UnreadableAnswerError: it is of another form, or nested deeper than can be read.
        """
        try:
            response = json.loads(answer.body)
            content = _content(response)
            if len(self.key) >= _LEAST_SECRET:  # It goes into files.
                content = self._without_key(content)
            return Judgment(content, _tokens(response))
        except (ValueError, RecursionError) as error:
            why = self._clean(f"an answer that cannot be read: {error}")
            raise UnreadableAnswerError(why) from error

    def _refused(self, answer: Answer) -> str:
        """Says with which status the endpoint refuses a request, and why."""
        status = f"the judge at {self.url} answers {answer.status} {answer.reason}"
        if _is_redirect(answer):
            where = answer.headers.get("Location", "nowhere")
            return self._clean(
                f"{status}, a redirect to {where}: it is not followed, since the key is for the"
                " first address alone; give the one that is meant with --judge"
            )
        return self._clean(f"{status}: {answer.body.decode('utf-8', 'replace').strip()}")

    def _clean(self, message: str) -> str:
        """Returns a message that is safe to print: cut off, without the key or control characters.

        The key is taken out first: its beginning could otherwise be left by the cut.
        """
        message = self._without_key(message)
        most = len(self.url) + _QUOTED
        return printable(message if len(message) <= most else message[:most] + " …", keep="")

    def _without_key(self, text: str) -> str:
        """Returns a text of the endpoint's without the key, in whatever way it is written there."""
        for form in (self.key, repr(self.key)[1:-1], urllib.parse.quote(self.key, safe="")):
            text = text.replace(form, "…") if form else text
        return text


class LocalJudge:
    """A judge that is a model of this library, asked through its chat template.

    What it is asked about is the text of others: a control token in it is tokenized as the
    characters that it is, so that no answer can end the judge's turn or begin one.

    Args:
      loaded: the model.
      name: the name that a score is quoted with.

    Raises:
      ValueError: its tokenizer has no chat template, or cannot split control tokens.
    """

    workers = 1

    def __init__(self, loaded: Loaded, name: str):
        check_judge_tokenizer(loaded.tokenizer, name)
        self.name = name
        self._loaded = loaded

    def check(self) -> None:
        """It is here."""

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Its judgment, the likeliest."""
        loaded = self._loaded
        chat = [
            {"role": "system", "content": request.system},
            {"role": "user", "content": request.prompt},
        ]
        settings = GenerationSettings(max_new_tokens=JUDGMENT_TOKENS, eos_ids=loaded.eos_ids)
        try:
            # The answer that is judged is text, and ends no turn of the judge's own prompt.
            found = generate_text(
                loaded.model,
                loaded.params,
                loaded.tokenizer,
                [chat],
                settings,
                split_special_tokens=True,
            )
        except ValueError as error:
            raise JudgeError(str(error)) from error
        return Judgment(found.texts[0])


def check_judge_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises ValueError unless a tokenizer can ask a local judge."""
    if not tokenizer.chat_template:
        raise ValueError(f"the judge {name} has no chat template to be asked through")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the judge {name} has the tokenizer {type(tokenizer).__name__}, which cannot keep"
            " control tokens out of the text it judges: give a judge with a fast tokenizer"
            " (tokenizer.json)"
        )


def _content(response: Any) -> str:
    """What an endpoint answered.

    Raises:
      ValueError: it has not the protocol's form.
    """
    try:
        content = response["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str) or not content:
        raise ValueError(f"no text in {json.dumps(response)}")
    return content


def _tokens(response: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many tokens an endpoint says that it has read and written; None if it does not.

    Example:
      >>> _tokens({"usage": {"prompt_tokens": 700, "completion_tokens": 90}}), _tokens({})
      ((700, 90), None)
    """
    usage = response.get("usage")
    if not isinstance(usage, Mapping):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in (read, written)):
        return read, written  # type: ignore[return-value]
    return None


def _is_redirect(answer: Answer) -> bool:
    return 300 <= answer.status < 400


def _is_plain(text: str) -> bool:
    """Whether a text can stand in a request's head: printable ASCII without white space."""
    return all("!" <= character <= "~" for character in text)


def _retry_after(header: str | None) -> float | None:
    """Returns how many seconds an endpoint asks to wait, in seconds or as a date.

    What is neither, or lies in the past, is None: the usual wait is then taken.

    Example:
      >>> _retry_after("7"), _retry_after("1e9")
      (7.0, 1000000000.0)
      >>> [_retry_after(header) for header in (None, "soon", "nan", "-5")]
      [None, None, None, None]
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
            seconds = date.timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return None
    return seconds if seconds > 0 and not math.isnan(seconds) else None
