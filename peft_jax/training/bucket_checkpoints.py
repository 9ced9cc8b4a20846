"""Keeps the checkpoints of a run in a bucket.

Orbax writes a checkpoint to the local disk, where it gets its manifest. It is then copied to
`checkpoints/STEP/` in the bucket, the manifest last. So an object store, which cannot rename a
folder, has only complete checkpoints, and others that have no manifest and are never read. They
have the form of those on disk: a folder copied from the bucket resumes as well.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from peft_jax.runtime.bucket_lock import BucketLock
from peft_jax.runtime.buckets import Bucket, check_names
from peft_jax.training.checkpoints import MANIFEST, NOT_LISTED, STEP, Checkpoints

FOLDER = "checkpoints/"
_DAMAGED_MANIFEST = "damaged-manifest.json"


class BucketCheckpoints(Checkpoints):
    """Writes and restores the checkpoints of one run of one process, with copies in a bucket.

    Args:
      folder: Folder on disk that checkpoints are staged in.
      bucket: Work directory in the bucket.
      lock: Lock of the work directory.
      before: Called before a checkpoint is copied, to copy what it refers to.
      keep: Number of newest checkpoints to keep, on disk and in the bucket.
      asynchronous: As in `Checkpoints`; the copy is part of the writing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bucket: Bucket,
        lock: BucketLock,
        before: Callable[[], None],
        keep: int = 3,
        asynchronous: bool = True,
    ):
        super().__init__(folder, keep=keep, asynchronous=asynchronous)
        self._bucket = bucket
        self._lock = lock
        self._before = before

    def newest(self, *, say: Callable[[str], None]) -> int | None:
        """Fetches the newest checkpoint that agrees with its manifest.

        Args:
          say: Prints a message for each checkpoint that is not used, and why.

        Returns:
          The step of the checkpoint, or None without one.
        """
        objects = self._objects(say)
        self._remove_unlike(set(objects))
        for step in sorted(objects, reverse=True):
            self._fetch(step, objects[step])
            fault = self._fault(self.path(step))
            if fault is None:
                return step
            shutil.rmtree(self.path(step))
            manifest = self._name(step, MANIFEST)
            self._bucket.write(
                self._name(step, _DAMAGED_MANIFEST), self._bucket.read(manifest) or b""
            )
            self._bucket.delete([manifest])
            say(
                f"checkpoint {self._bucket.locate(FOLDER)}{step} is damaged ({fault}) and is not"
                f" used; renamed its {MANIFEST} to {_DAMAGED_MANIFEST}"
            )
        return None

    def _seal(self) -> None:
        """Writes the manifest, and copies the checkpoint to the bucket.

        Raises:
          StorageError: The arrays cannot be restored, or the bucket cannot be written.
        """
        super()._seal()
        folder, step = self._folder_being_written(), self._saving
        assert step is not None
        self._lock.check()
        self._before()
        prefix = self._name(step, "")
        self._delete(step, self._bucket.names(prefix))
        files = {
            f"{prefix}{path.relative_to(folder).as_posix()}": path
            for path in folder.rglob("*")
            if path.is_file() and path.name not in NOT_LISTED
        }
        self._bucket.upload(files)
        self._lock.check()
        self._bucket.upload({f"{prefix}{MANIFEST}": folder / MANIFEST})
        objects = self._objects(say=None)
        for old in sorted(objects)[: -self._keep]:
            self._delete(old, objects[old])

    def _objects(self, say: Callable[[str], None] | None) -> dict[int, list[str]]:
        """Returns the names of the objects of each complete checkpoint.

        Args:
          say: Called for each incomplete checkpoint, which is removed; None leaves it.
        """
        found: dict[int, list[str]] = {}
        for name in self._bucket.names(FOLDER):
            folder, _, rest = name.removeprefix(FOLDER).partition("/")
            if STEP.fullmatch(folder) and rest:
                found.setdefault(int(folder), []).append(name)
        whole = {step: found[step] for step in found if self._name(step, MANIFEST) in found[step]}
        for step in found.keys() - whole.keys():
            if say is not None and self._name(step, _DAMAGED_MANIFEST) not in found[step]:
                self._delete(step, found[step])
                say(f"removed the incomplete checkpoint {self._bucket.locate(FOLDER)}{step}")
        return whole

    def _remove_unlike(self, steps: set[int]) -> None:
        """Removes staged checkpoints, except copies of those in the bucket."""
        if not self._folder.is_dir():
            return
        for entry in self._folder.iterdir():
            step = int(entry.name) if STEP.fullmatch(entry.name) else None
            if step not in steps or not self._has_manifest_of(step):
                shutil.rmtree(entry)

    def _has_manifest_of(self, step: int) -> bool:
        """Returns whether the staged checkpoint has the manifest of the one in the bucket."""
        file = self.path(step) / MANIFEST
        return file.is_file() and file.read_bytes() == self._bucket.read(self._name(step, MANIFEST))

    def _fetch(self, step: int, names: list[str]) -> None:
        """Copies a checkpoint from the bucket, unless an intact copy is on disk."""
        folder = self.path(step)
        if folder.is_dir() and self._fault(folder) is None:
            return
        shutil.rmtree(folder, ignore_errors=True)
        relative = {name: name.removeprefix(self._name(step, "")) for name in names}
        check_names(relative.values(), self._bucket.locate(self._name(step, "")))
        self._bucket.download({name: folder / path for name, path in relative.items()})

    def _delete(self, step: int, names: list[str]) -> None:
        """Deletes a checkpoint in the bucket, its manifest first."""
        manifest = self._name(step, MANIFEST)
        self._bucket.delete([name for name in names if name == manifest])
        self._bucket.delete([name for name in names if name != manifest])

    def _name(self, step: int, name: str) -> str:
        return f"{FOLDER}{step}/{name}"
