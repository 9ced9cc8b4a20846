"""Reads JSON files of an earlier command, which may have been changed since."""

import json
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError


def read_object(file: Path, what: str, remedy: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
      file: File to read.
      what: Description of the expected content, for messages.
      remedy: Advice for messages.

    Raises:
      RefusedError: The file is truncated, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object but found {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise invalid_file(file, what, error, remedy) from error
    return value


def invalid_file(file: Path, what: str, error: Exception, remedy: str) -> RefusedError:
    """Returns the error that rejects a file with unexpected content."""
    why = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
    return RefusedError(f"{file} is not {what}: {why}. {remedy}")
