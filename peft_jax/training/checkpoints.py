"""Checkpoints of a run, written in the background, and trusted only after they are verified.

    checkpoints/
      20/                   one folder a checkpoint, named by its step; it appears by a rename
        arrays/             what Orbax writes: adapter and optimiser state
        run/                JSON: the step, the data position, the seconds spent by phase
        manifest.json       the size and SHA-256 of every file of the folder
      damaged-30/           a folder that did not agree with its manifest, set aside

The manifest is written after the arrays and before the rename. A process that is killed at any
moment therefore leaves whole checkpoints and, at most, a temporary folder that nobody reads; a file
that was cut short or changed later does not agree with its manifest, and the checkpoint before is
used.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peft_jax.training.files import write_json

_STEP = re.compile(r"\d+")
_MANIFEST = "manifest.json"
_DELETING = "deleting-"
_DAMAGED = "damaged-"

_NOT_LISTED = {_MANIFEST, "commit_success.txt", "_CHECKPOINT_METADATA"}
"""Not in a manifest: itself, and what Orbax writes after it and does not need to read the rest."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are; created with the first one.
      keep: how many of the newest to keep; at least 2, so that one is left if the last is damaged.
      asynchronous: whether `save` returns once the arrays are copied to the host, and the rest is
        written while training goes on.
    """

    def __init__(self, folder: Path, *, keep: int = 3, asynchronous: bool = True):
        if keep < 2:
            raise ValueError(f"keep is {keep}: at least 2, so that one is left if one is damaged")
        self._folder = folder.absolute()
        self._keep = keep
        self._asynchronous = asynchronous
        self._saving: int | None = None
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that were written to their end, oldest first."""
        if not self._folder.is_dir():
            return []
        names = [p.name for p in self._folder.iterdir() if (p / _MANIFEST).is_file()]
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self._folder / str(step)

    def save(self, step: int, arrays: Any, run: dict[str, Any]) -> None:
        """Starts writing a checkpoint; waits for the one before it, if that is still being written.

        Args:
          step: how many steps have been taken.
          arrays: a pytree of arrays. Its values are copied before this returns, so that the
            buffers may be donated to the next step.
          run: what else is needed to go on, as JSON.

        Raises:
          Exception: the checkpoint before this one could not be written; whatever went wrong there.
        """
        self.wait()
        self._prune()
        self._saving = step
        self._checkpointer.save(
            self.path(step),
            args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(run)),
        )
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until what is being written is on disk; raises what went wrong there."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Waits, and gives the background thread back."""
        self._checkpointer.close()

    def newest(self, *, say: Callable[[str], None]) -> int | None:
        """The newest checkpoint that agrees with its manifest; damaged ones are set aside.

        Args:
          say: told of each checkpoint that is not used, and why.

        Returns:
          Its step, or `None` when there is none. The same in every process.
        """
        found = -1
        if jax.process_index() == 0 and self._folder.is_dir():
            self._clean(say)
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
        """What was saved beside the arrays."""
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        return self._checkpointer.restore(self.path(step), args=args).run

    def read_arrays(self, step: int, abstract: Any) -> Any:
        """The saved arrays, bit for bit, on the devices that are asked for.

        Args:
          step: which checkpoint.
          abstract: the tree of `jax.ShapeDtypeStruct`, with shardings, that was saved.

        Raises:
          ValueError: the checkpoint holds another tree, or other shapes.
        """
        item = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        )
        try:
            restored = self._checkpointer.restore(
                self.path(step), args=ocp.args.Composite(arrays=item)
            ).arrays
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path(step)} does not hold the arrays this run needs: {error}"
            ) from error
        for (path, wanted), (_, leaf) in zip(
            jax.tree.leaves_with_path(abstract), jax.tree.leaves_with_path(restored), strict=True
        ):
            if wanted.shape != leaf.shape or wanted.dtype != leaf.dtype:
                raise ValueError(
                    f"{self.path(step)}: {jax.tree_util.keystr(path)} is "
                    f"{leaf.dtype}{list(leaf.shape)}, this run needs "
                    f"{wanted.dtype}{list(wanted.shape)}"
                )
        return restored

    def _seal(self) -> None:
        """Writes the manifest into the folder that is about to be renamed into place.

        Orbax calls this, in the first process, when every array is on disk.
        """
        name = str(self._saving)
        for folder in self._folder.iterdir():
            if folder.name == name or folder.name.startswith(f"{name}."):
                write_json(folder / _MANIFEST, _describe(folder))
                return
        raise FileNotFoundError(f"checkpoint {name} is not being written under {self._folder}")

    def _prune(self) -> None:
        """Deletes the oldest, so that `keep` are left once the next one is written."""
        if jax.process_index() != 0:
            return
        for step in self.steps()[: -(self._keep - 1)]:
            doomed = self._folder / f"{_DELETING}{step}"
            # Renamed first: a folder that is only half deleted must not look like a checkpoint.
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def _clean(self, say: Callable[[str], None]) -> None:
        """Deletes what a killed process left half written or half deleted."""
        for entry in sorted(self._folder.iterdir()):
            name = entry.name
            if name.startswith(_DELETING):
                shutil.rmtree(entry)
            elif re.fullmatch(r"\d+\..+", name) or (
                _STEP.fullmatch(name) and not (entry / _MANIFEST).is_file()
            ):
                say(f"checkpoint {entry} was not written to its end; it is not used")
                shutil.rmtree(entry)

    def _fault(self, folder: Path) -> str | None:
        """What disagrees with the manifest, or `None`."""
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"its {_MANIFEST} cannot be read"
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        for name, (size, digest) in wanted.items():
            if name not in present:
                return f"{name} is missing"
            if (actual := (folder / name).stat().st_size) != size:
                return f"{name} has {actual} bytes, not {size}"
            if _sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
        return None

    def _set_aside(self, step: int, fault: str, say: Callable[[str], None]) -> None:
        aside = self._folder / f"{_DAMAGED}{step}"
        if aside.exists():
            shutil.rmtree(aside)
        self.path(step).rename(aside)
        say(f"checkpoint {self.path(step)} is damaged ({fault}); it is not used, and now {aside}")


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and digest of every file of a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_LISTED
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
