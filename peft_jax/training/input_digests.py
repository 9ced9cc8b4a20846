"""Identifies a run's base model and data by content, and compares them when the run resumes.

A run records them at its first start, in `inputs.json` and in each checkpoint:

    base  the Hub commit of a base model from the Hub; digests of configuration, tokenizer and
          weights
    data  the Hub commit of data from the Hub; else digests of the files that rows are read from,
          and of `data.chat_template`

A resumed run loads models and data of the Hub at the recorded commit.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.data import DataSettings
from peft_jax.hub import digests
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.config import RunConfig

MAY_BE_ALLOWED = ("base", "data")
"""Values of `--allow_changed`."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMED_AT_MOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Content of the base model or of the data.

    Attributes:
      commits: Commits on the Hugging Face Hub, by repository.
      files: Digests of files, or of arrays of a converted checkpoint, by name.
    """

    commits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def commit(self) -> str | None:
        """The commit, if there is exactly one."""
        found = set(self.commits.values())
        return found.pop() if len(found) == 1 else None

    def changes(self, now: "Content") -> list[str]:
        """Returns the differences as text."""
        words = [
            f"{name} is at commit {commit}, but was at {self.commits[name]}"
            for name, commit in sorted(now.commits.items())
            if self.commits.get(name, commit) != commit
        ]
        return words + digests.changes(self.files, now.files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a run.

    Attributes:
      base: Checkpoint of the base model.
      data: Training and held-out rows.
    """

    base: Content
    data: Content

    def to_mapping(self) -> dict[str, Any]:
        """Returns the inputs as nested dictionaries of JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_mapping(given: Any) -> "Inputs":
        """Returns the inputs of a mapping from `to_mapping`.

        Raises:
          ValueError: The mapping has another form.
        """
        try:
            return Inputs(**{name: _content(given[name]) for name in MAY_BE_ALLOWED})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a record of a run's inputs: {error}") from error

    @staticmethod
    def read(file: Path) -> "Inputs":
        """Reads the inputs recorded in a file.

        Raises:
          OSError: The file cannot be read.
          ValueError: The file has another form.
        """
        return Inputs.from_mapping(json.loads(file.read_text(encoding="utf-8")))


class InputsReader:
    """Computes digests of a run's inputs; those of the base model in the background.

    Args:
      config: Configuration of the run.
      reads: Whether this process computes digests.
    """

    def __init__(self, config: RunConfig, *, reads: bool):
        self._config = config
        self._reads = reads
        self._pool = ThreadPoolExecutor(1)
        self._base: Future[Content] | None = None

    def __enter__(self) -> "InputsReader":
        return self

    def __exit__(self, *exception: object) -> None:
        # Does not wait, so that an exception is reported before the last byte is read.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, folder: Path) -> None:
        """Starts reading the base model.

        Args:
          folder: Checkpoint folder of the base model.
        """
        if self._reads:
            model = self._config.model
            weights = model.weights == "checkpoint"
            self._base = self._pool.submit(identify_base, folder, path=model.path, weights=weights)

    def finish(self, files: Sequence[Path]) -> Inputs | None:
        """Returns the inputs of the run; None if this process computes no digests.

        Args:
          files: Files that rows are read from.

        Raises:
          RefusedError: A file cannot be read.
        """
        if self._base is None:
            return None
        try:
            data = identify_data(files, self._config.data)
            return Inputs(base=self._base.result(), data=data)
        except (ValueError, OSError) as error:
            raise RefusedError(str(error)) from error


def identify_base(folder: Path, *, path: str, weights: bool) -> Content:
    """Returns the content of a base model.

    Args:
      folder: Checkpoint folder.
      path: Name on the Hub, or path, as configured.
      weights: Whether the run uses the checkpoint's weights.
    """
    commit = digests.hub_commit(folder)
    return Content(
        commits={} if commit is None else {path: commit},
        files=digests.digest_checkpoint(folder, weights=weights),
    )


def identify_data(files: Sequence[Path], settings: DataSettings) -> Content:
    """Returns the content of a run's data.

    Args:
      files: Files that rows are read from.
      settings: Data settings that name the files.
    """
    commits, local = {}, []
    for file in dict.fromkeys(files):
        # The cache of `datasets` is NAME/SUBSET/VERSION/COMMIT/.
        if file.suffix == ".arrow" and _COMMIT.fullmatch(file.parent.name):
            commits[file.parents[3].name.replace("___", "/")] = file.parent.name
        else:
            local.append(file)
    if settings.chat_template:
        local.append(Path(settings.chat_template).expanduser())
    return Content(commits=commits, files=digests.digest_files(_labels(local, settings)))


def check_allowed(allowed: Collection[str]) -> None:
    """Rejects unknown values of `--allow_changed`.

    Raises:
      RefusedError: A value is not known.
    """
    for name in allowed:
        if name not in MAY_BE_ALLOWED:
            raise RefusedError(
                f"--allow_changed has the unknown value {name!r}"
                f"{did_you_mean(name, MAY_BE_ALLOWED)}"
            )


def check_unchanged(
    before: Inputs, now: Inputs, *, allowed: Collection[str], where: str
) -> list[str]:
    """Rejects resuming a run with another base model or other data.

    Args:
      before: Inputs at the run's first start.
      now: Inputs now.
      allowed: Names of inputs that may have changed, "base" or "data".
      where: Work directory, for messages.

    Returns:
      A line for each allowed change.

    Raises:
      RefusedError: The base model or the data has changed and may not.
    """
    notes: list[str] = []
    refused: list[str] = []
    for name in MAY_BE_ALLOWED:
        words = getattr(before, name).changes(getattr(now, name))
        if not words:
            continue
        line = f"the {name} has changed since the run began: {_listing(words)}"
        (notes if name in allowed else refused).append(line)
    if refused:
        flag = ",".join(line.split()[1] for line in refused)
        raise RefusedError(
            f"{where}: {'; '.join(refused)}\n"
            "Restore the run's inputs, or give a new run a --workdir of its own;"
            f" --allow_changed={flag} resumes this run with the changed inputs"
        )
    return notes


def pin(config: RunConfig, before: Inputs | None, allowed: Collection[str]) -> RunConfig:
    """Returns the configuration with the Hub commits that a run began with.

    Args:
      config: Configuration as given.
      before: Inputs at the run's first start; None for a new run.
      allowed: Names of inputs that may have changed; they are used as they are now.
    """
    if before is None:
        return config
    model, data = config.model, config.data
    if "base" not in allowed and before.base.commit is not None:
        model = dataclasses.replace(model, revision=before.base.commit)
    if "data" not in allowed and before.data.commit is not None:
        data = dataclasses.replace(data, revision=before.data.commit)
    return dataclasses.replace(config, model=model, data=data)


def _content(given: Mapping[str, Any]) -> Content:
    commits, files = dict(given["commits"]), dict(given["files"])
    for name, text in (*commits.items(), *files.items()):
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r}")
    return Content(commits=commits, files=files)


def _labels(files: Sequence[Path], settings: DataSettings) -> dict[str, Path]:
    """Returns the files by names that do not change when the data's folder moves."""
    labels: dict[str, Path] = {}
    for file in files:
        name = file.name
        for root in (settings.path, settings.eval_path):
            folder = Path(root).expanduser()
            if root and file.is_relative_to(folder) and file != folder:
                name = file.relative_to(folder).as_posix()
                break
        labels[name if name not in labels else str(file)] = file
    return labels


def _listing(words: Sequence[str]) -> str:
    more = len(words) - _NAMED_AT_MOST
    return "; ".join(words[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")
