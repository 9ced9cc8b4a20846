"""Named recipes. To add one, write it and add a line to `RECIPES`."""

from peft_jax.core import did_you_mean
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.recipes.conversation import CHAT
from peft_jax.data.recipes.flores import FLORES
from peft_jax.data.recipes.glue import GLUE
from peft_jax.data.recipes.gsm8k import GSM8K
from peft_jax.data.recipes.instructions import ALPACA
from peft_jax.data.recipes.metamath import METAMATH
from peft_jax.data.recipes.text import TEXT
from peft_jax.data.recipes.xnli import XNLI

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *GLUE,
        GSM8K,
        METAMATH,
        ALPACA,
        CHAT,
        XNLI,
        FLORES,
        TEXT,
    )
}
"""Recipes by the name in `data.recipe`."""


def get_recipe(name: str) -> Recipe:
    """Returns a recipe by name.

    Raises:
      ValueError: The name is unknown; the message suggests near matches.
    """
    if name not in RECIPES:
        raise ValueError(f"data.recipe is {name!r}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]


__all__ = ["RECIPES", "HubHome", "Recipe", "get_recipe"]
