"""Files that are either whole or not there: writes that a killed process cannot leave half done."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_jax.training.errors import RefusedError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file through a temporary one beside it, renamed into place once it is on disk.

    Args:
      path: the file to write; its folder is created.
      write: writes the content to the path it is given, which has the suffix of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def locked(path: Path, flag: str = "--workdir") -> Iterator[None]:
    """Holds a lock file for the length of the block; the system releases it if the process dies.

    Args:
      path: the file.
      flag: what names the folder to the user.

    Raises:
      RefusedError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise RefusedError(
                f"{path.parent} is in use by another run: wait until it ends, or give this one a "
                f"folder of its own with {flag}"
            ) from error
        yield
