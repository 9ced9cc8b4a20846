"""HumanEval's problems, from the hub or a local file."""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_jax.data import DataSettings
from peft_jax.data.files import Layout, find_splits, open_files
from peft_jax.data.tables import MemoryTable, Table

from ..sandbox import TestedProgram
from ..tasks.local_data import local_folder

HUB = "openai/openai_humaneval"
_FIELDS = ("task_id", "prompt", "test", "entry_point")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      task_id: its name, "HumanEval/0".
      prompt: imports, the function's signature and its docstring.
      test: source that defines `check(candidate)`.
      entry_point: the function's name.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> TestedProgram:
        """Returns what is run: it passes if the completion does."""
        return TestedProgram(
            source=f"{self.prompt}{completion}\n",
            function=self.entry_point,
            given=self._given(),
            test=f"{self.test}\ncheck({self.entry_point})\n",
        )

    def _given(self) -> str:
        """Returns the prompt as a program: its imports and functions are there for the test.

        A function that ends with its signature, where others end with a docstring, gets a body.
        """
        for text in (self.prompt, f"{self.prompt}\n    pass\n"):
            with contextlib.suppress(SyntaxError, ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(text, "prompt.py", "exec")
                return text
        return ""


def open_problems(data: Path | None) -> list[Problem]:
    """The problems in their order.

    Args:
      data: a folder of local data, which has `humaneval/HumanEval.jsonl.gz` or the hub's file;
        None: the hub.

    Raises:
      ValueError: there are none, or one lacks a field.
    """
    table = _from_hub() if data is None else _from_folder(local_folder(data, "humaneval"))
    return [_problem(table[index], table.where(index)) for index in range(len(table))]


def _from_hub() -> Table:
    import datasets

    try:
        return MemoryTable(list(datasets.load_dataset(HUB, split="test")), HUB)
    except Exception as error:
        # The library raises many types for one thing.
        raise ValueError(
            f"{HUB} cannot be had from the hub: {error}; without it, give local files with --data"
        ) from error


def _from_folder(folder: Path) -> Table:
    splits = find_splits(folder)
    if not splits:
        raise ValueError(f"{folder} has no file of HumanEval's problems")
    files = splits.get("test") or next(iter(splits.values()))
    return open_files(files, DataSettings(recipe="text"), Layout(known=_FIELDS))


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    values = {field: row.get(field) for field in _FIELDS}
    for field, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field!r} is {value!r}, and should be text")
    return Problem(**values)  # type: ignore[arg-type]
