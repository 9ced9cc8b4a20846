"""What a task's model and data are, wherever they lie.

A cell's digest holds the names of folders, by which a study goes on after its data have been moved.
This tells two folders of one name apart.
"""

import functools
import hashlib
from pathlib import Path

from .settings import TaskSettings

_HEAD = 1 << 16
"""So many bytes of a file are read: all of a configuration, the header of safetensors."""

_MODEL_FILES = ("config.json", "*.safetensors")
_DATA_FILES = ("*.csv", "*.gz", "*.json", "*.jsonl", "*.parquet", "*.tsv", "*.txt", "*.dev*")


def source_of(task: TaskSettings) -> dict[str, str]:
    """Fingerprints of the model and of the data: of files' names, sizes and beginnings.

    What lies in no local folder is left out: its name on the hub says what it is.
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


def agree(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two fingerprints are of one thing, as far as both are known."""
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
