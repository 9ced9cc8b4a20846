"""JSON that an earlier command has left behind, and that others may have changed."""

import json
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError


def read_object(file: Path, what: str, remedy: str) -> dict[str, Any]:
    """Returns the object that a file holds.

    Args:
      file: The file.
      what: What it should be, in a word or two.
      remedy: What would help where it is none.

    Raises:
      RefusedError: It is cut off, no JSON, or no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is expected, and it is {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise not_one(file, what, error, remedy) from error
    return value


def not_one(file: Path, what: str, error: Exception, remedy: str) -> RefusedError:
    """Returns the refusal of a file that is not what it should be."""
    why = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
    return RefusedError(f"{file} is not {what}: {why}. {remedy}")
