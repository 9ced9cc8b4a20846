"""Records as lines of JSON that any text can be in."""

import json
from collections.abc import Callable
from typing import Any


def json_line(record: Any, default: Callable[[Any], Any] | None = None) -> str:
    r"""One record as a line, its end included.

    Half of a surrogate pair, which programs and judges may write and UTF-8 has no bytes for, is
    escaped; it is read back as it was.

    Args:
      record: what JSON can hold.
      default: makes such of what it cannot.

    Example:
      >>> json_line({"said": "ä\ud83d"})
      '{"said": "ä\\ud83d"}\n'
    """
    line = json.dumps(record, default=default, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode()
