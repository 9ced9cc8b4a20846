"""Recipe for MetaMathQA, with the prompt and the answers of PEFT's comparison of methods.

Rows of GSM8K have the same form under other names. Prompt, answers and their comparison are those
of huggingface/peft, method_comparison/MetaMathQA (data.py, utils.py and
default_training_params.json) at commit 5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40.

Source: Yu et al., 2023, "MetaMath: Bootstrap Your Own Mathematical Questions for Large Language
Models", arXiv 2309.12284.
"""

import dataclasses
from decimal import Decimal, DivisionByZero, InvalidOperation

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Example, prompt_and_completion
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.tables import Row

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
"""Prompt of a question."""

_MARKS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)
"""Texts before a final answer: MetaMath's, then GSM8K's. The first that occurs decides."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaMath(Recipe):
    """A question, a solution, and the final answer after one of several marks."""

    def example(self, row: Row) -> Example:
        """Returns an example whose answer is the solution's final answer.

        Raises:
          BadRowError: The solution has no final answer.
        """
        values = self.read(row)
        answer = final_answer(values["response"])
        if answer is None:
            raise BadRowError("no final answer", "field 'response' has no mark before an answer")
        return prompt_and_completion(
            self.prompt.format(**values), self.completion.format(**values), answer=answer
        )

    def score(self, prediction: str, example: Example) -> float:
        """Returns 1 if the prediction's final answer equals the reference, else 0."""
        return float(is_right(prediction, f"{_MARKS[0]}{example.answer}"))


def final_answer(text: str) -> str | None:
    r"""Returns the text after the last mark, to the end of its line; None without a mark.

    Example:
      >>> final_answer("so that 4^2 = 16.\nThe answer is: 16.")
      '16'
      >>> final_answer("He pays $12. #### 12 \nQuestion: and then?")
      '12'
      >>> final_answer("I do not know") is None
      True
    """
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in _MARKS if mark in text), None)
    if mark is None:
        return None
    line, _, _ = text.rpartition(mark)[-1].strip().partition("\n")
    return line.strip(" .!?$%")


def as_number(answer: str | None) -> Decimal | None:
    """Returns an answer as a number; None if it is none. A fraction is divided.

    Example:
      >>> as_number("20/16"), as_number("three")
      (Decimal('1.25'), None)
    """
    if answer is None:
        return None
    parts = [part.strip() for part in answer.strip().split("/")]
    try:
        if len(parts) == 1:
            return Decimal(parts[0])
        if len(parts) > 2 or Decimal(parts[1]) == 0:
            return None
        return Decimal(parts[0]) / Decimal(parts[1])
    except (DivisionByZero, InvalidOperation, ValueError):
        return None


def is_right(prediction: str, solution: str) -> bool:
    """Returns whether two texts have the same final answer: as numbers, else as text.

    Args:
      prediction: Generated text, with or without its prompt.
      solution: Text of the solution.

    Raises:
      ValueError: The solution has no final answer.

    Example:
      >>> is_right("The answer is: 35/100", "#### 0.35"), is_right("35", "#### 35")
      (True, False)
    """
    wanted, found = final_answer(solution), final_answer(prediction)
    if wanted is None:
        raise ValueError(f"the solution has no final answer: {solution!r}")
    if found is None:
        return False
    number, right = as_number(found), as_number(wanted)
    if right is not None:
        return number is not None and float(number) == float(right)
    return number is None and found == wanted


METAMATH = MetaMath(
    name="metamath",
    about="mathematics: the solution, and a final answer after a mark",
    fields={"query": ("query", "question"), "response": ("response", "answer")},
    prompt=TEMPLATE,
    completion="{response}",
    completion_only=False,
    hub=HubHome(path="meta-math/MetaMathQA"),
    metric="exact_match",
)
