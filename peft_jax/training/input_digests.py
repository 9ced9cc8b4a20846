"""What a run computes with, known by content: its base and its data.

A run records both at its first start, in `inputs.json` and in each checkpoint, and compares when it
is resumed:

    base  the hub's commit, where the base has a name there; digests of configuration, tokenizer and
          weights
    data  the hub's commit, where the data has a name there; else digests of the files that the rows
          are read from, and of `data.chat_template`

On resuming, what has a name on the hub is asked for at the recorded commit.
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
"""What `--allow_changed` takes."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMED_AT_MOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """What the base, or the data, is made of.

    Attributes:
      commits: Commits on the Hugging Face hub, by repository.
      files: Digests of files, or of arrays of a converted checkpoint, by name.
    """

    commits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def commit(self) -> str | None:
        """The commit, where everything is of one."""
        found = set(self.commits.values())
        return found.pop() if len(found) == 1 else None

    def changes(self, now: "Content") -> list[str]:
        """Returns what differs, in words."""
        words = [
            f"{name} is commit {commit}, and was {self.commits[name]}"
            for name, commit in sorted(now.commits.items())
            if self.commits.get(name, commit) != commit
        ]
        return words + digests.changes(self.files, now.files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run computes with.

    Attributes:
      base: The model's checkpoint.
      data: The rows, for training and held out.
    """

    base: Content
    data: Content

    def to_mapping(self) -> dict[str, Any]:
        """Returns the inputs as nested dictionaries that JSON can hold."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_mapping(given: Any) -> "Inputs":
        """Returns the inputs that `to_mapping` gave.

        Raises:
          ValueError: It gave something else.
        """
        try:
            return Inputs(**{name: _content(given[name]) for name in MAY_BE_ALLOWED})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a record of a run's inputs: {error}") from error

    @staticmethod
    def read(file: Path) -> "Inputs":
        """Returns the inputs recorded in a file.

        Raises:
          OSError: It cannot be read.
          ValueError: It holds something else.
        """
        return Inputs.from_mapping(json.loads(file.read_text(encoding="utf-8")))


class InputsReader:
    """Reads what a run computes with; the base in the background, from when its folder is known.

    Args:
      config: The run's configuration.
      reads: Whether this process reads anything.
    """

    def __init__(self, config: RunConfig, *, reads: bool):
        self._config = config
        self._reads = reads
        self._pool = ThreadPoolExecutor(1)
        self._base: Future[Content] | None = None

    def __enter__(self) -> "InputsReader":
        return self

    def __exit__(self, *exception: object) -> None:
        # Whatever ended the block is told at once, and not when the last byte is read.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, folder: Path) -> None:
        """Begins to read the base.

        Args:
          folder: Where it is.
        """
        if self._reads:
            model = self._config.model
            weights = model.weights == "checkpoint"
            self._base = self._pool.submit(identify_base, folder, path=model.path, weights=weights)

    def finish(self, files: Sequence[Path]) -> Inputs | None:
        """Returns what the run computes with; None where this process reads nothing.

        Args:
          files: The files that rows are read from.

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
    """Returns what a base is.

    Args:
      folder: Where it is.
      path: How it is asked for, which is its name where it is the hub's.
      weights: Whether its weights are used.
    """
    commit = digests.hub_commit(folder)
    return Content(
        commits={} if commit is None else {path: commit},
        files=digests.digest_checkpoint(folder, weights=weights),
    )


def identify_data(files: Sequence[Path], settings: DataSettings) -> Content:
    """Returns what a run's data is.

    Args:
      files: The files that rows are read from.
      settings: What names them.
    """
    commits, local = {}, []
    for file in dict.fromkeys(files):
        # `datasets` keeps what it prepared in NAME/SUBSET/VERSION/COMMIT/.
        if file.suffix == ".arrow" and _COMMIT.fullmatch(file.parent.name):
            commits[file.parents[3].name.replace("___", "/")] = file.parent.name
        else:
            local.append(file)
    if settings.chat_template:
        local.append(Path(settings.chat_template).expanduser())
    return Content(commits=commits, files=digests.digest_files(_labels(local, settings)))


def check_allowed(allowed: Collection[str]) -> None:
    """Rejects names that `--allow_changed` does not know.

    Raises:
      RefusedError: There is one.
    """
    for name in allowed:
        if name not in MAY_BE_ALLOWED:
            raise RefusedError(f"--allow_changed has {name!r}{did_you_mean(name, MAY_BE_ALLOWED)}")


def check_unchanged(
    before: Inputs, now: Inputs, *, allowed: Collection[str], where: str
) -> list[str]:
    """Checks that a run is resumed with the base and the data that it began with.

    Args:
      before: What it began with.
      now: What it would be resumed with.
      allowed: Which of the two may have changed.
      where: The work directory, for messages.

    Returns:
      A line for each change that is allowed.

    Raises:
      RefusedError: The base or the data has changed and may not.
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
            "Give the run back what it began with, or, for a new run, give a --workdir of its own;"
            f" --allow_changed={flag} resumes it all the same"
        )
    return notes


def pin(config: RunConfig, before: Inputs | None, allowed: Collection[str]) -> RunConfig:
    """Returns the configuration with the hub's commits that a run began with.

    Args:
      config: The configuration as given.
      before: What the run began with; None for a new run.
      allowed: What may have changed, and is taken as it is now.
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
    """Returns the files by names that stay the same where the data's folder is moved."""
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
