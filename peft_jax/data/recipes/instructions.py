"""Recipe for instructions and answers, in the formats of Alpaca and Dolly.

Source: Taori et al., 2023, "Stanford Alpaca: An Instruction-following LLaMA model".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Conversation, Example, prompt_and_completion
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.rows import Row
from peft_jax.data.settings import DataSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions(Recipe):
    """An instruction, an optional input, and an answer.

    A row may have a text "system", which comes first, and a "history" of earlier instructions with
    their answers, which are not in the loss.

    Attributes:
      prompt_without_input: Template of the prompt for rows without an input.
      as_chat: Whether turns are rendered by a chat template.
    """

    prompt_without_input: str = ""
    as_chat: bool = False

    def configured(self, settings: DataSettings) -> Recipe:
        """Returns the recipe with the settings applied.

        In a chat, turns replace the headings. `data.prompt_template` applies to rows with and
        without input.
        """
        recipe = dataclasses.replace(self, as_chat=settings.chat)
        if settings.prompt_template is not None:
            recipe = dataclasses.replace(recipe, prompt_without_input=settings.prompt_template)
        elif settings.chat:
            recipe = dataclasses.replace(recipe, prompt_without_input="{instruction}")
        return super(Instructions, recipe).configured(settings)

    def example(self, row: Row) -> Example | Conversation:
        """Returns the example of a row; a conversation if a chat has several turns."""
        values = self.read(row)
        history = self._history(row)
        system = "" if "{system}" in self.prompt else values["system"]
        prompts = [
            self._prompt({**values, "instruction": asked, "input": ""}) for asked, _ in history
        ]
        prompt = self._prompt(values)
        completion = self.completion.format(**values)
        answer = completion.strip()
        if self.as_chat and (history or system.strip()):
            turns = [*zip(prompts, (said for _, said in history), strict=True), (prompt, answer)]
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            if system.strip():
                messages.insert(0, {"role": "system", "content": system})
            return Conversation(
                messages=tuple(messages), loss_turns=(len(messages) - 1,), answer=answer
            )
        parts = [system] if system.strip() else []
        parts += [
            asked + self.completion.format(**{**values, "output": said})
            for asked, (_, said) in zip(prompts, history, strict=True)
        ]
        return prompt_and_completion("\n\n".join([*parts, prompt]), completion, answer=answer)

    def read(self, row: Row) -> dict[str, str]:
        """Reads the row's fields as text, without the history."""
        return {field: self.read_text(row, field) for field in self.template_fields()}

    def template_fields(self) -> tuple[str, ...]:
        """Returns the names that a template may have in braces."""
        return tuple(field for field in self.fields if field != "history")

    def _prompt(self, values: dict[str, str]) -> str:
        prompt = self.prompt if values["input"].strip() else self.prompt_without_input
        return prompt.format(**values)

    def _history(self, row: Row) -> list[tuple[str, str]]:
        """Reads earlier instructions with their answers.

        Raises:
          BadRowError: The history is not a list of pairs of texts.
        """
        history = self.read_value(row, "history") or []
        if not _is_list(history) or not all(
            _is_list(turn) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            for turn in history
        ):
            raise BadRowError(
                "wrong type",
                f"field 'history' is {str(history)[:60]}, but must be a list of pairs of texts, an"
                " instruction and its answer",
            )
        return [(asked, said) for asked, said in history]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


ALPACA = Instructions(
    name="alpaca",
    about="an instruction, an input if there is one, and an answer",
    fields={
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "output": ("output", "response"),
        "system": ("system",),
        "history": ("history",),
    },
    optional=("input", "system", "history"),
    prompt="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    prompt_without_input="### Instruction:\n{instruction}\n\n### Response:",
    chat_prompt="{instruction}\n\n{input}",
    completion="\n{output}",
    hub=HubHome(path="tatsu-lab/alpaca"),
)
