"""Demo: fine-tunes a small model of stories to answer questions about them.

    make demo                 # sets up an environment, and then runs
    python -m examples.demo   # from the repository's root

It evaluates the checkpoint in `assets/tiny_world` on questions about unseen stories, fine-tunes it
with the hybrid method of `configs/demo.py`, evaluates it again with the adapter bound, and shows
both results. A stopped demo resumes, and a finished one shows its results again. Give another
--workdir for another run.
"""

import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs import demo
from peft_jax.core import Tree
from peft_jax.generation import GenerationSettings, generate_text
from peft_jax.hub import load_adapter, load_model
from peft_jax.models import CausalLM
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments
from peft_jax.training import from_config_dict, run
from peft_jax.training.workdir import WorkDir

SHOWN = 5
"""Number of questions shown with their answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a story.

    Attributes:
      subject: Subject of the question, as in `tiny_world.Fact`.
      messages: User's turn: the story, and the question on a separate line.
      answer: Correct answer.
    """

    subject: str
    messages: list[dict[str, str]]
    answer: str


def read_questions(path: Path) -> list[Question]:
    """Reads the questions of a file that `tiny_world.py questions` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Question(
            subject=row["subject"],
            messages=row["messages"][:-1],
            answer=row["messages"][-1]["content"],
        )
        for row in rows
    ]


def answer(
    model: CausalLM, params: Tree, tokenizer: Any, questions: Sequence[Question]
) -> list[str]:
    """Returns the model's greedy answer to each question."""
    found = generate_text(
        model,
        params,
        tokenizer,
        [question.messages for question in questions],
        GenerationSettings(max_new_tokens=16, batch_size=64),
    )
    return [text.strip() for text in found.texts]


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of exactly correct answers, by subject and for "all"."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, given in zip(questions, answers, strict=True):
        for subject in (question.subject, "all"):
            right[subject].append(given == question.answer)
    return {subject: sum(marks) / len(marks) for subject, marks in sorted(right.items())}


@exits.command("examples.demo", stopped="stopped; the same command resumes")
def main() -> None:
    """Evaluates, trains, evaluates again, and shows both results."""
    parser = Arguments(
        "examples.demo",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument("--workdir", default="runs/demo", help="for the run")
    parser.add_argument("--config", default="", help="argument of configs/demo.py: lora,steps=100")
    given = parser.parse_args()
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 100)
    config = from_config_dict(demo.get_config(given.config))
    # Checks the work directory first, because the evaluation takes a while.
    folder = WorkDir.at(given.workdir)
    folder.check(config)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model, params = load_model(config.model.path, dtype="float32")
    questions = read_questions(Path(config.data.path, "validation.jsonl"))
    console.rule("Before")
    console.print(
        f"The checkpoint {config.model.path} was trained on stories without questions. "
        f"Here are {len(questions)} questions about unseen stories."
    )
    before = answer(model, params, tokenizer, questions)
    console.print(f"Correct answers: {accuracy(questions, before)['all']:.1%}")

    console.rule(f"Fine-tuning: {config.spec.method.name}")
    summary = run(config, given.workdir)

    console.rule("After")
    spec, state = load_adapter(folder.adapter, model, params)
    after = answer(model, spec.bind(params, state), tokenizer, questions)
    for question, *answers in list(zip(questions, before, after, strict=True))[:SHOWN]:
        story, _, asked = question.messages[-1]["content"].rpartition("\n")
        console.print(f"\n[dim]{story}[/dim]\n[bold]{asked}[/bold]", highlight=False)
        for label, said in zip(("before", "after"), answers, strict=True):
            color = "green" if said == question.answer else "red"
            console.print(f"  {label:<7}[{color}]{said}[/{color}]", highlight=False)
    scores = Table(title="\nExactly correct answers")
    scores.add_column("subject")
    for name in ("before", "after"):
        scores.add_column(name, justify="right")
    by_subject = [accuracy(questions, answers) for answers in (before, after)]
    for subject in sorted(by_subject[0], key=lambda name: (name == "all", name)):
        scores.add_row(subject, *(f"{score[subject]:.0%}" for score in by_subject))
    console.print(scores)
    console.print(
        f"Trained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters"
        f" in {summary['steps']} steps of {summary['seconds_per_step']:.2f} s.\n"
        f"The whole demo took {time.monotonic() - started:.0f} s.\n"
        f"Report: {given.workdir}/report/README.md\n"
        f"Adapter: {given.workdir}/adapter",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
