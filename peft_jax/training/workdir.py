"""The folder that a run works in, and whose run it is.

config.json     every setting of the run
inputs.json     its base and its data by content: commits on the hub, digests
metrics.jsonl   what was measured, a line a record
checkpoints/    to go on from
tensorboard/    events, where asked for
adapter/        the result; where the whole model was trained, it is in model/ alone
model/          the result as a whole model, where asked for
summary.json    the result in numbers; the run is finished when it is there
report/         the result as a page with pictures
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from peft_jax.core.typed_settings import differences
from peft_jax.hub.adapter_files import CONFIG as ADAPTER_CONFIG
from peft_jax.hub.adapter_save import check_adapter_folder
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import read_json_object, write_json
from peft_jax.training.config import LENGTH, MAY_CHANGE, ROUNDING, RunConfig, under
from peft_jax.training.input_digests import Inputs

_UNFINISHED = re.compile(r"\.[^.].*\.\d+\.(tmp(\.\w+)?|old)|\.processes-[0-9a-f]+")
"""Names of temporary files and folders, which end in the number of their process."""


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
    def inputs(self) -> Path:
        """Base and data by content."""
        return self.path / "inputs.json"

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
            if not isinstance(before, dict) or "train" not in before:
                raise ValueError("it does not hold the settings of a run")
        except ValueError as error:
            raise RefusedError(
                f"{self.config} cannot be read ({error}), so this run cannot tell whether the "
                "folder is its own; give another --workdir"
            ) from error
        return compare_configs(before, config, where=str(self.path))

    def claim(self, config: RunConfig, inputs: Inputs) -> None:
        """Writes down whose folder this is; the run there is then no longer finished."""
        self.summary.unlink(missing_ok=True)
        write_json(self.config, config.to_mapping())
        write_json(self.inputs, inputs.to_mapping())

    def read_inputs(self) -> Inputs | None:
        """Returns the recorded base and data; None where there is no record, or none to be read."""
        try:
            return Inputs.read(self.inputs)
        except (OSError, ValueError):
            return None

    def read_summary(self, *, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The summary, if the run is finished.

        Args:
          say: told of a summary that cannot be read.
        """
        if not self.summary.is_file():
            return None
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
            if not isinstance(summary, dict) or "steps" not in summary:
                raise ValueError("it holds no summary of a run")
        except ValueError as error:
            say(
                f"{self.summary} cannot be read ({error}); it is written again at the end of the"
                " run"
            )
            return None
        return summary

    def is_as_long_as(self, config: RunConfig) -> bool:
        """Whether the run here was asked for as many steps as a configuration asks for."""
        try:
            before = json.loads(self.config.read_text(encoding="utf-8"))["train"]
        except (OSError, ValueError, KeyError, TypeError):
            return True
        now = config.to_mapping()["train"]
        return all(before.get(name) == now.get(name) for name in ("steps", "epochs"))

    def holds_adapter(self) -> bool:
        """Whether there is a whole adapter."""
        try:
            arrays = read_json_object(self.adapter / ADAPTER_CONFIG).get("arrays")
        except ValueError:
            return False
        return isinstance(arrays, str) and (self.adapter / arrays).is_file()

    def holds_model(self) -> bool:
        """Whether there is a whole model; its configuration is written last."""
        return (self.model / "config.json").is_file()

    def lost_results(self, *, adapter: bool, model: bool) -> list[Path]:
        """What a finished run has left and is gone.

        Args:
          adapter: whether the run leaves an adapter.
          model: whether the run leaves the whole model.
        """
        present = {
            self.adapter: not adapter or self.holds_adapter(),
            self.model: not model or self.holds_model(),
            self.report: (self.report / "README.md").is_file(),
        }
        return [path for path, there in present.items() if not there]

    def check_results(self, *, model: bool) -> None:
        """Rejects what stands where the run is to write its results.

        Args:
          model: whether the run leaves the whole model.

        Raises:
          RefusedError: there is something else; it is named.
        """
        for path in (self.checkpoints, self.adapter, self.model, self.report, self.tensorboard):
            if path.exists() and not path.is_dir():
                raise RefusedError(f"{path} is a file, and the run writes a folder there: move it")
        for path in (self.config, self.inputs, self.metrics, self.summary):
            if path.exists() and not path.is_file():
                raise RefusedError(f"{path} is no file, and the run writes one there: move it")
        try:
            check_adapter_folder(self.adapter)
        except ValueError as error:
            raise RefusedError(f"{error}: move it away") from error
        foreign = sorted(path.name for path in self.model.iterdir()) if self.model.is_dir() else []
        if model and foreign and "config.json" not in foreign:
            raise RefusedError(
                f"{self.model} holds {foreign[0]} but no model, and would be replaced as a whole:"
                " move it away"
            )

    def remove_unfinished(self, *, say: Callable[[str], None]) -> None:
        """Removes temporary files of processes that were killed; what they had set aside returns.

        Call it when no other process can be working here.
        """
        left = [
            path
            for folder in (self.path, self.report)
            if folder.is_dir()
            for path in sorted(folder.iterdir())
            if _UNFINISHED.fullmatch(path.name)
        ]
        removed = []
        for path in left:
            found = re.fullmatch(r"\.(adapter|model)\.\d+\.old", path.name)
            if found and self.config.is_file() and not (self.path / found[1]).exists():
                path.rename(self.path / found[1])
                say(f"{self.path / found[1]} is back from {path.name}, where a killed run left it")
                continue
            removed.append(path.name)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if removed:
            names = ", ".join(removed)
            say(f"{self.path} held what killed runs had left unfinished, which is removed: {names}")

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
    try:
        # Settings that there were not yet have their defaults.
        before = RunConfig.from_mapping(before).to_mapping()
    except (ValueError, TypeError, AttributeError) as error:
        logging.debug("%s holds the settings of another version: %s", where, error)
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
        if not under(name, LENGTH)
    ]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
