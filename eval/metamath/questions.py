"""Reads the rows of training, validation and test, as tokens."""

import dataclasses
from typing import Any

from peft_jax.data import DataSettings, get_recipe
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.sources import open_sources
from peft_jax.data.tables import Table

from .protocol import BUCKET, is_short, validation_indices

GSM8K = "openai/gsm8k"
"""GSM8K on the hub, where its subset is "main"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question to answer.

    Attributes:
      tokens: Tokens of the prompt.
      solution: Text of the solution.
    """

    tokens: tuple[int, ...]
    solution: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Rows of a run.

    Attributes:
      train: Tokens of prompt and solution of each training row, in the order of the data.
      validation: Questions to validate on.
      test: Questions to test on.
    """

    train: tuple[tuple[int, ...], ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]


def read_questions(
    data: DataSettings, tokenizer: Any, *, steps: int, batch_size: int, max_length: int
) -> Questions:
    """Reads as many rows as a run needs.

    Args:
      data: Data settings: `path` of MetaMathQA and `eval_path` of GSM8K, empty for the hub's;
        `eval_rows`, the largest number of rows to test on.
      tokenizer: A transformers tokenizer.
      steps: Number of steps.
      batch_size: Number of rows of a step.
      max_length: Largest number of tokens of a row, which is cut there.

    Raises:
      ValueError: There are fewer training rows than the steps need, or a row cannot be read.
      FileNotFoundError: A path does not exist.
    """
    recipe = get_recipe("metamath").configured(dataclasses.replace(data, eval_path=""))

    def tokens_of(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"][:max_length])

    def read(table: Table, index: int) -> dict[str, str]:
        try:
            return recipe.read(table[index])
        except BadRowError as error:
            raise ValueError(f"{table.where(index)}: {error}") from error

    def question(table: Table, index: int) -> Question:
        values = read(table, index)
        prompt = recipe.prompt.format(**values)
        return Question(tokens=tokens_of(prompt), solution=values["response"])

    for_training = dataclasses.replace(data, eval_path="", eval_split="", hold_out=0)
    table = open_sources(for_training, recipe).train
    # The rows of a whole bucket are sorted together.
    bucket = batch_size * BUCKET
    wanted = -(-steps * batch_size // bucket) * bucket
    train: list[tuple[int, ...]] = []
    for index in range(len(table)):
        if len(train) == wanted:
            break
        values = read(table, index)
        if is_short(**values):
            train.append(tokens_of(recipe.prompt.format(**values) + values["response"]))
    if len(train) < steps * batch_size:
        raise ValueError(
            f"{table.name} has {len(train):,} rows that are short enough, but {steps:,} steps of"
            f" {batch_size} rows need {steps * batch_size:,}, and the protocol reads each row once;"
            " lower train.steps"
        )
    path = data.eval_path or GSM8K
    of_gsm8k = DataSettings(
        recipe="metamath",
        path=path,
        subset="main" if path == GSM8K else "",
        train_split="train",
        eval_split="test",
    )
    sources = open_sources(of_gsm8k, recipe)
    assert sources.held_out is not None  # the split is named
    rows = len(sources.held_out)
    rows = rows if data.eval_rows is None else min(rows, data.eval_rows)
    return Questions(
        train=tuple(train),
        validation=tuple(
            question(sources.train, int(index)) for index in validation_indices(len(sources.train))
        ),
        test=tuple(question(sources.held_out, index) for index in range(rows)),
    )
