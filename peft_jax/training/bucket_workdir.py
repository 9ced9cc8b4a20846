"""Keeps the work directory of a run in a bucket.

A run in a bucket writes its files to a folder on the local disk, as any other run does. At the
start that folder is made equal to the bucket, which may have the run of another host. While the run
goes on, the first process copies what it has written:

- the configuration, before the first step;
- the metrics and TensorBoard events, every half minute and before each checkpoint;
- checkpoints, as soon as they are complete on disk;
- at the end the adapter, the model and the report, and then the summary, which marks the run as
  finished.

Of each folder, the file that marks it as complete is written last. So a run that is killed at any
moment, with its disk, resumes from the bucket. Each process of a run has a folder of its own, and
copies its part of each checkpoint.
"""

import concurrent.futures
import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from peft_jax.hub.adapter_files import CONFIG as ADAPTER_CONFIG
from peft_jax.runtime.bucket_lock import BucketLock, lock_bucket
from peft_jax.runtime.buckets import Bucket, check_names, reach_store
from peft_jax.runtime.errors import EndingError, RefusedError, StorageError
from peft_jax.training.bucket_checkpoints import BucketCheckpoints
from peft_jax.training.checkpoints import Checkpoints
from peft_jax.training.config_sections import CheckpointSettings
from peft_jax.training.placement import from_first
from peft_jax.training.report.metrics import Record
from peft_jax.training.workdir import WorkDir

_RESULTS = {"adapter": ADAPTER_CONFIG, "model": "config.json", "report": "README.md"}
"""Folders of results, and the file of each that marks it as complete."""

_FILES = (
    "config.json",
    "inputs.json",
    "metrics.jsonl",
    "summary.json",
    "wandb-run-id",
    # Show that these results are complete; a run does not read them.
    "model/config.json",
    "report/README.md",
)
"""Files that a run copies from the bucket at its start, besides the adapter."""

_SECONDS_BETWEEN_COPIES = 30.0
_LAST_COPY_SECONDS = 20.0


class WorkDirCopy:
    """Copy of a work directory in a bucket; of one on disk, which needs none.

    Args:
      folder: The work directory.
    """

    def __init__(self, folder: WorkDir):
        self.folder = folder

    def checkpoints(self, settings: CheckpointSettings) -> Checkpoints:
        """Returns the checkpoints of the run."""
        return Checkpoints(
            self.folder.checkpoints, keep=settings.keep, asynchronous=settings.asynchronous
        )

    def claim(self) -> None:
        """Copies the configuration of the run, and marks it as unfinished."""

    def records_sink(self) -> "RecordsSink | None":
        """Returns the sink that copies metrics; None without a copy."""
        return None

    def finish(self) -> None:
        """Copies the results of the run."""


class BucketCopy(WorkDirCopy):
    """Copy of a work directory in a bucket.

    Args:
      folder: The work directory.
      bucket: Its folder in the bucket.
      lock: Lock of that folder, which the first process holds; None in the others.
      session: Name of this run's start, the same in every process.
    """

    def __init__(
        self, folder: WorkDir, bucket: Bucket, lock: BucketLock | None, *, session: str = ""
    ):
        super().__init__(folder)
        self._bucket = bucket
        self.lock = lock
        self._session = session

    def checkpoints(self, settings: CheckpointSettings) -> Checkpoints:
        """Returns the checkpoints of the run."""
        return BucketCheckpoints(
            self.folder.checkpoints,
            bucket=self._bucket,
            lock=self.lock,
            before=self.copy_records,
            session=self._session,
            keep=settings.keep,
            asynchronous=settings.asynchronous,
        )

    def claim(self) -> None:
        """Copies the configuration of the run, and marks it as unfinished."""
        self._bucket.delete(["summary.json"])
        self._bucket.upload(self._present("config.json", "inputs.json"))

    def records_sink(self) -> "RecordsSink":
        """Returns the sink that copies metrics."""
        return RecordsSink(self)

    def copy_records(self, *, timeout: float | None = None) -> None:
        """Copies metrics and TensorBoard events.

        Args:
          timeout: Seconds to wait for each response.

        Raises:
          StorageError: The bucket cannot be written.
        """
        events = _files(self.folder.tensorboard, self.folder.path)
        records = self._present("metrics.jsonl", "wandb-run-id")
        self._bucket.upload(records | events, timeout=timeout)

    def finish(self) -> None:
        """Copies the results of the run, and the summary after them."""
        if self.lock is not None:
            self.lock.check()
        for name, last in _RESULTS.items():
            self._copy_folder(name, last)
        self.copy_records()
        self._bucket.upload(self._present("summary.json"))

    def pull(self) -> None:
        """Makes the local folder equal to the bucket, except for checkpoints.

        Raises:
          ValueError: The bucket has a name that no file can have.
        """
        path = self.folder.path
        path.mkdir(parents=True, exist_ok=True)
        for entry in path.iterdir():
            if entry == self.folder.checkpoints:
                continue  # `BucketCheckpoints` compares them with those in the bucket.
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        download(self._bucket, [*_FILES, *self._bucket.names("adapter/")], path)

    def _copy_folder(self, name: str, last: str) -> None:
        """Copies a folder of results, the file that marks it as complete last."""
        files = _files(self.folder.path / name, self.folder.path)
        if not files:
            return
        mark = f"{name}/{last}"
        before = self._bucket.names(f"{name}/")
        self._bucket.delete([mark] if mark in before else [])
        self._bucket.upload({key: file for key, file in files.items() if key != mark})
        self._bucket.upload({mark: files[mark]})
        if mark in before:
            # As on disk, a complete folder of results is replaced, and no other.
            self._bucket.delete(set(before) - files.keys())

    def _present(self, *names: str) -> dict[str, Path]:
        files = {name: self.folder.path / name for name in names}
        return {name: file for name, file in files.items() if file.is_file()}


