"""Stores the model's responses on disk, so that an interrupted evaluation can resume."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError

from .json_lines import json_line


class ResponseStore:
    """Responses by request, appended to a file as JSON lines.

    A last line that a killed process left incomplete is dropped.

    Args:
      file: File of the responses; None: they are kept only in memory.

    Raises:
      RefusedError: A line of the file is not a response.
    """

    def __init__(self, file: Path | None = None):
        self._file = file
        self._known: dict[str, Any] = {}
        if file is not None and file.is_file():
            self._read(file)

    def __len__(self) -> int:
        """Returns the number of responses."""
        return len(self._known)

    def get(self, *request: Any) -> Any:
        """Returns the response to a request, or None.

        Raises:
          RefusedError: The response has the wrong form for its kind of request.
        """
        response = self._known.get(_key(request))
        if response is not None and not _FORMS.get(request[0], _is_anything)(response):
            raise RefusedError(
                f"{self._file} has a response of the wrong form to a {request[0]!r} request:"
                f" {str(response)[:100]!r}. {_REMEDY}"
            )
        return response

    def add(self, response: Any, *request: Any) -> None:
        """Stores a response, which must be JSON-serializable and not None."""
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
                        raise ValueError(f"its key is {str(key)[:100]}, not text")
                except (ValueError, TypeError, RecursionError) as error:
                    raise RefusedError(
                        f"{file}:{number} is not a response: {error}. {_REMEDY}"
                    ) from error
                self._known[key] = response
                whole += len(line)
        if whole < file.stat().st_size:
            with file.open("r+b") as stream:
                stream.truncate(whole)


_REMEDY = "Delete the line, or delete the file to compute all responses again"


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
"""Checks of a response's form, by kind of request."""


def _key(request: tuple[Any, ...]) -> str:
    text = json.dumps(request, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
