"""Writes records as JSON lines, whatever text they hold."""

import json
from collections.abc import Callable
from typing import Any


def json_line(record: Any, default: Callable[[Any], Any] | None = None) -> str:
    r"""Returns a record as one line, with the newline.

    Programs and judges may write lone surrogates, which UTF-8 cannot encode. They are escaped, so
    that reading the line restores them.

    Args:
      record: JSON-serializable record.
      default: Converts other values, as in `json.dumps`.

    Example:
      >>> json_line({"said": "ä\ud83d"})
      '{"said": "ä\\ud83d"}\n'
    """
    line = json.dumps(record, default=default, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode()
