"""Manages the work directory of a run.

config.json     every setting of the run
inputs.json     base model and data by content: Hub commits, digests
metrics.jsonl   metrics, one record per line
checkpoints/    checkpoints to resume from
tensorboard/    TensorBoard events, if configured
adapter/        the trained adapter; full fine-tuning only writes model/
model/          the merged model, if configured
summary.json    results; its presence marks the run as finished
report/         report with plots

A run in a bucket (gs://, s3://) writes these files to a folder on the local disk, from which
[`bucket_workdir`][peft_jax.training.bucket_workdir] copies them.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_jax.core.typed_settings import differences
from peft_jax.hub.adapter_files import CONFIG as ADAPTER_CONFIG
from peft_jax.hub.adapter_save import check_adapter_folder
from peft_jax.runtime.buckets import SCHEMES, Bucket
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import cache_folder, read_json_object, write_json
from peft_jax.training.config import LENGTH, MAY_CHANGE, ROUNDING, RunConfig, under
from peft_jax.training.input_digests import Inputs

_log = logging.getLogger(__name__)

_UNFINISHED = re.compile(r"\.[^.].*\.\d+\.(tmp(\.\w+)?|old)|\.processes-[0-9a-f]+")
"""Names of temporary files and folders, which end with a process id."""


@dataclasses.dataclass(frozen=True)
class WorkDir:
    """Paths of a run's files.

    Attributes:
      path: Path of the work directory; of one in a bucket, the folder that its files are staged in.
      url: URL of a work directory in a bucket; empty for one on disk.
    """

    path: Path
    url: str = ""

    @staticmethod
    def at(given: str | Path) -> "WorkDir":
        """Returns the work directory for the value of --workdir.

        Args:
          given: A folder, or the URL of a folder in a bucket.

        Raises:
          RefusedError: The value is another URL, or not a valid path.

        Example:
          >>> WorkDir.at("/data/runs/first").path.name
          'first'
          >>> WorkDir.at("gs://bucket/runs/first").url
          'gs://bucket/runs/first'
        """
        # A Path has already lost one of the slashes of a URL.
        if found := re.match(r"([a-z][a-z0-9+.-]*):/+(.*)", str(given), re.IGNORECASE | re.DOTALL):
            return _in_bucket(found[1], found[2])
        try:
            str(given).encode()
            path = Path(given).expanduser().absolute()
        except UnicodeEncodeError as error:
            raise RefusedError(
                f"--workdir is {str(given)!a}, but must be UTF-8; give another name"
            ) from error
        except RuntimeError as error:
            raise RefusedError(
                f"--workdir is {given}, but there is no such user's home folder; write ./{given}"
                " for a folder of that name"
            ) from error
        return WorkDir(path)

    @property
    def name(self) -> str:
        """Last part of the path or URL.

        Example:
          >>> WorkDir.at("gs://bucket/runs/first").name
          'first'
        """
        return self.url.rpartition("/")[2] if self.url else self.path.name

    def shown(self, text: str) -> str:
        """Returns a message with the URL of the bucket in place of the local path."""
        return text.replace(str(self.path), self.url) if self.url else text

    @property
    def config(self) -> Path:
        """File with every setting of the run."""
        return self.path / "config.json"

    @property
    def inputs(self) -> Path:
        """File with base model and data by content."""
        return self.path / "inputs.json"

    @property
    def metrics(self) -> Path:
        """File of metrics, one record per line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Folder of the merged model."""
        return self.path / "model"

    @property
    def summary(self) -> Path:
        """File of results; its presence marks the run as finished."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """Lock file of the process that uses the work directory."""
        return self.path / ".lock"

    def check(self, config: RunConfig) -> list[str]:
        """Rejects a work directory that this run may not use.

        Args:
          config: Configuration of the run.

        Returns:
          A line for each allowed difference from the settings that the run began with.

        Raises:
          RefusedError: The path is a file, or the folder has a run with other settings or results
            without a configuration.
        """
        self._reject_unusable_path()
        if not self.config.is_file():
            self._reject_results_without_config()
            return []
        try:
            before = json.loads(self.config.read_text(encoding="utf-8"))
            if not isinstance(before, dict) or "train" not in before:
                raise ValueError("it is not a run's configuration")
        except ValueError as error:
            raise RefusedError(
                f"{self.config} cannot be read ({error}), so the folder may belong to another run; "
                "give another --workdir"
            ) from error
        return compare_configs(before, config, where=str(self.path))

    def claim(self, config: RunConfig, inputs: Inputs) -> None:
        """Writes the run's configuration and inputs, and marks it as unfinished."""
        self.summary.unlink(missing_ok=True)
        write_json(self.config, config.to_mapping())
        write_json(self.inputs, inputs.to_mapping())

    def read_inputs(self) -> Inputs | None:
        """Returns the recorded base model and data; None without a readable record."""
        try:
            return Inputs.read(self.inputs)
        except (OSError, ValueError):
            return None

    def read_summary(self, *, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Returns the summary of a finished run; None if the run is not finished.

        Args:
          say: Prints a message if the summary cannot be read.
        """
        if not self.summary.is_file():
            return None
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
            if not isinstance(summary, dict) or "steps" not in summary:
                raise ValueError("it is not a run's summary")
        except ValueError as error:
            say(
                f"{self.summary} cannot be read ({error}); it is written again at the end of the"
                " run"
            )
            return None
        return summary

    def is_as_long_as(self, config: RunConfig) -> bool:
        """Returns whether the run here has the number of steps of a configuration."""
        try:
            before = json.loads(self.config.read_text(encoding="utf-8"))["train"]
        except (OSError, ValueError, KeyError, TypeError):
            return True
        now = config.to_mapping()["train"]
        return all(before.get(name) == now.get(name) for name in ("steps", "epochs"))

    def has_adapter(self) -> bool:
        """Returns whether there is a complete adapter."""
        try:
            arrays = read_json_object(self.adapter / ADAPTER_CONFIG).get("arrays")
        except ValueError:
            return False
        return isinstance(arrays, str) and (self.adapter / arrays).is_file()

    def has_model(self) -> bool:
        """Returns whether there is a complete model, whose configuration is written last."""
        return (self.model / "config.json").is_file()

    def lost_results(self, *, adapter: bool, model: bool) -> list[Path]:
        """Returns the missing results of a finished run.

        Args:
          adapter: Whether the run exports an adapter.
          model: Whether the run exports the merged model.
        """
        present = {
            self.adapter: not adapter or self.has_adapter(),
            self.model: not model or self.has_model(),
            self.report: (self.report / "README.md").is_file(),
        }
        return [path for path, there in present.items() if not there]

    def check_results(self, *, model: bool) -> None:
        """Rejects files and folders that are in the way of the run's results.

        Args:
          model: Whether the run exports the merged model.

        Raises:
          RefusedError: Something is in the way; the message names it.
        """
        for path in (self.checkpoints, self.adapter, self.model, self.report, self.tensorboard):
            if path.exists() and not path.is_dir():
                raise RefusedError(f"{path} is a file, but the run needs a folder there; move it")
        for path in (self.config, self.inputs, self.metrics, self.summary):
            if path.exists() and not path.is_file():
                raise RefusedError(f"{path} is not a file, but the run needs one there; move it")
        try:
            check_adapter_folder(self.adapter)
        except ValueError as error:
            raise RefusedError(f"{error}: move it away") from error
        foreign = sorted(path.name for path in self.model.iterdir()) if self.model.is_dir() else []
        if model and foreign and "config.json" not in foreign:
            raise RefusedError(
                f"{self.model} would be replaced, but has {foreign[0]} and no model; move it away"
            )

    def remove_unfinished(self, *, say: Callable[[str], None]) -> None:
        """Removes temporary files of killed processes, and restores results they had moved.

        Call this when no other process can be using the work directory.
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
                say(f"restored {self.path / found[1]} from {path.name}, which a killed run left")
                continue
            removed.append(path.name)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if removed:
            names = ", ".join(removed)
            say(f"removed temporary files of killed runs from {self.path}: {names}")

    def check_writable(self) -> None:
        """Rejects a work directory that this process may not write to or create.

        Raises:
          RefusedError: The folder is not writable.
        """
        present = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not os.access(present, os.W_OK | os.X_OK):
            which = "" if present == self.path else f" (of --workdir {self.path})"
            raise RefusedError(
                f"{present}{which} is not writable; give a --workdir that this user may write to"
            )

    def _reject_unusable_path(self) -> None:
        """Rejects a path that is not a folder and cannot become one."""
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
                    " not exist; create it, or give another folder"
                )
            if not path.is_dir():
                what = "is a file" if path == self.path else f"lies in {path}, which is a file"
                raise RefusedError(f"--workdir {self.path} {what}; give a folder")
            return

    def _reject_results_without_config(self) -> None:
        results = (self.metrics, self.checkpoints, self.adapter, self.model, self.summary)
        present = [path.name for path in (*results, self.report) if path.exists()]
        if present:
            raise RefusedError(
                f"{self.path} has {', '.join(present)} of an unknown run, because it has no "
                "config.json, and nothing is overwritten: give another --workdir, or move them away"
            )


