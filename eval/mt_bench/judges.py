"""Judges: an endpoint that speaks OpenAI's protocol, or a model of this library."""

import dataclasses
import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from eval.mt_bench.requests import JudgeRequest
from peft_jax.generation import GenerationSettings, Loaded, generate_text

JUDGMENT_TOKENS = 2048
"""The most tokens of a judgment; FastChat's own choice."""

_TIMEOUT = 120.0
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(Exception):
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
      sleep: waits so many seconds.

    Raises:
      ValueError: the address is none of http or https, or no model is named.
    """

    url: str
    name: str
    key: str = dataclasses.field(default="", repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retries: int = 5
    workers: int = 4
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"--judge is {self.url!r}; it should be an address, https://api.openai.com/v1, or"
                " local:FOLDER for a model of your own"
            )
        if not self.name:
            raise ValueError("--judge_model: name the model that the endpoint is asked for")

    def check(self) -> None:
        """Asks for the models that there are, which costs nothing.

        Raises:
          JudgeError: nothing is there, or the key is not taken. An endpoint that has no list of
            models is let pass.
        """
        try:
            self._fetch("models", None)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise HopelessJudgeError(self._refused(error)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise HopelessJudgeError(
                f"the judge at {self.url} cannot be reached: {error}"
            ) from error

    def __call__(self, request: JudgeRequest) -> Judgment:
        """Asks, and asks again after a while where that may help.

        Raises:
          HopelessJudgeError: the endpoint refuses the key, or knows neither path nor model.
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
                response = json.loads(self._fetch("chat/completions", body))
                return Judgment(_content(response), _tokens(response))
            except urllib.error.HTTPError as error:
                failure = self._refused(error)
                if error.code in (401, 403, 404):
                    raise HopelessJudgeError(failure) from error
                if error.code not in _WORTH_ANOTHER_TRY:
                    raise JudgeError(failure) from error
                asked_for = _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
            except ValueError as error:
                raise UnreadableAnswerError(f"an answer that cannot be read: {error}") from error
            if attempt < self.retries:
                self.sleep(min(asked_for or wait, _LONGEST_WAIT))
                wait *= 2
        raise JudgeError(f"{failure} (after {self.retries} retries)")

    def _fetch(self, path: str, body: dict[str, Any] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return response.read()

    def _refused(self, error: urllib.error.HTTPError) -> str:
        said = error.read(500).decode("utf-8", "replace").strip()
        if self.key:
            said = said.replace(self.key, "…")
        return f"the judge at {self.url} answers {error.code} {error.reason}: {said}"


class LocalJudge:
    """A judge that is a model of this library, asked through its chat template.

    Args:
      loaded: the model.
      name: the name that a score is quoted with.

    Raises:
      ValueError: its tokenizer has no chat template.
    """

    workers = 1

    def __init__(self, loaded: Loaded, name: str):
        if not loaded.tokenizer.chat_template:
            raise ValueError(f"the judge {name} has no chat template to be asked through")
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
            found = generate_text(loaded.model, loaded.params, loaded.tokenizer, [chat], settings)
        except ValueError as error:
            raise JudgeError(str(error)) from error
        return Judgment(found.texts[0])


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
        raise ValueError(f"no text in {str(response)[:200]}")
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
    if type(read) is int and type(written) is int and read >= 0 and written >= 0:
        return read, written
    return None


def _retry_after(header: str | None) -> float | None:
    """How many seconds an endpoint asks to wait: a number of them, or a date.

    Example:
      >>> _retry_after("7"), _retry_after(None), _retry_after("soon")
      (7.0, None, None)
    """
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
