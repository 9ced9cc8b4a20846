"""What the model has answered so far, on disk, so that a stopped evaluation goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from eval.json_lines import json_line


class ResponseStore:
    """Responses by request, a line of JSON each, added as they come.

    A line that a killed process left half written is dropped.

    Args:
      file: where they are kept; None: in memory only.
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
        """The response to a request, or None."""
        return self._known.get(_key(request))

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
            for line in stream:
                try:
                    key, response = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self._known[key] = response
                whole += len(line)
        if whole < file.stat().st_size:
            with file.open("r+b") as stream:
                stream.truncate(whole)


def _key(request: tuple[Any, ...]) -> str:
    text = json.dumps(request, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
