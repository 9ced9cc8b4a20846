"""Computes fingerprints of a task's model and data, independent of their location.

A cell's digest contains only the names of folders, so that a study can resume after its data were
moved. Fingerprints tell folders of the same name apart.
"""

import functools
import hashlib
import os
import platform
from pathlib import Path

import jax

from .settings import TaskSettings

_HEAD = 1 << 16
"""Number of bytes of a file that are read: all of a configuration, the header of safetensors."""

_MODEL_FILES = ("config.json", "*.safetensors")
_DATA_FILES = ("*.csv", "*.gz", "*.json", "*.jsonl", "*.parquet", "*.tsv", "*.txt", "*.dev*")


def source_of(task: TaskSettings) -> dict[str, str]:
    """Returns fingerprints of the model and the data, from files' names, sizes and beginnings.

    A source on the hub has none, because its name identifies it.
    """
    config = task.config
    places = (
        ("model", config.model.path, _MODEL_FILES),
        ("data", config.data.path, _DATA_FILES),
    )
    return {
        what: _fingerprint(Path(path).expanduser().resolve(), patterns)
        for what, path, patterns in places
        if path and Path(path).expanduser().is_dir()
    }


def machine() -> str:
    """Returns what a cell was made on, without the machine's name."""
    device = jax.devices()[0].device_kind
    return f"{device}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"


def agree(one: dict[str, str], other: dict[str, str]) -> bool:
    """Returns whether two cells' fingerprints are equal, as far as both have them."""
    return all(one[what] == other[what] for what in {*one} & {*other})


@functools.cache
def _fingerprint(folder: Path, patterns: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.rglob(pattern)}):
        if file.is_file():
            with file.open("rb") as stream:
                head = stream.read(_HEAD)
            name = file.relative_to(folder).as_posix()
            found.update(repr((name, file.stat().st_size, head)).encode())
    return found.hexdigest()[:16]
