"""Recipe for GSM8K: grade-school mathematics, solved step by step and answered with a number.

Source: Cobbe et al., 2021, "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168.
"""

import dataclasses
import re
from decimal import Decimal, InvalidOperation

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Example, prompt_and_completion
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.rows import Row

# A minus sign after a digit, a letter or a bracket is a subtraction.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathProblem(Recipe):
    """A problem, its solution, and the number after the mark "####"."""

    def example(self, row: Row) -> Example:
        """Returns an example whose answer is the solution, with its final number as reference.

        Raises:
          BadRowError: The solution has no number after a mark.
        """
        values = self.read(row)
        _, mark, tail = values["answer"].rpartition(_MARK)
        number = final_number(tail) if mark else None
        if number is None:
            raise BadRowError("no final answer", f"field 'answer' has no number after {_MARK!r}")
        return prompt_and_completion(
            self.prompt.format(**values), self.completion.format(**values), answer=number
        )

    def score(self, prediction: str, example: Example) -> float:
        """Returns 1 if the prediction's final number equals the reference, else 0."""
        number = final_number(prediction)
        return float(number is not None and Decimal(number) == Decimal(example.answer))


def final_number(text: str) -> str | None:
    """Returns the final number of a solution: the one after the first "####", else the last one.

    Only the first mark counts, so that text after the answer is ignored.

    Args:
      text: Solution.

    Returns:
      The number, without thousands separators and currency sign; None if there is none.

    Example:
      >>> final_number("She earns 3 * 400 = $1,200 a month. #### 1,200")
      '1200'
      >>> final_number("so the answer is -3.50.")
      '-3.50'
      >>> final_number("I do not know") is None
      True
    """
    _, mark, tail = text.partition(_MARK)
    found = _NUMBER.findall(tail) if mark else []
    number = found[0] if found else next(iter(reversed(_NUMBER.findall(text))), None)
    if number is None:
        return None
    plain = number.replace(",", "").replace("$", "")
    try:
        Decimal(plain)
    except InvalidOperation:
        return None
    return plain


GSM8K = MathProblem(
    name="gsm8k",
    about="grade-school mathematics: the solution, then #### and a number",
    fields={"question": ("question",), "answer": ("answer",)},
    prompt="Question: {question}\nAnswer:",
    chat_prompt="{question}",
    completion=" {answer}",
    hub=HubHome(path="openai/gsm8k", subset="main"),
    metric="exact_match",
)
