"""Tasks with the prompts and answers that training uses, for what was fine-tuned on them.

The harness's prompts make numbers comparable with published ones; a model that was fine-tuned on a
recipe is asked in the words it has learned by these.
"""

from typing import Any

from peft_jax.data import Example
from peft_jax.data.recipes.classification import Classification

from .local_data import recipe_for
from .names import GLUE, XNLI, is_flores

TASKS = (*GLUE, "gsm8k", *XNLI)
"""The tasks that have two prompts. STS-B's and FLORES's are the recipes' in any case."""


def has_trained_prompts(name: str) -> bool:
    """Whether a task can be asked in the recipe's words, or is in any case."""
    return name in TASKS or is_flores(name)


def with_trained_prompts(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a task with its prompt replaced by the recipe's.

    Args:
      config: the task's, with data in the columns of the hub's set.
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
