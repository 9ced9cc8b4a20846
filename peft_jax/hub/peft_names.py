"""Matches module names by Hugging Face PEFT's rules, and finds the shortest matching names."""

from collections.abc import Callable, Collection, Sequence

from peft_jax.core import Path, is_stacked
from peft_jax.hub.adapter_arrays import modules_of
from peft_jax.models import Model

PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of the base's module names."""

SHARED_PREFIX = "base_model."
"""PEFT's prefix of tensors that belong to no module of the base."""

Matches = Callable[[str, str], bool]
"""Returns whether (a name in the configuration, a module's name) match."""


def matches_saved(name: str, module: str) -> bool:
    """Matches by PEFT's rule for `modules_to_save`: "norm" also matches "input_layernorm"."""
    return module.endswith(name)


def all_modules(model: Model) -> set[str]:
    """Returns the Hugging Face names of all modules that hold parameters, and of their parents."""
    found: set[str] = set()
    for path in model.hf_names():
        for module in modules_of(model, path):
            parts = module.split(".")
            found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return found


def short_names(
    model: Model, paths: Sequence[Path], modules: Collection[str], matches: Matches
) -> list[str]:
    """Returns the shortest names that match the modules of some leaves, and no others.

    Args:
      model: Model, for the modules' names.
      paths: Leaves whose modules must match.
      modules: All modules.
      matches: Matching rule.

    Returns:
      Sorted names; for each leaf, the shortest sufficient suffix of its module's name.
    """
    wanted = {module for path in paths for module in modules_of(model, path)}
    others = set(modules) - wanted
    found: set[str] = set()
    for path in paths:
        own = modules_of(model, path)
        found.update(
            next(
                (
                    [name]
                    for name in _endings(own[0], path)
                    if not any(matches(name, other) for other in others)
                ),
                own,
            )
        )
    return sorted(found)


def _endings(module: str, path: Path) -> list[str]:
    """Returns the suffixes of a module's name, shortest first, without the layer's number."""
    parts = module.split(".")
    most = len(path) - 2 if is_stacked(path) else len(parts)
    return [".".join(parts[-count:]) for count in range(1, most + 1)]
