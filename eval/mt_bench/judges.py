"""Asks judges: OpenAI-compatible endpoints, or models of this library."""

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
"""Maximum tokens of a judgment, as in FastChat."""

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_MAX_RETRY_AFTER = 3600.0
"""A longer requested wait counts as a rejection of the request."""

_MAX_TOKENS = 1 << 40
"""Larger reported token counts are invalid."""

_MIN_SECRET_LENGTH = 8
"""A shorter key ("x", "EMPTY") is a placeholder, which may occur in any text."""

_MAX_QUOTE = 500
"""Maximum characters of an answer that a message quotes."""

_RETRYABLE = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(EndingError):
    """Raised when the judge does not answer a request."""


class UnreadableAnswerError(JudgeError):
    """Raised when the judge's answer, which may cost money, has an unknown format."""


class FatalJudgeError(JudgeError):
    """Raised when the judge cannot answer any request, for example because the key is wrong."""


@dataclasses.dataclass(frozen=True)
class Judgment:
    """Judgment of one answer.

    Attributes:
      text: Text of the judgment.
      tokens: Prompt and completion tokens that the endpoint reports; None if it does not.
    """

    text: str
    tokens: tuple[int, int] | None = None


class Judge(Protocol):
    """Interface of a judge."""

    @property
    def name(self) -> str:
        """Returns the name that is reported with a score."""

    @property
    def workers(self) -> int:
        """Returns the number of concurrent requests."""

    def check(self) -> None:
        """Raises `JudgeError` if the judge cannot be reached."""

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Rates an answer, or raises `JudgeError`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """Judge behind an endpoint with OpenAI's chat protocol.

    Attributes:
      url: URL up to the version, for example "https://api.openai.com/v1".
      name: Name of the model.
      key: Secret to send; empty: none.
      options: Further fields of each request; None removes a field.
      retries: Retries of a request after a transient failure.
      workers: Number of concurrent requests.
      seconds: Time limit from the request to the last byte of the answer.
      sleep: Waits a number of seconds.

    Raises:
      ValueError: The URL is not http or https, no model is named, or the key cannot be sent in a
        header.
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
                "--judge contains a user name or password; give a URL without one, and put the key"
                " in the variable that --judge_key_variable names"
            )
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ValueError(
                f"--judge is {self.url!r} but must be a URL, for example https://api.openai.com/v1,"
                " or local:FOLDER for a local model"
            )
        if address.query or address.fragment or not _is_plain(self.url):
            raise ValueError(
                f"--judge is {self.url!r} but must be a URL without white space, ? or #"
            )
        if not self.name:
            raise ValueError("--judge_model is missing; give the endpoint's name of the model")
        # A variable that was read from a file may end with a newline.
        object.__setattr__(self, "key", self.key.strip())
        if not _is_plain(self.key):
            raise ValueError(
                "the judge's key contains white space or non-ASCII characters; give the key as the"
                " endpoint issued it"
            )

    def check(self) -> None:
        """Requests the list of models, which is free of charge.

        An endpoint without such a list passes the check.

        Raises:
          JudgeError: The endpoint cannot be reached, redirects, or rejects the key.
        """
        try:
            answer = self._send("models")
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = self._clean(f"the judge at {self.url} cannot be reached: {error}")
            raise FatalJudgeError(why) from error
        if answer.status in (401, 403) or _is_redirect(answer):
            raise FatalJudgeError(self._rejection(answer))

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Rates an answer, with retries after transient failures.

        Raises:
          FatalJudgeError: The endpoint rejects the key, does not know the path or model, or
            redirects.
          UnreadableAnswerError: The answer has an unknown format.
          JudgeError: There was no answer after all retries.
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
                failure = self._rejection(answer)
                if answer.status in (401, 403, 404) or _is_redirect(answer):
                    raise FatalJudgeError(failure)
                if answer.status not in _RETRYABLE:
                    raise JudgeError(failure)
                asked_for = _retry_after(answer.headers.get("Retry-After"))
                if asked_for is not None and asked_for > _MAX_RETRY_AFTER:
                    raise JudgeError(f"{failure} (it requests a wait of {asked_for:g} s)")
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
          UnreadableAnswerError: The answer has an unknown format, or is nested too deeply.
        """
        try:
            response = json.loads(answer.body)
            content = _content(response)
            if len(self.key) >= _MIN_SECRET_LENGTH:  # The judgment is written to files.
                content = self._without_key(content)
            return Judgment(content, _tokens(response))
        except (ValueError, RecursionError) as error:
            why = self._clean(f"the judge's answer cannot be read: {error}")
            raise UnreadableAnswerError(why) from error

    def _rejection(self, answer: Answer) -> str:
        """Returns the message for an endpoint that rejects a request."""
        status = f"the judge at {self.url} answers {answer.status} {answer.reason}"
        if _is_redirect(answer):
            where = answer.headers.get("Location", "nowhere")
            return self._clean(
                f"{status}, a redirect to {where}; it is not followed, because the key is only for"
                " the first URL; give the right URL as --judge"
            )
        return self._clean(f"{status}: {answer.body.decode('utf-8', 'replace').strip()}")

    def _clean(self, message: str) -> str:
        """Returns a message without the key and control characters, shortened.

        The key is removed first, because shortening could leave its beginning.
        """
        message = self._without_key(message)
        limit = len(self.url) + _MAX_QUOTE
        return printable(message if len(message) <= limit else message[:limit] + " …", keep="")

    def _without_key(self, text: str) -> str:
        """Returns a text without the key, in plain, escaped or URL-encoded form."""
        for form in (self.key, repr(self.key)[1:-1], urllib.parse.quote(self.key, safe="")):
            text = text.replace(form, "…") if form else text
        return text


