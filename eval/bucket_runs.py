"""Evaluates runs whose work directory is in a bucket.

What an evaluation reads of the run is copied to a folder on the local disk. Its results are written
to a folder beside it, and copied to `eval/` in the bucket when the command ends, however it does.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from peft_jax.hub.adapter_files import CONFIG as ADAPTER_CONFIG
from peft_jax.runtime.buckets import Bucket, check_names, is_bucket, reach_store
from peft_jax.runtime.files import cache_folder

_READ = ("config.json", f"adapter/{ADAPTER_CONFIG}", "model/config.json")
_RESULTS = "eval/"


@dataclasses.dataclass(frozen=True)
class Run:
    """Work directory of a run.

    Attributes:
      folder: Folder on disk; of a run in a bucket, one with copies of its small files. None without
        a run.
      url: URL of a run in a bucket; empty for one on disk.
    """

    folder: Path | None
    url: str = ""

    def shown(self, path: Path) -> str:
        """Returns a path for messages, with the URL of a run in a bucket."""
        return str(path).replace(str(self.folder), self.url) if self.url else str(path)


@contextlib.contextmanager
def open_run(workdir: str | None) -> Iterator[Run]:
    """Yields a run's work directory, and copies results to the bucket that it is in.

    Args:
      workdir: Folder, or URL of a folder in a bucket; None without a run.

    Raises:
      ValueError: The bucket cannot be reached.
    """
    if workdir is None or not is_bucket(workdir):
        yield Run(None if workdir is None else Path(workdir))
        return
    url = workdir.rstrip("/")
    reach_store(url, "config.json")
    bucket = Bucket(url)
    folder = cache_folder() / "eval" / hashlib.sha256(url.encode()).hexdigest()[:16]
    waiting = folder / "not-copied"
    for name in _READ:
        (folder / name).unlink(missing_ok=True)
    # Results that a killed command could not copy are newer than those in the bucket.
    before = [] if waiting.exists() else bucket.names(_RESULTS)
    check_names(before, url)
    folder.mkdir(parents=True, exist_ok=True)
    bucket.download({name: folder / name for name in (*_READ, *before)})
    results = folder / _RESULTS
    results.mkdir(exist_ok=True)
    waiting.touch()
    try:
        yield Run(folder, url)
    finally:
        files = {
            path.relative_to(folder).as_posix(): path
            for path in results.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
        bucket.upload(files)
        waiting.unlink()
