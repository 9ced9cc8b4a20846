"""Renders chat templates in a process of their own, bounded in computing and memory.

A template comes with a model from elsewhere. Jinja's sandbox keeps it from the machine, but not
from computing for ever: nested loops, or one power of two numbers, which no other thread can
interrupt. The system ends the process that does; the conversation is then a bad row, and the next
one starts a process anew.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Span

OVER_BOUNDS = ("Endless", "MemoryError", "Killed")
"""The kinds of errors of a template that goes over a bound, or is ended by the system."""

_SECONDS = 2.0
"""The most computing time for one text, which usually takes less than a millisecond."""

_MEMORY = 1 << 30
"""The most bytes that rendering may take."""

_CHARACTERS = 1 << 24
"""The most characters of one text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """One text that is wanted of a template.

    Attributes:
      messages: the messages.
      generation_prompt: whether the header of the assistant's next turn follows them.
      continued: whether the last message is left open, for the model to continue.
    """

    messages: Sequence[Mapping[str, Any]]
    generation_prompt: bool = False
    continued: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """One text that a template made.

    Attributes:
      text: the text.
      marked: the characters that the template marks with `{% generation %}`.
      plain: where control tokens stand that are others' text, if they are told apart.
    """

    text: str
    marked: tuple[Span, ...] = ()
    plain: tuple[Span, ...] = ()


class TemplateError(BadRowError):
    """A template refuses a conversation or fails on it.

    Attributes:
      kind: the name of what it raised; "TemplateError" is a refusal of its own.
    """

    def __init__(self, kind: str, message: str):
        message = " ".join(message.split())
        # What a template itself refuses, and what it is ended for, is said in words.
        is_told = kind in ("TemplateError", *OVER_BOUNDS)
        super().__init__("chat template", message if is_told else f"{kind}: {message}")
        self.kind = kind


def render(
    source: str,
    wanted: Sequence[Wanted],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    marks: bool = False,
) -> list[Rendered]:
    """The texts that a template makes, as transformers renders it.

    Args:
      source: the Jinja template.
      wanted: what is rendered.
      tools: the tools that the conversation may call.
      variables: what else the template can name, such as `bos_token`.
      marks: whether the template's `{% generation %}` is looked at.

    Raises:
      TemplateError: if the template raises anything, or takes too much time or memory.
      BadRowError: if messages or tools hold what JSON does not.
    """
    # A conversation's texts share most messages, which are sent once.
    messages: dict[int, Mapping[str, Any]] = {}
    numbers: dict[int, int] = {}
    for one in wanted:
        for message in one.messages:
            numbers.setdefault(id(message), len(numbers))
            messages[id(message)] = message
    request = {
        "source": source,
        "messages": list(messages.values()),
        "wanted": [
            (
                [numbers[id(message)] for message in one.messages],
                one.generation_prompt,
                one.continued,
            )
            for one in wanted
        ],
        "tools": list(tools) if tools else None,
        "variables": dict(variables or {}),
        "marks": marks,
    }
    try:
        line = json.dumps(request).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        detail = f"messages and tools are what JSON can hold: {error}"
        raise BadRowError("wrong type", detail) from None
    answer = _worker().ask(line)
    if "error" in answer:
        raise TemplateError(answer["error"], answer["message"])
    return [
        Rendered(text=text, marked=tuple((start, stop) for start, stop in marked))
        for text, marked in zip(answer["texts"], answer["marks"], strict=True)
    ]


class _Worker:
    """The process that renders, started when it is first asked and after it was ended."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(self, line: bytes) -> dict[str, Any]:
        """The answer to one request."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if answer:
                return json.loads(answer)
            self._process = None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            code = process.wait()
        if code >= 0:
            raise RuntimeError(f"the process that renders chat templates ended with code {code}")
        message = f"the process that renders it was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGPROF:
            message = f"it does not end within {_SECONDS:g} s of computing"
        return {"error": "Endless" if code == -signal.SIGPROF else "Killed", "message": message}

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("render_worker.py")
        bounds = (str(_SECONDS), str(_MEMORY), str(_CHARACTERS))
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *bounds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self._process

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None and self.pid == os.getpid():
                process.communicate()


_lock = threading.Lock()
_current: _Worker | None = None


def _worker() -> _Worker:
    """This process's worker; a fork does not share its parent's."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = _Worker()
        return _current
