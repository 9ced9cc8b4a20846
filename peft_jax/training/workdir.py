"""The folder that a run works in, and whose run it is.

config.json     every setting of the run
metrics.jsonl   what was measured, a line a record
checkpoints/    to go on from
tensorboard/    events, where asked for
adapter/        the result
model/          the result as a whole model, where asked for
summary.json    the result in numbers; the run is finished when it is there
report/         the result as a page with pictures
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from peft_jax.core.convert import differences
from peft_jax.training.config import MAY_CHANGE, ROUNDING, RunConfig, under
from peft_jax.training.errors import RefusedError
from peft_jax.training.files import write_json


@dataclasses.dataclass(frozen=True)
class WorkDir:
    """The paths of a run's files.

    Attributes:
      path: the folder.
    """

    path: Path

    @staticmethod
    def at(given: str | Path) -> "WorkDir":
        """The work directory at a path as it is given on a command line.

        Raises:
          RefusedError: it is the address of an object store, which holds no folders; or it is no
            path that can be written down.

        Example:
          >>> WorkDir.at("/data/runs/first").path.name
          'first'
        """
        # A Path has lost one of the slashes already.
        if scheme := re.match(r"([a-z][a-z0-9+.-]*):/", str(given), re.IGNORECASE):
            raise RefusedError(
                f"--workdir is {given}, and what begins with {scheme[1]}:// is not written to: give"
                " a folder; a bucket can be mounted as one (docs/pods.md says how)"
            )
        try:
            str(given).encode()
            path = Path(given).expanduser().absolute()
        except UnicodeEncodeError as error:
            raise RefusedError(
                f"--workdir is {str(given)!a}, which is not UTF-8; give another name"
            ) from error
        except RuntimeError as error:
            raise RefusedError(
                f"--workdir is {given}, and there is no home folder of that user; a folder of that"
                f" name is ./{given}"
            ) from error
        return WorkDir(path)

    @property
    def config(self) -> Path:
        """Every setting of the run."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """What was measured, a line a record."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """To go on from."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The result as a whole model."""
        return self.path / "model"

    @property
    def summary(self) -> Path:
        """The result in numbers."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The result as a page with pictures."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """Held by the process that works here."""
        return self.path / ".lock"

    def check(self, config: RunConfig) -> list[str]:
        """Whether this run may work here.

        Args:
          config: the run's configuration.

        Returns:
          What is worth saying: settings that differ from when the run began, and may.

        Raises:
          RefusedError: the folder is a file, or belongs to a run with other settings, or holds
            results without their configuration.
        """
        self._refuse_unusable_path()
        if not self.config.is_file():
            self._refuse_results_without_config()
            return []
        try:
            before = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RefusedError(
                f"{self.config} cannot be read ({error}), so this run cannot tell whether the "
                "folder is its own; give another --workdir"
            ) from error
        return compare_configs(before, config, where=str(self.path))

    def claim(self, config: RunConfig) -> None:
        """Writes down whose folder this is."""
        write_json(self.config, config.to_mapping())

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, if the run is finished."""
        if not self.summary.is_file():
            return None
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def check_writable(self) -> None:
        """Rejects a folder, or one to be created, that this process may not write to.

        Raises:
          RefusedError: it may not.
        """
        present = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not os.access(present, os.W_OK | os.X_OK):
            which = "" if present == self.path else f" (of --workdir {self.path})"
            raise RefusedError(
                f"{present}{which} cannot be written to; give a --workdir that this user may write"
                " to"
            )

    def _refuse_unusable_path(self) -> None:
        """Rejects a path that is no folder, and that none can be created at."""
        for path in (self.path, *self.path.parents):
            try:
                path.lstat()
            except FileNotFoundError:
                continue
            except NotADirectoryError:
                continue
            except OSError as error:
                raise RefusedError(f"--workdir {self.path}: {error.strerror}") from error
            if path.is_symlink() and not path.exists():
                raise RefusedError(
                    f"--workdir {self.path}: {path} is a link to {os.readlink(path)}, which does"
                    " not exist; create that, or give another folder"
                )
            if not path.is_dir():
                what = "is a file" if path == self.path else f"lies in {path}, which is a file"
                raise RefusedError(f"--workdir {self.path} {what}; give a folder")
            return

    def _refuse_results_without_config(self) -> None:
        results = (self.metrics, self.checkpoints, self.adapter, self.model, self.summary)
        present = [path.name for path in (*results, self.report) if path.exists()]
        if present:
            raise RefusedError(
                f"{self.path} holds {', '.join(present)} but no config.json, so it is not known "
                "whose they are; nothing is overwritten: give another --workdir, or move them away"
            )


def compare_configs(before: dict[str, Any], config: RunConfig, *, where: str) -> list[str]:
    """Whether a run may go on with a configuration other than the one it began with.

    Args:
      before: the configuration it began with, as `RunConfig.to_mapping` gives it.
      config: the one it is to go on with.
      where: where the former was found, for messages.

    Returns:
      A line for each setting that differs and may.

    Raises:
      RefusedError: settings differ that decide what is computed; they are named.
    """
    changed = differences(before, config.to_mapping())
    refused = [
        f"  {name}: {_show(was)} there, {_show(now)} now"
        for name, (was, now) in changed.items()
        if not under(name, MAY_CHANGE)
    ]
    if refused:
        listing = "\n".join(refused)
        raise RefusedError(
            f"{where} holds a run with other settings:\n{listing}\n"
            "To go on with that run, give the settings it began with; for a new run, give a "
            "--workdir of its own"
        )
    return [
        f"{name} was {_show(was)} and is {_show(now)}"
        + (
            ": the result will not be bit for bit that of an uninterrupted run"
            if under(name, ROUNDING)
            else ""
        )
        for name, (was, now) in changed.items()
    ]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
