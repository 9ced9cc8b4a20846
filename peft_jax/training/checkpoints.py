"""Writes checkpoints in the background, and verifies them before they are restored.

    checkpoints/
      20/                   a checkpoint, named by its step; it appears by a rename
        arrays/             adapter and optimizer state, written by Orbax
        run/                JSON: the step, the data position, the seconds by phase
        manifest.json       the size and SHA-256 of every file of the folder
      damaged-30/           a checkpoint that did not agree with its manifest

The manifest is written after the arrays and before the rename, once every array's metadata has been
read back. So a process that is killed at any moment leaves only complete checkpoints, and at most a
temporary folder that is never read. A file that was truncated or changed later does not agree with
its manifest, and the previous checkpoint is used. A renamed folder is found by the step it holds.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peft_jax.core import join_path, names_of
from peft_jax.runtime.errors import RefusedError, StorageError
from peft_jax.runtime.files import write_json

STEP = re.compile(r"0|[1-9]\d*")
_UNFINISHED = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_DELETING = "deleting-"
_DAMAGED = "damaged-"

NOT_LISTED = {MANIFEST, "commit_success.txt", "_CHECKPOINT_METADATA"}
"""Files that a manifest does not list: itself, and files that Orbax writes later and can lack."""

_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
"""Pattern of the system's error number in TensorStore's messages."""


_NO_NEWS = ("Global object size logging disabled", "Skipping merge of OCDBT checkpoints")
"""Orbax's warnings if each process writes to a disk of its own."""


