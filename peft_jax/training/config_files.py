"""Helpers for configuration files: all settings at their defaults, and typed arguments.

A configuration is a file with `get_config(arg)`, where `arg` is what follows the colon in
`--config=configs/finetune.py:lora`. It takes `base()`, which holds every setting there is, and
changes some of them. A wrong name or type is rejected before anything is loaded.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from peft_jax.adapters import METHODS
from peft_jax.core import did_you_mean
from peft_jax.training.config import default_config

PRECISIONS = ("bfloat16", "float32")

RANK = 16
"""Lowest rank of adapters of large models."""


def base(*, method: str = "hybrid", precision: str = "bfloat16") -> ConfigDict:
    """Returns all settings at their defaults, for a method and a precision.

    Args:
      method: Name of a method, which sets the learning rates.
      precision: Dtype of the base's parameters and of activations. Trainable arrays are float32.

    Raises:
      ValueError: The method or the precision is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}{did_you_mean(method, METHODS)}")
    if precision not in PRECISIONS:
        raise ValueError(
            f"there is no precision {precision!r}{did_you_mean(precision, PRECISIONS)}"
        )
    config = default_config()
    config.method.name = method
    config.model.dtype = precision
    config.execution.compute_dtype = precision
    return config


def large_model(method: str) -> ConfigDict:
    """Returns the settings that configurations of large models share.

    They train on instructions, recompute activations and hold few logits at once. A method whose
    default rank is lower than `RANK` has that rank.

    Args:
      method: Name of a method.

    Raises:
      ValueError: The method is unknown.
    """
    config = base(method=method)
    config.data.recipe = "alpaca"
    config.execution.remat = "full"
    config.train.steps = 1000
    config.train.loss_chunk = 16384
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.03
    config.evaluate.every = 200
    config.checkpoint.every = 50
    defaults = {field.name: field.default for field in dataclasses.fields(METHODS[method])}
    rank = defaults.get("rank")
    if isinstance(rank, int) and rank < RANK:
        config.method.rank = RANK
    if "n_butterfly_factors" in defaults:
        # Composed, blocks of 128: the size of a matrix unit.
        config.method.block_size = 32
        config.method.n_butterfly_factors = 3
    return config


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses the options in a configuration's argument: "lora,precision=float32".

    Args:
      arg: Options separated by commas, each `name=value`. The first may be the bare value of the
        first option.
      **defaults: All options with their defaults, whose types the values are read as.

    Raises:
      ValueError: An option is unknown, given twice, or not of its type.

    Example:
      >>> options = parse_arg("lora,rank=4", method="hybrid", rank=8, quick=False)
      >>> options.method, options.rank, options.quick
      ('lora', 4, False)
      >>> parse_arg("rnak=4", rank=8)
      Traceback (most recent call last):
      ValueError: the argument 'rnak=4' has the option 'rnak'; did you mean 'rank'? Known: rank
    """
    options = ConfigDict(defaults)
    given: set[str] = set()
    for index, part in enumerate(part.strip() for part in arg.split(",") if part.strip()):
        name, equals, text = part.partition("=")
        if not equals and index == 0:
            name, text = next(iter(defaults)), part
        elif not equals and isinstance(defaults.get(name), bool):
            text = "true"
        elif not equals:
            raise ValueError(
                f"the argument {arg!r} has {part!r}, which is not of the form name=value"
            )
        if name not in defaults:
            hint = did_you_mean(name, defaults)
            raise ValueError(f"the argument {arg!r} has the option {name!r}{hint}")
        if name in given:
            raise ValueError(f"the argument {arg!r} gives {name} twice")
        given.add(name)
        options[name] = _read(text, type(defaults[name]), f"the argument {arg!r}: {name}")
    return options


def _read(text: str, kind: type, where: str) -> Any:
    """Reads a text as the type of the default that it replaces."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false; it is {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{where} must be of type {kind.__name__}; it is {text!r}") from error
