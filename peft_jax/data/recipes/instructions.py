"""Instructions and their answers, as Alpaca's and Dolly's sets have them.

Taori et al., 2023, "Stanford Alpaca: An Instruction-following LLaMA model".
"""

import dataclasses

from peft_jax.data.examples import Example, prompt_and_completion
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.settings import DataSettings
from peft_jax.data.tables import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions(Recipe):
    """An instruction, often with an input, and an answer.

    Attributes:
      prompt_without_input: the prompt of rows whose input is missing or empty.
    """

    prompt_without_input: str = ""

    def configured(self, settings: DataSettings) -> Recipe:
        """The recipe with what the settings replace.

        In a chat the turn says whose words they are, so the headings are left out; a template of
        the user's serves for rows with and without input.
        """
        recipe = self
        if settings.prompt_template is not None:
            recipe = dataclasses.replace(self, prompt_without_input=settings.prompt_template)
        elif settings.chat:
            recipe = dataclasses.replace(self, prompt_without_input="{instruction}")
        return super(Instructions, recipe).configured(settings)

    def example(self, row: Row) -> Example:
        """The answer is learnt."""
        values = self.read(row)
        prompt = self.prompt if values["input"].strip() else self.prompt_without_input
        completion = self.completion.format(**values)
        return prompt_and_completion(prompt.format(**values), completion, answer=completion.strip())


ALPACA = Instructions(
    name="alpaca",
    about="an instruction, an input if there is one, and an answer",
    fields={
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "output": ("output", "response"),
    },
    optional=("input",),
    prompt="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    prompt_without_input="### Instruction:\n{instruction}\n\n### Response:",
    chat_prompt="{instruction}\n\n{input}",
    completion="\n{output}",
    hub=HubHome(path="tatsu-lab/alpaca"),
)
