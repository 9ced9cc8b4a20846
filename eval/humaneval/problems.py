"""Loads HumanEval's problems, from the hub or a local file."""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_jax.data import DataSettings
from peft_jax.data.data_files import Layout, find_splits, open_files
from peft_jax.data.tables import MemoryTable, Table

from ..sandbox import TestedProgram
from ..tasks.local_data import local_folder

HUB = "openai/openai_humaneval"
_FIELDS = ("task_id", "prompt", "test", "entry_point")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Problem of HumanEval.

    Attributes:
      task_id: Name, for example "HumanEval/0".
      prompt: Imports, and the function's signature and docstring.
      test: Source that defines `check(candidate)`.
      entry_point: Name of the function.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> TestedProgram:
        """Returns the program that tests a completion."""
        return TestedProgram(
            source=f"{self.prompt}{completion}\n",
            function=self.entry_point,
            given=self._given(),
            test=f"{self.test}\ncheck({self.entry_point})\n",
        )

    def _given(self) -> str:
        """Returns the prompt as a program, whose imports and functions the test may use.

        A function without a docstring gets a body.
        """
        for text in (self.prompt, f"{self.prompt}\n    pass\n"):
            with contextlib.suppress(SyntaxError, ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(text, "prompt.py", "exec")
                return text
        return ""


def open_problems(data: Path | None) -> list[Problem]:
    """Loads the problems in order.

    Args:
      data: Folder of local data, with `humaneval/HumanEval.jsonl.gz` or the hub's file; None: the
        hub.

    Raises:
      ValueError: There are no problems, or one lacks a field.
    """
    table = _from_hub() if data is None else _from_folder(local_folder(data, "humaneval"))
    return [_problem(table[index], table.where(index)) for index in range(len(table))]


def _from_hub() -> Table:
    import datasets

    try:
        return MemoryTable(list(datasets.load_dataset(HUB, split="test")), HUB)
    except Exception as error:
        # The library raises errors of many types.
        raise ValueError(
            f"{HUB} cannot be loaded from the hub: {error}; give a folder of local data as --data"
        ) from error


def _from_folder(folder: Path) -> Table:
    splits = find_splits(folder)
    if not splits:
        raise ValueError(f"{folder} has no problems of HumanEval; put HumanEval.jsonl.gz there")
    files = splits.get("test") or next(iter(splits.values()))
    return open_files(files, DataSettings(recipe="text"), Layout(known=_FIELDS))


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    values = {field: row.get(field) for field in _FIELDS}
    for field, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field!r} is {value!r} but must be text")
    return Problem(**values)  # type: ignore[arg-type]
