"""The methods by name, and how a method from another package becomes one of them."""

import dataclasses
import importlib.metadata
from typing import Any, TypeVar

from peft_jax.adapters.boft import BOFT
from peft_jax.adapters.full import Full
from peft_jax.adapters.hybrid import Hybrid
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.lora_ga import LoRAGA
from peft_jax.adapters.method import TrainingMethod
from peft_jax.adapters.unitary import Unitary
from peft_jax.core import did_you_mean

METHODS: dict[str, type[TrainingMethod]] = {
    method.name: method for method in (Full, LoRA, LoRAGA, BOFT, Unitary, Hybrid)
}


ENTRY_POINTS = "peft_jax.methods"
"""The group of entry points under which an installed package offers methods."""

_Method = TypeVar("_Method", bound=type[TrainingMethod])


def register_method(method: _Method) -> _Method:
    """Makes a method known by its name, on the command line and in the files of adapters.

    Args:
      method: A dataclass that derives from `AdapterMethod`, with a `name` and a `learning_rate`.

    Returns:
      The method, so that this can be used as a decorator.

    Raises:
      ValueError: It is no such class, or another method has the name.

    Example:
      >>> from peft_jax.adapters import LoRA
      >>> register_method(LoRA).name  # registering the same class again changes nothing
      'lora'
    """
    if not (isinstance(method, type) and issubclass(method, TrainingMethod)):
        raise ValueError(f"{method!r} is no method: derive it from peft_jax.adapters.AdapterMethod")
    for wanted in ("name", "learning_rate"):
        if not hasattr(method, wanted):
            raise ValueError(f"the method {method.__name__} has no class variable {wanted!r}")
    if not dataclasses.is_dataclass(method):
        raise ValueError(f"the method {method.__name__} must be a frozen dataclass")
    if METHODS.get(method.name, method) is not method:
        raise ValueError(
            f"the method {method.__name__} is called {method.name!r}, as is"
            f" {METHODS[method.name].__name__}; give it another name"
        )
    METHODS[method.name] = method
    return method


def register_installed() -> None:
    """Registers the methods that installed packages offer as entry points."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        register_method(entry.load())


def make_method(name: str, **settings: Any) -> TrainingMethod:
    """The method called `name` with these settings; the others at their defaults.

    Raises:
      ValueError: when the name, or a setting, is not known, or a setting's value does not do.

    Example:
      >>> make_method("lora", rank=4)
      LoRA(rank=4, alpha=16.0, rank_stabilized=False, dropout=0.0)
      >>> make_method("lora", block_size=4)
      Traceback (most recent call last):
        ...
      ValueError: block_size is no setting of the method 'lora', but of boft, hybrid
    """
    if name not in METHODS:
        raise ValueError(
            f"there is no method {name!r}{did_you_mean(name, METHODS)}; import the module that"
            " registers another package's method first (--import=MODULE)"
        )
    known = method_settings(name)
    for setting in settings:
        if setting in known:
            continue
        others = [other for other in METHODS if setting in method_settings(other)]
        hint = f", but of {', '.join(others)}" if others else did_you_mean(setting, known)
        raise ValueError(f"{setting} is no setting of the method {name!r}{hint}")
    return METHODS[name](**settings)


def method_settings(name: str) -> tuple[str, ...]:
    """The names of a method's settings."""
    return tuple(field.name for field in dataclasses.fields(METHODS[name]))
