"""Reads the section `method` of a configuration: a method's own settings beside the common ones."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.adapters import METHODS, AdapterSpec, TrainingMethod, method_settings
from peft_jax.core import did_you_mean
from peft_jax.core.typed_settings import convert, from_mapping
from peft_jax.optim import usual_learning_rate

START_SETTINGS = MappingProxyType({"init_batches": 4, "init_passes": 1})
"""Defaults of the settings of a run that stand in the section `method` of a configuration."""


def read_method(given: Mapping[str, Any]) -> tuple[AdapterSpec, dict[str, int]]:
    """Reads the section `method`.

    Args:
      given: The section, with the method's own settings and the common ones beside `name`.

    Returns:
      The specification, and the values of `START_SETTINGS`.

    Raises:
      ValueError: A setting is unknown, wrong, or another method's; the message says which.
    """
    name = given.get("name")
    if name is None:
        raise ValueError(f"method.name must be given; known: {', '.join(METHODS)}")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method.name is {name!r}{did_you_mean(str(name), METHODS)}")
    common = [field.name for field in dataclasses.fields(AdapterSpec) if field.name != "method"]
    common.extend(START_SETTINGS)
    own = method_settings(name)
    annotations = typing.get_type_hints(METHODS[name])
    settings, rest = {}, {}
    for key, value in given.items():
        owners = [other for other in METHODS if key in method_settings(other)]
        if key == "name":
            continue
        if key in common:
            rest[key] = value
        elif not owners:
            known = ["name", *common, *own]
            raise ValueError(f"method.{key} is not a setting{did_you_mean(key, known)}")
        elif value is None:
            continue
        elif key not in own:
            raise ValueError(
                f"method.{key} is a setting of {', '.join(owners)}, not of {name!r}; leave it "
                "out, or choose another method.name"
            )
        else:
            settings[key] = convert(value, annotations[key], where=f"method.{key}")
    try:
        method = METHODS[name](**settings)
    except ValueError as error:
        raise ValueError(f"method: {error}") from error
    for key in ("target_modules", "exclude_modules"):
        if isinstance(rest.get(key), str):
            rest[key] = _names(rest[key])
    start = {}
    for key, default in START_SETTINGS.items():
        wanted = rest.pop(key, None)
        start[key] = default if wanted is None else convert(wanted, int, where=f"method.{key}")
        if start[key] != default and not method.start_rank:
            raise ValueError(
                f"method.{key} is given, but only methods that start from the first batches use"
                f" it, and {name!r} does not"
            )
    return from_mapping(AdapterSpec, {"method": method, **rest}, where="method"), start


def fill_in(given: dict[str, Any], method: TrainingMethod) -> None:
    """Sets the learning rate where it is left to the method, or to the optimizer.

    Args:
      given: All settings by section; modified in place.
      method: The method of the run.
    """
    if isinstance(given.get("train"), Mapping) and given["train"].get("learning_rate") is None:
        optimizer = given.get("optimizer")
        name = optimizer.get("name") if isinstance(optimizer, Mapping) else None
        rate = default_learning_rate(method, str(name))
        given["train"] = {**given["train"], "learning_rate": rate}


def default_learning_rate(method: TrainingMethod, optimizer: str) -> float:
    """Returns the peak learning rate of a method with an optimizer of the given name."""
    return usual_learning_rate(optimizer) or method.learning_rate


def _names(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Splits names separated by commas, as on a command line; returns other text unchanged.

    Example:
      >>> _names("q_proj,v_proj"), _names("all-linear"), _names(r".*_proj")
      (('q_proj', 'v_proj'), 'all-linear', '.*_proj')
    """
    if isinstance(targets, str) and re.fullmatch(r"\w+(\.\w+)*(\s*,\s*\w+(\.\w+)*)*", targets):
        return tuple(re.split(r"\s*,\s*", targets))
    return targets