class RecordsSink:
    """Copies metrics to the bucket in the background, but not with each record.

    Args:
      copy: Copy of the work directory.
    """

    def __init__(self, copy: BucketCopy):
        self._copy = copy
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "metrics")
        self._copying: concurrent.futures.Future[None] | None = None
        self._began = time.monotonic()

    def write(self, record: Record) -> None:
        """Starts a copy if the last one is old.

        Raises:
          StorageError: The last copy failed.
        """
        del record  # It is in the file.
        if time.monotonic() - self._began < _SECONDS_BETWEEN_COPIES:
            return
        if self._copying is not None:
            if not self._copying.done():
                return
            self._copying.result()
        self._began = time.monotonic()
        self._copying = self._thread.submit(self._copy.copy_records)

    def close(self) -> None:
        """Copies the last records, if the bucket responds."""
        self._thread.shutdown()
        with contextlib.suppress(StorageError):
            self._copy.copy_records(timeout=_LAST_COPY_SECONDS)


@contextlib.contextmanager
def keep_copy(folder: WorkDir, *, say: Callable[[str], None]) -> Iterator[WorkDirCopy]:
    """Keeps a work directory's copy in its bucket, if it has one, during the block.

    Args:
      folder: Work directory.
      say: Prints messages.

    Raises:
      RefusedError: The bucket cannot be used, or another run uses it.
    """
    if not folder.url:
        yield WorkDirCopy(folder)
        return
    try:
        reach_store(folder.url, "config.json")
    except ValueError as error:
        raise RefusedError(f"--workdir {error}") from error
    bucket, index = Bucket(folder.url), jax.process_index()
    with contextlib.ExitStack() as stack:
        lock = None
        if index == 0:
            lock = stack.enter_context(lock_bucket(bucket, folder.path.parent, say=say))
        else:
            # Processes of one host must not share a folder.
            folder = WorkDir(folder.path.with_name(f"files-{index}"), folder.url)
        stack.enter_context(naming_bucket(folder))
        # The others wait for the lock.
        session = from_first(uuid.uuid4().hex)
        copy = BucketCopy(folder, bucket, lock, session=session)
        copy.pull()
        yield copy
        # The others find the results in the bucket once they are here.
        from_first(None)


@contextlib.contextmanager
def naming_bucket(folder: WorkDir) -> Iterator[None]:
    """Gives errors of the block the URL of the work directory in place of the local path."""
    try:
        yield
    except EndingError as error:
        error.args = (folder.shown(str(error)),)
        raise


def download(bucket: Bucket, names: list[str], folder: Path) -> None:
    """Copies objects to files of the same names.

    Args:
      bucket: Folder in a bucket.
      names: Names of the objects; those that do not exist are ignored.
      folder: Folder of the files.

    Raises:
      ValueError: A name leads out of the folder.
    """
    check_names(names, bucket.url)
    bucket.download({name: folder / name for name in names})


def _files(folder: Path, root: Path) -> dict[str, Path]:
    """Returns the files of a folder by their path from `root`, without temporary ones."""
    return {
        path.relative_to(root).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
