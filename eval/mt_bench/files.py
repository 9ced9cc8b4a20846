"""FastChat's files: questions, the judge's prompts, and reference answers; the user's own copy.

They are `question.jsonl`, `judge_prompts.jsonl` and the reference answers of one model (GPT-4's, as
FastChat has them: `reference_answer/gpt-4.jsonl` or `reference_answer_gpt-4.jsonl`), from
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
"""The temperature of answers by category; FastChat's `temperature_config`."""

WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
"""The categories whose judge sees a reference answer; FastChat's `NEED_REF_CATS`."""

_FIELDS = ("question", "answer", "question_1", "question_2", "answer_1", "answer_2")
_REFERENCE_FIELDS = ("ref_answer_1", "ref_answer_2")
"""What a judge's prompt is filled with."""

_DEFAULT_TEMPERATURE = 0.7
_TURNS = 2


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: FastChat's number for it.
      category: what it is about.
      turns: what the user says, twice.
      reference: a good answer to each turn; empty where the judge sees none.
    """

    id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """The temperature that it is answered with."""
        return TEMPERATURES.get(self.category, _DEFAULT_TEMPERATURE)


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """How the judge is asked.

    Attributes:
      name: FastChat's name for it.
      system: what the system says.
      template: what the user says, with fields in braces.
    """

    name: str
    system: str
    template: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Everything that FastChat's files hold.

    Attributes:
      questions: in their order.
      prompts: the judge's, by (whether with a reference, which turn, from 1).
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
      folder: where they are.

    Raises:
      ValueError: a file or something in it is missing; what, and where, is named.
    """
    references = _read_references(folder)
    questions = tuple(
        _question(row, where, references) for row, where in _rows(folder / "question.jsonl")
    )
    if not questions:
        raise ValueError(f"{folder / 'question.jsonl'} has no questions")
    numbers = [question.id for question in questions]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{folder / 'question.jsonl'} has a question_id twice")
    return Benchmark(questions, _read_prompts(folder / "judge_prompts.jsonl"))


def _question(row: dict[str, Any], where: str, references: dict[int, tuple[str, ...]]) -> Question:
    number, category, turns = (row.get(key) for key in ("question_id", "category", "turns"))
    if type(number) is not int or not isinstance(category, str):
        raise ValueError(f"{where}: a question has a question_id and a category")
    if not isinstance(turns, list) or len(turns) != _TURNS or not all(map(_is_text, turns)):
        raise ValueError(f"{where}: question {number} should have {_TURNS} turns of text")
    reference: tuple[str, ...] = ()
    if category in WITH_REFERENCE:
        reference = references.get(number, ())
        if len(reference) != _TURNS:
            raise ValueError(
                f"{where}: question {number} is of the category {category!r}, whose judge sees a"
                " reference answer, and there is none to both of its turns"
            )
    return Question(number, category, (turns[0], turns[1]), reference)


def _read_references(folder: Path) -> dict[int, tuple[str, ...]]:
    places = [folder / "reference_answer" / "gpt-4.jsonl", folder / "reference_answer_gpt-4.jsonl"]
    places += sorted(folder.glob("reference_answer/*.jsonl"))
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} lacks reference answers: {places[0]} or {places[1].name}")
    found = {}
    for row, where in _rows(file):
        try:
            found[int(row["question_id"])] = tuple(map(str, row["choices"][0]["turns"]))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: not a reference answer of FastChat's form") from error
    return found


def _read_prompts(file: Path) -> dict[tuple[bool, int], JudgePrompt]:
    named = {str(row.get("name")): (row, where) for row, where in _rows(file)}
    prompts = {}
    for key, name in _PROMPTS.items():
        if name not in named:
            raise ValueError(f"{file} lacks the prompt {name!r}")
        row, where = named[name]
        texts = [row.get("system_prompt"), row.get("prompt_template")]
        if not all(map(_is_text, texts)):
            raise ValueError(f"{where}: {name!r} should have a system_prompt and a prompt_template")
        prompts[key] = JudgePrompt(name, str(texts[0]), str(texts[1]))
        _check_template(prompts[key], key, where)
    return prompts


def _check_template(prompt: JudgePrompt, key: tuple[bool, int], where: str) -> None:
    """Raises ValueError unless a prompt's fields are those that it is filled with."""
    with_reference, _ = key
    known = {*_FIELDS, *(_REFERENCE_FIELDS if with_reference else ())}
    try:
        prompt.template.format_map(dict.fromkeys(known, ""))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{where}: the prompt_template of {prompt.name!r} cannot be filled"
            f" ({type(error).__name__}: {error}); its fields are {', '.join(sorted(known))}"
        ) from error


def _rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file, a line each, and where they stand."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent} lacks {file.name}: copy FastChat's files there, from"
            " fastchat/llm_judge/data/mt_bench"
        )
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: broken JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: should be a JSON object")
        yield row, where


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
