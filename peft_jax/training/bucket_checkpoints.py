"""Keeps the checkpoints of a run in a bucket.

Orbax writes a checkpoint to the local disk. From there it is copied to `checkpoints/STEP/` in the
bucket, the manifest last. So an object store, which cannot rename a folder, has only complete
checkpoints, and others that have no manifest and are never read. A checkpoint that is copied from
the bucket to a work directory on disk resumes as well.

Of several processes each writes the shards of its devices to a disk of its own, as plain Zarr
arrays, and copies its files. Together they are a checkpoint. The first process writes the manifest
once the others have told it, through JAX's coordinator, that theirs are in the bucket. Before a run
resumes, each process copies the whole checkpoint to its disk.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from peft_jax.runtime.bucket_lock import BucketLock
from peft_jax.runtime.buckets import Bucket, check_names
from peft_jax.runtime.errors import StorageError
from peft_jax.runtime.files import write_json
from peft_jax.training.checkpoints import MANIFEST, STEP, Checkpoints, describe
from peft_jax.training.placement import gather_json

FOLDER = "checkpoints/"
_DAMAGED_MANIFEST = "damaged-manifest.json"

_TOLD = "peft_jax/checkpoint"
"""Prefix of the coordinator's keys that hold what each process has copied."""

_PATIENCE_SECONDS = 3600
"""Time for the other processes to copy their files; a lost process ends all of them before."""


