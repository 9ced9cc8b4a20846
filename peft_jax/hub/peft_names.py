"""How Hugging Face PEFT chooses modules by name, and the shortest names that choose as wanted."""

from collections.abc import Callable, Collection, Sequence

from peft_jax.core import Path, is_stacked
from peft_jax.hub.adapter_arrays import modules_of
from peft_jax.models import Model

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

Matches = Callable[[str, str], bool]
"""Whether (a name in the configuration, a module's name) match."""


def matches_target(name: str, module: str) -> bool:
    """PEFT's rule for `target_modules`, and for plain names in `rank_pattern`."""
    return module == name or module.endswith(f".{name}")


def matches_saved(name: str, module: str) -> bool:
    """PEFT's rule for `modules_to_save`: "norm" means "input_layernorm" too."""
    return module.endswith(name)


def all_modules(model: Model) -> set[str]:
    """The Hugging Face names of all modules that hold parameters, and of what holds them."""
    found: set[str] = set()
    for path in model.hf_names():
        for module in modules_of(model, path):
            parts = module.split(".")
            found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return found


def short_names(
    model: Model, paths: Sequence[Path], modules: Collection[str], matches: Matches
) -> list[str]:
    """Names that choose the modules of some leaves, and no others.

    Args:
      model: gives the modules' names.
      paths: leaves whose modules are wanted.
      modules: what else there is to choose from.
      matches: by which rule.

    Returns:
      Sorted; for each leaf the last parts of its module's name, as many as are needed.
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
    """The ends of a module's name, shortest first; of a layer's module, those without a number."""
    parts = module.split(".")
    most = len(path) - 2 if is_stacked(path) else len(parts)
    return [".".join(parts[-count:]) for count in range(1, most + 1)]
