"""Writes files and folders atomically, however the process ends."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError

_LARGEST_JSON = 256 * 2**20
"""Maximum size in bytes; the indices of the largest checkpoints have about ten million."""

_DEEPEST_JSON = 64

_UNFINISHED = ("tmp", "old")
"""Name suffixes of folders that are not yet, or no longer, in place."""


def cache_folder() -> Path:
    """Returns the folder of fetched and staged files: $PEFT_JAX_CACHE, or ~/.cache/peft_jax."""
    return Path(os.environ.get("PEFT_JAX_CACHE") or "~/.cache/peft_jax").expanduser().absolute()


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yields a temporary path beside `file`, and moves it into place once it is on disk.

    The temporary path keeps the suffix of `file`, because some libraries choose a format by it. If
    the block raises, nothing is left behind and `file` is unchanged. The parent folder is created.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp{file.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically and in key order."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      ValueError: The file is missing, too large, or not a JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} lacks {file.name}")
    if (size := file.stat().st_size) > _LARGEST_JSON:
        raise ValueError(
            f"{file} has {size:,} bytes; the limit for a JSON file is {_LARGEST_JSON:,}"
        )
    return parse_json_object(file.read_bytes(), str(file))


def parse_json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Parses the object in a JSON text.

    Args:
      text: JSON text; bytes are UTF-8.
      what: Name of the text in messages.

    Raises:
      ValueError: The text is not JSON, not an object, or nested more than 64 levels deep.

    Example:
      >>> parse_json_object("[1]", "config.json")
      Traceback (most recent call last):
      ValueError: config.json is not a JSON object
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{what} has more than {_DEEPEST_JSON} nested levels") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    if not _is_shallow(value, _DEEPEST_JSON):
        raise ValueError(f"{what} has more than {_DEEPEST_JSON} nested levels")
    return value


def _is_shallow(value: Any, levels: int) -> bool:
    """Returns whether a JSON value has at most `levels` nested levels."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return True
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in value)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, and moves it into place after the block.

    The old content of `folder` is only removed once the new folder is complete, so that no reader
    sees a mixture. If the block raises, nothing is left behind and `folder` is unchanged.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in _UNFINISHED
    )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _put_in_place(temporary, folder, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes killed in `atomic_folder` have left beside a folder.

    Call this when `folder` is in place and no other process can be writing it.
    """
    for end in _UNFINISHED:
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.{end}"):
            shutil.rmtree(left, ignore_errors=True)


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Moves a folder into place, and removes the folder that was there by way of `old`."""
    if not folder.exists():
        new.rename(folder)
        return
    # A killed process may have left this folder: process ids recur, above all in containers.
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, flag: str = "--workdir") -> Iterator[None]:
    """Holds a lock file during the block; the system releases it if the process dies.

    Args:
      path: Lock file.
      flag: Flag that sets the folder, for messages.

    Raises:
      RefusedError: Another process holds the lock.
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
