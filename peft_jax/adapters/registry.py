"""The adapter methods by name."""

import dataclasses
from typing import Any

from peft_jax.adapters.boft import BOFT
from peft_jax.adapters.full import Full
from peft_jax.adapters.hybrid import Hybrid
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.lora_ga import LoRAGA
from peft_jax.adapters.method import AdapterMethod
from peft_jax.adapters.unitary import Unitary
from peft_jax.core import did_you_mean

METHODS: dict[str, type[AdapterMethod] | type[Full]] = {
    method.name: method for method in (Full, LoRA, LoRAGA, BOFT, Unitary, Hybrid)
}


def make_method(name: str, **settings: Any) -> AdapterMethod | Full:
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
        raise ValueError(f"there is no method {name!r}{did_you_mean(name, METHODS)}")
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
