"""Recipe for plain text (language modeling)."""

import dataclasses
from typing import ClassVar

from peft_jax.data.examples import Example, prompt_and_completion
from peft_jax.data.recipes.base import Recipe
from peft_jax.data.rows import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainText(Recipe):
    """Plain text with every token in the loss; a long text becomes several sequences."""

    templated: ClassVar[bool] = False

    def example(self, row: Row) -> Example:
        """Returns the row's text as the answer."""
        return prompt_and_completion("", self.read_text(row, "text"))


TEXT = PlainText(
    name="text",
    about="plain text, every token in the loss",
    fields={"text": ("text", "content", "story")},
    completion_only=False,
    too_long="split",
)