def _in_bucket(scheme: str, rest: str) -> WorkDir:
    """Returns the work directory of a URL.

    Raises:
      RefusedError: The URL is not that of a folder in a bucket.
    """
    url = f"{scheme}://{rest.rstrip('/')}"
    if scheme not in SCHEMES:
        raise RefusedError(
            f"--workdir is {url}, but {scheme}:// URLs are not supported; give gs://bucket/folder,"
            " s3://bucket/folder or a folder on disk"
        )
    try:
        Bucket(url)
    except ValueError as error:
        raise RefusedError(f"--workdir: {error}") from error
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return WorkDir(cache_folder() / "workdirs" / name / "files", url)


def compare_configs(before: dict[str, Any], config: RunConfig, *, where: str) -> list[str]:
    """Rejects resuming a run with settings that would change its result.

    Args:
      before: Configuration that the run began with, from `RunConfig.to_mapping`.
      config: Configuration now.
      where: Place where `before` was found, for messages.

    Returns:
      A line for each allowed difference.

    Raises:
      RefusedError: Settings that determine the result differ; the message names them.
    """
    try:
        has_passes = "init_passes" in before["method"]
        # Gives settings that are newer than the record their defaults.
        before = RunConfig.from_mapping(before).to_mapping()
        if not has_passes:
            # Version 0.1 always took six passes. Its start is in the checkpoint of step 0, so the
            # number of passes now has no effect.
            before["method"]["init_passes"] = config.init_passes
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        _log.debug("%s has the settings of another version: %s", where, error)
    changed = differences(before, config.to_mapping())
    refused = [
        f"  {name}: {_show(was)} there, {_show(now)} now"
        for name, (was, now) in changed.items()
        if not under(name, MAY_CHANGE)
    ]
    if refused:
        listing = "\n".join(refused)
        raise RefusedError(
            f"{where} has a run with other settings:\n{listing}\n"
            "To resume that run, give the settings it began with; for a new run, give a --workdir "
            "of its own"
        )
    return [
        f"{name} was {_show(was)} and is {_show(now)}"
        + (
            ": the result will not equal that of an uninterrupted run bit for bit"
            if under(name, ROUNDING)
            else ""
        )
        for name, (was, now) in changed.items()
        if not under(name, LENGTH)
    ]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
