"""Renders chat templates in a separate process with limited CPU time and memory.

A template comes with a model and is not trusted. Jinja's sandbox protects the machine, but cannot
stop endless computing, such as nested loops or one huge power, which no other thread can interrupt.
The operating system ends such a process. The conversation becomes a bad row, and the next one
starts a new process.
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

LIMIT_KINDS = ("Endless", "MemoryError", "Killed")
"""Kinds of errors of a template that exceeds a limit or is ended by the operating system."""

_SECONDS = 2.0
"""Limit of CPU seconds per text; a usual text takes less than a millisecond."""

_MEMORY = 1 << 30
"""Limit of bytes of memory."""

_CHARACTERS = 1 << 24
"""Limit of characters per text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderRequest:
    """A request to render one text.

    Attributes:
      messages: Messages of the conversation.
      generation_prompt: Whether to append the header of the assistant's next turn.
      continued: Whether to leave the last message open, for the model to continue.
    """

    messages: Sequence[Mapping[str, Any]]
    generation_prompt: bool = False
    continued: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """A rendered text.

    Attributes:
      text: Text.
      marked: Spans that the template marks with `{% generation %}`.
      plain: Spans of control tokens from the data's own text, if these are tracked.
    """

    text: str
    marked: tuple[Span, ...] = ()
    plain: tuple[Span, ...] = ()


class TemplateError(BadRowError):
    """Raised if a template rejects a conversation or fails on it.

    Attributes:
      kind: Name of the exception; "TemplateError" if the template itself rejects.
    """

    def __init__(self, kind: str, message: str):
        message = " ".join(message.split())
        # These messages are sentences already; others need the exception's name.
        is_told = kind in ("TemplateError", *LIMIT_KINDS)
        super().__init__("chat template", message if is_told else f"{kind}: {message}")
        self.kind = kind


def render(
    source: str,
    requests: Sequence[RenderRequest],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    marks: bool = False,
) -> list[Rendered]:
    """Renders texts by a template, as transformers does.

    Args:
      source: Jinja template.
      requests: Texts to render.
      tools: Tools that the conversation may call.
      variables: Other variables of the template, such as `bos_token`.
      marks: Whether to return the spans of the template's `{% generation %}`.

    Raises:
      TemplateError: The template raises an error, or exceeds the limits of time or memory.
      BadRowError: Messages or tools hold values that JSON cannot represent.
    """
    # The texts of a conversation share most messages, so each message is sent once.
    messages: dict[int, Mapping[str, Any]] = {}
    numbers: dict[int, int] = {}
    for one in requests:
        for message in one.messages:
            numbers.setdefault(id(message), len(numbers))
            messages[id(message)] = message
    request = {
        "source": source,
        "messages": list(messages.values()),
        "requests": [
            (
                [numbers[id(message)] for message in one.messages],
                one.generation_prompt,
                one.continued,
            )
            for one in requests
        ],
        "tools": list(tools) if tools else None,
        "variables": dict(variables or {}),
        "marks": marks,
    }
    try:
        line = json.dumps(request).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        detail = f"messages and tools must be JSON values: {error}"
        raise BadRowError("wrong type", detail) from None
    answer = _worker().ask(line)
    if "error" in answer:
        raise TemplateError(answer["error"], answer["message"])
    return [
        Rendered(text=text, marked=tuple((start, stop) for start, stop in marked))
        for text, marked in zip(answer["texts"], answer["marks"], strict=True)
    ]


class _Worker:
    """Process that renders; started on the first request, and again after it has ended."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(self, line: bytes) -> dict[str, Any]:
        """Sends one request and returns the answer."""
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
            message = f"it does not end within {_SECONDS:g} s of CPU time"
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
    """Returns this process's worker; a forked process gets its own."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = _Worker()
        return _current
