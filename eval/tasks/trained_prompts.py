"""Gives tasks the prompts and answers of the training recipes.

The harness's prompts make results comparable with published ones. These prompts match the training
data of a model that was fine-tuned on a recipe.
"""

from typing import Any

from peft_jax.data import Example
from peft_jax.data.recipes.classification import Classification

from .local_data import recipe_for
from .names import GLUE, XNLI, is_flores

TASKS = (*GLUE, "gsm8k", *XNLI)
"""Tasks with both prompts. STS-B and FLORES always use the recipes' prompts."""


def has_trained_prompts(name: str) -> bool:
    """Returns whether a task can use, or always uses, the recipe's prompts."""
    return name in TASKS or is_flores(name)


def with_trained_prompts(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a task's configuration with the recipe's prompt.

    Args:
      config: Configuration of the task, whose data have the hub's columns.
    """
    recipe, _ = recipe_for(config["task"])

    def example(doc: Any) -> Example:
        made = recipe.example(doc)
        assert isinstance(made, Example)
        return made

    changed = {**config, "doc_to_text": lambda doc: example(doc).prompt, "description": ""}
    if isinstance(recipe, Classification):
        return {
            **changed,
            "doc_to_choice": lambda doc: [choice.strip() for choice in example(doc).choices],
            "doc_to_target": "label",
            "target_delimiter": " ",
        }
    return {
        **changed,
        "doc_to_target": lambda doc: example(doc).completion.strip(),
        "num_fewshot": 0,
    }