class Checkpoints:
    """Writes and restores the checkpoints of one run.

    Args:
      folder: Folder of the checkpoints; created with the first one.
      keep: Number of newest checkpoints to keep; at least 2, in case the last one is damaged.
      asynchronous: Whether `save` returns once the arrays are copied to the host, and writes them
        in the background.
    """

    _file_bytes: int | None = None
    """Approximate size of Orbax's files; None for Orbax's own."""

    def __init__(self, folder: Path, *, keep: int = 3, asynchronous: bool = True):
        if keep < 2:
            raise ValueError(
                f"keep is {keep}, but must be at least 2, in case the last checkpoint is damaged"
            )
        self._folder = folder.absolute()
        self._keep = keep
        self._asynchronous = asynchronous
        self._saving: int | None = None
        self._saved_arrays: Any = None
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(_without_tracebacks())
        self._orbax_folder = self._closing.enter_context(_plain_path(self._folder))
        self._checkpointer = self._make_checkpointer()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # The exception that ended the block is the cause of a failing checkpoint too.
        with contextlib.suppress(*(() if kind is None else (StorageError,))):
            self.close()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        names = [p.name for p in self._folder.iterdir() if (p / MANIFEST).is_file()]
        return sorted(int(name) for name in names if STEP.fullmatch(name))

    def path(self, step: int) -> Path:
        """Returns the folder of a checkpoint."""
        return self._folder / str(step)

    def save(self, step: int, arrays: Any, run: dict[str, Any]) -> None:
        """Starts writing a checkpoint, after the previous one has been written.

        Args:
          step: Number of steps taken.
          arrays: Pytree of arrays. They are copied before this returns, so that their buffers may
            be donated to the next step.
          run: Other state that is needed to resume, as JSON.

        Raises:
          StorageError: This or the previous checkpoint could not be written.
        """
        self.wait()
        self._prune()
        self._saving = step
        self._saved_arrays = jax.tree.map(_shape_and_dtype, arrays)
        with self._explaining_failures():
            self._checkpointer.save(
                self._orbax_path(step),
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(
                        arrays, ocdbt_target_data_file_size=self._file_bytes
                    ),
                    run=ocp.args.JsonSave(run),
                ),
            )
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on disk.

        Raises:
          StorageError: The checkpoint could not be written.
        """
        with self._explaining_failures():
            self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and stops the background thread.

        Raises:
          StorageError: The checkpoint could not be written.
        """
        with self._closing, self._explaining_failures():
            self._checkpointer.close()

    def newest(self, *, say: Callable[[str], None]) -> int | None:
        """Finds the newest checkpoint that agrees with its manifest, and renames damaged ones.

        Args:
          say: Prints a message for each checkpoint that is not used, and why.

        Returns:
          The step of the checkpoint, or None without one; the same in every process.
        """
        found = -1
        if jax.process_index() == 0 and self._folder.is_dir():
            self._clean(say)
            self._restore_names(say)
            for step in reversed(self.steps()):
                fault = self._fault(self.path(step))
                if fault is None:
                    found = step
                    break
                self._set_aside(step, fault, say)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        return None if found < 0 else found

    def read_run(self, step: int) -> dict[str, Any]:
        """Reads the JSON state that was saved with the arrays."""
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        return self._checkpointer.restore(self._orbax_path(step), args=args).run

    def read_arrays(self, step: int, abstract: Any) -> Any:
        """Restores the saved arrays bit for bit, with the given shardings.

        Args:
          step: Step of the checkpoint.
          abstract: Tree of `jax.ShapeDtypeStruct` with shardings, of the structure that was saved.

        Raises:
          ValueError: The checkpoint has another structure, shapes or dtypes.
        """
        item = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        )
        try:
            restored = self._checkpointer.restore(
                self._orbax_path(step), args=ocp.args.Composite(arrays=item)
            ).arrays
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path(step)} does not have the arrays that this run needs: {error}"
            ) from error
        for (path, wanted), (_, leaf) in zip(
            jax.tree.leaves_with_path(abstract), jax.tree.leaves_with_path(restored), strict=True
        ):
            if wanted.shape != leaf.shape or wanted.dtype != leaf.dtype:
                raise ValueError(
                    f"{self.path(step)}: {join_path(names_of(path))} is "
                    f"{leaf.dtype}{list(leaf.shape)}, but this run needs "
                    f"{wanted.dtype}{list(wanted.shape)}"
                )
        return restored

    def _make_checkpointer(self) -> ocp.AsyncCheckpointer:
        """Returns Orbax's writer, which calls `_seal`."""
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    def _orbax_path(self, step: int) -> Path:
        """Returns the folder of a checkpoint, as a path that Orbax accepts."""
        return self._orbax_folder / str(step)

    def _seal(self) -> None:
        """Writes the manifest into the folder that is about to be renamed into place.

        Orbax calls this in the first process when every array is on disk.

        Raises:
          StorageError: The arrays cannot be restored from the folder.
        """
        folder = self._folder_being_written()
        self._check_restorable(folder)
        write_json(folder / MANIFEST, describe(folder))

    def _folder_being_written(self) -> Path:
        """Returns the folder that is about to be renamed into place."""
        name = str(self._saving)
        for folder in self._folder.iterdir():
            if folder.name == name or folder.name.startswith(f"{name}."):
                return folder
        raise FileNotFoundError(f"checkpoint {name} is not being written in {self._folder}")

    def _check_restorable(self, folder: Path) -> None:
        """Reads back each array's location, shape and dtype, but not its values.

        Raises:
          StorageError: An array is missing, or differs from the saved one.
        """
        try:
            read = ocp.PyTreeCheckpointHandler().metadata(
                self._orbax_folder / folder.name / _ARRAYS
            )
            written = jax.tree.map(_shape_and_dtype, read.tree)
        except (ValueError, KeyError, OSError) as error:
            raise StorageError(
                f"checkpoint {self._folder / str(self._saving)} cannot be read back, so it is not"
                f" used: {_first_line(error)}"
            ) from error
        leaves, expected = jax.tree.leaves(written), jax.tree.leaves(self._saved_arrays)
        if sorted(map(repr, leaves)) != sorted(map(repr, expected)):
            raise StorageError(
                f"checkpoint {self._folder / str(self._saving)} is not used, because its"
                f" {len(leaves)} arrays differ in number or shape from the {len(expected)} saved"
            )

    @contextlib.contextmanager
    def _explaining_failures(self) -> Iterator[None]:
        """Converts errors while a checkpoint is written to a `StorageError` of one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            number = error.errno if isinstance(error, OSError) else None
            if found := _OS_ERROR.search(str(error)):
                number = int(found[1])
            reason = _first_line(error) if number is None else os.strerror(number)
            raise StorageError(
                f"checkpoint {self._folder / str(self._saving)} could not be written: {reason}"
            ) from error

    def _prune(self) -> None:
        """Deletes the oldest checkpoints, so that `keep` are left after the next one."""
        if jax.process_index() != 0:
            return
        for step in self.steps()[: -(self._keep - 1)]:
            doomed = self._folder / f"{_DELETING}{step}"
            # Renames first, so that a partly deleted folder does not look like a checkpoint.
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def _clean(self, say: Callable[[str], None]) -> None:
        """Removes folders that a killed process left partly written or partly deleted."""
        for entry in sorted(self._folder.iterdir()):
            name = entry.name
            if name.startswith(_DELETING):
                say(f"removed {entry}, which a killed run had partly deleted")
                shutil.rmtree(entry)
            elif _UNFINISHED.fullmatch(name):
                say(f"removed the incomplete checkpoint {entry}")
                shutil.rmtree(entry)
            elif STEP.fullmatch(name) and not (entry / MANIFEST).is_file():
                self._set_aside(int(name), f"it has no {MANIFEST}", say)

    def _restore_names(self, say: Callable[[str], None]) -> None:
        """Restores the names of folders that hold another step than their name says.

        A folder whose name is not a step is assumed to be the user's copy, unless it holds the
        newest step of all.
        """
        newest = max(self.steps(), default=-1)
        for entry in sorted(self._folder.iterdir()):
            named = int(entry.name) if STEP.fullmatch(entry.name) else None
            if entry.name.startswith(_DAMAGED) or not (entry / MANIFEST).is_file():
                continue
            held = _held_step(entry)
            if held is None or held == named or self._fault(entry) is not None:
                continue
            if named is None and held <= newest:
                continue
            if not self.path(held).exists():
                entry.rename(self.path(held))
                say(
                    f"renamed checkpoint {entry} to {self.path(held)}, because it holds step {held}"
                )
            elif named is not None:
                self._set_aside(named, f"it holds step {held}, as {self.path(held)} does", say)

    def _fault(self, folder: Path) -> str | None:
        """Returns how a folder disagrees with its manifest; None if it agrees."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"its {MANIFEST} cannot be read"
        if not wanted:
            return f"its {MANIFEST} is empty"
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        for name, (size, digest) in wanted.items():
            if name not in present:
                return f"{name} is missing"
            if (actual := (folder / name).stat().st_size) != size:
                return f"{name} has {actual} bytes, not {size}"
            if _sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
        for name in sorted(present - wanted.keys()):
            parts = Path(name).parts
            if parts[-1] not in NOT_LISTED and not any(part.startswith(".") for part in parts):
                return f"{name} is not in its {MANIFEST}"
        return None

    def _set_aside(self, step: int, fault: str, say: Callable[[str], None]) -> None:
        aside = self._folder / f"{_DAMAGED}{step}"
        if aside.exists():
            shutil.rmtree(aside)
        self.path(step).rename(aside)
        say(f"checkpoint {self.path(step)} is damaged ({fault}); renamed it to {aside}")


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the size and digest of every file of a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_LISTED
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _held_step(folder: Path) -> int | None:
    """Returns the step recorded in a checkpoint, whatever its folder's name."""
    try:
        step = json.loads((folder / "run" / "metadata").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return step if type(step) is int and step >= 0 else None


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(np.dtype(leaf.dtype))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Yields a path to a folder without characters that Orbax and TensorStore read as patterns.

    They expand "lr[1e-3]" and then do not find their own files. Such a folder is created, and used
    through a link with a plain name during the block.
    """
    if not _is_pattern(folder):
        yield folder
        return
    if jax.process_count() > 1:
        raise RefusedError(
            f"{folder} has pattern characters, which a multi-process run does not support; give a"
            " --workdir without * ? [ and \\"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peft_jax-") as holder:
        if _is_pattern(holder):
            raise RefusedError(
                f"{folder} has pattern characters and needs a link in the temporary folder, but"
                f" {holder} has them too; set TMPDIR to a path without * ? [ and \\"
            )
        link = Path(holder, "checkpoints")
        link.symlink_to(folder, target_is_directory=True)
        try:
            yield link
        finally:
            link.unlink()


def _is_pattern(path: Path | str) -> bool:
    return glob.has_magic(str(path)) or "\\" in str(path)


class _OrbaxNoise(logging.Filter):
    """Suppresses tracebacks of errors that Orbax also raises, and warnings that are no news."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in Path(record.pathname).parts:
            return True
        return not (record.exc_info or any(text in record.getMessage() for text in _NO_NEWS))


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps Orbax and its background tasks from printing tracebacks during the block."""
    held_back = _OrbaxNoise()
    logger = logging.getLogger("absl")
    logger.addFilter(held_back)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Orbax does not wait for the other arrays after the first that cannot be written.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logger.removeFilter(held_back)