class LocalJudge:
    """Judge that is a model of this library, prompted through its chat template.

    Control tokens in the rated answers are tokenized as characters, so that an answer cannot end
    or begin a turn of the judge's prompt.

    Args:
      loaded: Model, parameters and tokenizer.
      name: Name that is reported with a score.

    Raises:
      ValueError: The tokenizer has no chat template, or cannot split control tokens.
    """

    workers = 1

    def __init__(self, loaded: Loaded, name: str):
        check_judge_tokenizer(loaded.tokenizer, name)
        self.name = name
        self._loaded = loaded

    def check(self) -> None:
        """Does nothing, because a loaded model needs no connection."""

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Rates an answer by greedy decoding."""
        loaded = self._loaded
        chat = [
            {"role": "system", "content": request.system},
            {"role": "user", "content": request.prompt},
        ]
        settings = GenerationSettings(max_new_tokens=JUDGMENT_TOKENS, eos_ids=loaded.eos_ids)
        try:
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
    """Rejects a tokenizer that a local judge cannot use, with ValueError."""
    if not tokenizer.chat_template:
        raise ValueError(f"the judge {name} has no chat template; give a chat model as --judge")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the judge {name} has the tokenizer {type(tokenizer).__name__}, which cannot split"
            " control tokens in the answers it rates; give a judge with a fast tokenizer"
            " (tokenizer.json)"
        )


def _content(response: Any) -> str:
    """Returns the text of an endpoint's response.

    Raises:
      ValueError: The response does not follow the protocol.
    """
    try:
        content = response["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str) or not content:
        raise ValueError(f"no text in {json.dumps(response)}")
    return content


def _tokens(response: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the prompt and completion tokens that an endpoint reports, or None.

    Example:
      >>> _tokens({"usage": {"prompt_tokens": 700, "completion_tokens": 90}}), _tokens({})
      ((700, 90), None)
    """
    usage = response.get("usage")
    if not isinstance(usage, Mapping):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if all(type(count) is int and 0 <= count <= _MAX_TOKENS for count in (read, written)):
        return read, written  # type: ignore[return-value]
    return None


def _is_redirect(answer: Answer) -> bool:
    return 300 <= answer.status < 400


def _is_plain(text: str) -> bool:
    """Returns whether a text may be part of a header: printable ASCII without white space."""
    return all("!" <= character <= "~" for character in text)


def _retry_after(header: str | None) -> float | None:
    """Returns the wait in seconds of a Retry-After header, which may be a date.

    An invalid header, or one in the past, gives None, which means the usual wait.

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
