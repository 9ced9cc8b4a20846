"""Reads the user's copy of FastChat's questions, judge prompts and reference answers.

The files are `question.jsonl`, `judge_prompts.jsonl` and the reference answers of GPT-4
(`reference_answer/gpt-4.jsonl` or `reference_answer_gpt-4.jsonl`). They are published at
https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""Sampling temperature by category, as FastChat's `temperature_config`."""

WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
"""Categories whose judge prompt has a reference answer, as FastChat's `NEED_REF_CATS`."""

_FIELDS = ("question", "answer", "question_1", "question_2", "answer_1", "answer_2")
_REFERENCE_FIELDS = ("ref_answer_1", "ref_answer_2")
"""Fields of a judge prompt."""

_DEFAULT_TEMPERATURE = 0.7
_TURNS = 2


@dataclasses.dataclass(frozen=True)
class Question:
    """Question of two turns.

    Attributes:
      id: FastChat's number of the question.
      category: Category.
      turns: User message of each turn.
      reference: Reference answer of each turn; empty if the judge sees none.
    """

    id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Returns the sampling temperature of its answers."""
        return TEMPERATURES.get(self.category, _DEFAULT_TEMPERATURE)


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """Prompt of the judge.

    Attributes:
      name: FastChat's name of the prompt.
      system: System message.
      template: User message, with fields in braces.
    """

    name: str
    system: str
    template: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Contents of FastChat's files.

    Attributes:
      questions: Questions in order.
      prompts: Judge prompts, by whether they have a reference answer and by turn, from 1.
    """

    questions: tuple[Question, ...]
    prompts: Mapping[tuple[bool, int], JudgePrompt]


_PROMPTS = {
    (False, 1): "single-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 1): "single-math-v1",
    (True, 2): "single-math-v1-multi-turn",
}


def read_benchmark(folder: Path) -> Benchmark:
    """Reads FastChat's files.

    Args:
      folder: Folder of the files.

    Raises:
      ValueError: A file, or something in it, is missing or malformed.
    """
    references = _read_references(folder)
    questions = tuple(
        _question(row, where, references) for row, where in _rows(folder / "question.jsonl")
    )
    if not questions:
        raise ValueError(
            f"{folder / 'question.jsonl'} has no questions; copy FastChat's file there"
        )
    numbers = [question.id for question in questions]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{folder / 'question.jsonl'} has duplicate values of question_id")
    return Benchmark(questions, _read_prompts(folder / "judge_prompts.jsonl"))


def _question(row: dict[str, Any], where: str, references: dict[int, tuple[str, ...]]) -> Question:
    number, category, turns = (row.get(key) for key in ("question_id", "category", "turns"))
    if type(number) is not int or not isinstance(category, str):
        raise ValueError(f"{where}: a question must have a question_id and a category")
    if not isinstance(turns, list) or len(turns) != _TURNS or not all(map(_is_text, turns)):
        raise ValueError(f"{where}: question {number} must have {_TURNS} turns of text")
    reference: tuple[str, ...] = ()
    if category in WITH_REFERENCE:
        reference = references.get(number, ())
        if len(reference) != _TURNS:
            raise ValueError(
                f"{where}: question {number} has the category {category!r}, which needs a reference"
                f" answer to each of its {_TURNS} turns, but has {len(reference)}"
            )
    return Question(number, category, (turns[0], turns[1]), reference)


def _read_references(folder: Path) -> dict[int, tuple[str, ...]]:
    places = [folder / "reference_answer" / "gpt-4.jsonl", folder / "reference_answer_gpt-4.jsonl"]
    places += sorted(folder.glob("reference_answer/*.jsonl"))
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(
            f"{folder} has no reference answers; copy FastChat's to {places[0]} or {places[1].name}"
        )
    found = {}
    for row, where in _rows(file):
        try:
            found[int(row["question_id"])] = tuple(map(str, row["choices"][0]["turns"]))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: not a reference answer in FastChat's format") from error
    return found


def _read_prompts(file: Path) -> dict[tuple[bool, int], JudgePrompt]:
    named = {str(row.get("name")): (row, where) for row, where in _rows(file)}
    prompts = {}
    for key, name in _PROMPTS.items():
        if name not in named:
            raise ValueError(f"{file} has no prompt {name!r}; copy FastChat's file there")
        row, where = named[name]
        texts = [row.get("system_prompt"), row.get("prompt_template")]
        if not all(map(_is_text, texts)):
            raise ValueError(f"{where}: {name!r} must have a system_prompt and a prompt_template")
        prompts[key] = JudgePrompt(name, str(texts[0]), str(texts[1]))
        _check_template(prompts[key], key, where)
    return prompts


def _check_template(prompt: JudgePrompt, key: tuple[bool, int], where: str) -> None:
    """Rejects a prompt with unknown fields, with ValueError."""
    with_reference, _ = key
    known = {*_FIELDS, *(_REFERENCE_FIELDS if with_reference else ())}
    try:
        prompt.template.format_map(dict.fromkeys(known, ""))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{where}: the prompt_template of {prompt.name!r} cannot be formatted"
            f" ({type(error).__name__}: {error}); its fields may be {', '.join(sorted(known))}"
        ) from error


def _rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the object of each line of a file, with its location."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has no {file.name}; copy FastChat's files there from"
            " fastchat/llm_judge/data/mt_bench"
        )
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: invalid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object but is {type(row).__name__}")
        yield row, where


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