class BucketCheckpoints(Checkpoints):
    """Writes and restores the checkpoints of one run, with copies in a bucket.

    Args:
      folder: Folder on this process's disk that checkpoints are staged in.
      bucket: Work directory in the bucket.
      lock: Lock of the work directory; None in all processes but the first.
      before: Called before a checkpoint is copied, to copy what it refers to.
      session: Name of this run's start, the same in every process.
      keep: Number of newest checkpoints to keep in the bucket. The disk has the newest.
      asynchronous: As in `Checkpoints`; the copy is part of the writing.
    """

    # Whole files are in memory while they are copied, eight at a time.
    _file_bytes = 256 * 2**20

    def __init__(
        self,
        folder: Path,
        *,
        bucket: Bucket,
        lock: BucketLock | None,
        before: Callable[[], None],
        session: str = "",
        keep: int = 3,
        asynchronous: bool = True,
    ):
        super().__init__(folder, keep=keep, asynchronous=asynchronous)
        self._bucket = bucket
        self._lock = lock
        self._before = before
        self._session = session

    def newest(self, *, say: Callable[[str], None]) -> int | None:
        """Fetches the newest checkpoint that agrees with its manifest.

        Args:
          say: Prints a message for each checkpoint that is not used, and why.

        Returns:
          The step of the checkpoint, or None without one; the same in every process.

        Raises:
          StorageError: The first process reads the checkpoint well, and another does not.
        """
        found = self._fetch_newest(say) if jax.process_index() == 0 else None
        if jax.process_count() == 1:
            return found
        found = gather_json(found)[0]
        fault = None
        if jax.process_index() != 0:
            objects = self._objects(say=None)
            self._remove_unlike({found} if found in objects else set())
            if found is not None:
                fault = self._fetch(found, objects.get(found, []))
        for process, its_fault in enumerate(gather_json(fault)):
            if its_fault is not None:
                raise StorageError(
                    f"checkpoint {self.path(found or 0)} is damaged ({its_fault}) on the disk of"
                    f" process {process}; free its disk or replace it"
                )
        return found

    def _fetch_newest(self, say: Callable[[str], None]) -> int | None:
        objects = self._objects(say)
        self._remove_unlike(set(objects))
        for step in sorted(objects, reverse=True):
            fault = self._fetch(step, objects[step])
            if fault is None:
                return step
            shutil.rmtree(self.path(step), ignore_errors=True)
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

    def _make_checkpointer(self) -> ocp.AsyncCheckpointer:
        """Returns Orbax's writer; of several processes, each writes to its own disk."""
        if jax.process_count() == 1:
            return super()._make_checkpointer()
        alone = ocp.options.MultiprocessingOptions(primary_host=None)
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
                # With OCDBT, the parts would have to be merged on one disk.
                arrays=ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone),
                run=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            ),
            multiprocessing_options=alone,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    def _prune(self) -> None:
        """Deletes the staged checkpoints, except for the newest one."""
        for step in self.steps()[:-1]:
            shutil.rmtree(self.path(step))

    def _seal(self) -> None:
        """Copies the checkpoint to the bucket, and writes the manifest.

        Raises:
          StorageError: The arrays cannot be restored, or the bucket cannot be written.
        """
        folder, step = self._folder_being_written(), self._saving
        assert step is not None
        prefix = self._name(step, "")
        parts = describe(folder)
        if self._lock is None:
            parts = {name: part for name, part in parts.items() if _is_of_one_process(name)}
            self._bucket.upload({f"{prefix}{name}": folder / name for name in parts})
            self._tell(step, parts)
        else:
            self._check_restorable(folder)
            self._lock.check()
            self._before()
            self._delete(step, self._bucket.names(self._name(step, MANIFEST)))
            self._bucket.upload({f"{prefix}{name}": folder / name for name in parts})
            manifest = self._gather(step) | parts
            self._lock.check()
            whole = {f"{prefix}{name}" for name in manifest}
            left = [name for name in self._bucket.names(prefix) if name not in whole]
            self._bucket.delete(left)  # A killed run may have left them.
            self._bucket.write(f"{prefix}{MANIFEST}", _to_json(manifest))
            self._prune_bucket()
        # Of several processes each has a part on its disk, which it does not restore from.
        write_json(folder / MANIFEST, parts)

    def _tell(self, step: int, parts: dict[str, Any]) -> None:
        """Tells the first process that this one's part of a checkpoint is in the bucket."""
        _coordinator().key_value_set(self._key(step, jax.process_index()), json.dumps(parts))

    def _gather(self, step: int) -> dict[str, Any]:
        """Returns what the other processes have copied, once they have."""
        told = [
            _coordinator().blocking_key_value_get(
                self._key(step, process), _PATIENCE_SECONDS * 1000
            )
            for process in range(1, jax.process_count())
        ]
        return {name: part for text in told for name, part in json.loads(text).items()}

    def _key(self, step: int, process: int) -> str:
        return f"{_TOLD}/{self._session}/{step}/{process}"

    def _prune_bucket(self) -> None:
        """Deletes the oldest checkpoints in the bucket, so that `keep` are left."""
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

    def _fetch(self, step: int, names: list[str]) -> str | None:
        """Copies a checkpoint from the bucket, unless an intact copy is on disk.

        Args:
          step: Step of the checkpoint.
          names: Names of its objects.

        Returns:
          How the copy disagrees with its manifest; None if it agrees.
        """
        folder = self.path(step)
        if folder.is_dir() and self._fault(folder) is None:
            return None
        shutil.rmtree(folder, ignore_errors=True)
        relative = {name: name.removeprefix(self._name(step, "")) for name in names}
        check_names(relative.values(), self._bucket.locate(self._name(step, "")))
        self._bucket.download({name: folder / path for name, path in relative.items()})
        return self._fault(folder)

    def _delete(self, step: int, names: list[str]) -> None:
        """Deletes a checkpoint in the bucket, its manifest first."""
        manifest = self._name(step, MANIFEST)
        self._bucket.delete([name for name in names if name == manifest])
        self._bucket.delete([name for name in names if name != manifest])

    def _name(self, step: int, name: str) -> str:
        return f"{FOLDER}{step}/{name}"


def _is_of_one_process(name: str) -> bool:
    """Returns whether a file of a checkpoint differs between processes, by its path.

    Example:
      >>> _is_of_one_process("arrays/state.step/0"), _is_of_one_process("run/metadata")
      (True, False)
    """
    folder, _, within = name.partition("/")
    return folder == "arrays" and "/" in within


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _coordinator() -> Any:
    from jax._src.distributed import global_state  # the coordinator's store has no public name

    return global_state.client
