"""What the model has answered so far, on disk, so that a stopped evaluation goes on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError

from .json_lines import json_line


class ResponseStore:
    """Responses by request, a line of JSON each, added as they come.

    A line that a killed process left half written is dropped.

    Args:
      file: where they are kept; None: in memory only.

    Raises:
      RefusedError: the file has a line that is no response.
    """

    def __init__(self, file: Path | None = None):
        self._file = file
        self._known: dict[str, Any] = {}
        if file is not None and file.is_file():
            self._read(file)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._known)

    def get(self, *request: Any) -> Any:
        """The response to a request, or None.

        Raises:
          RefusedError: it is not of the form that responses to such requests have.
        """
        response = self._known.get(_key(request))
        if response is not None and not _FORMS.get(request[0], _is_anything)(response):
            raise RefusedError(
                f"{self._file} holds {str(response)[:100]!r} as the response to a request of the"
                f" kind {request[0]!r}, which has another form. {_REMEDY}"
            )
        return response

    def add(self, response: Any, *request: Any) -> None:
        """Keeps a response, which JSON can hold and is not None."""
        key = _key(request)
        self._known[key] = response
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json_line([key, response]))

    def _read(self, file: Path) -> None:
        whole = 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    key, response = json.loads(line)
                    if not isinstance(key, str):
                        raise ValueError(f"its request is {str(key)[:100]}")
                except (ValueError, TypeError, RecursionError) as error:
                    raise RefusedError(
                        f"{file}:{number} is no response: {error}. {_REMEDY}"
                    ) from error
                self._known[key] = response
                whole += len(line)
        if whole < file.stat().st_size:
            with file.open("r+b") as stream:
                stream.truncate(whole)


_REMEDY = "Take the line out, or remove the file to ask for all of them again"


def _is_anything(response: Any) -> bool:
    return True


def _is_text(response: Any) -> bool:
    return isinstance(response, str)


def _is_number(response: Any) -> bool:
    return isinstance(response, (int, float)) and not isinstance(response, bool)


def _is_score(response: Any) -> bool:
    match response:
        case [log_likelihood, bool()]:
            return _is_number(log_likelihood)
    return False


def _is_outcome(response: Any) -> bool:
    match response:
        case {"verdict": str(), "detail": str(), "output": str(), "seconds": seconds, **rest}:
            return _is_number(seconds) and not rest
    return False


_FORMS: dict[str, Callable[[Any], bool]] = {
    "generate": _is_text,
    "judge": _is_text,
    "loglikelihood": _is_score,
    "rolling": _is_number,
    "run tested": _is_outcome,
}
"""Tells whether a response is of the form that a kind of request has."""


def _key(request: tuple[Any, ...]) -> str:
    text = json.dumps(request, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
