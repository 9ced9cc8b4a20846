"""Fuzzes settings with one wrong value, of any type."""

import copy
import math

import pytest
from fuzzing import COUNTS, JUNK, fuzz, outcome
from hypothesis import strategies as st

from peft_jax.training import RunConfig, default_config

VALID = {
    "model.path": "somewhere",
    "method.name": "hybrid",
    "data.recipe": "alpaca",
    "data.path": "rows.jsonl",
    "train.steps": 6,
    "train.batch_size": 4,
    "train.max_length": 16,
    "train.learning_rate": 0.02,
}


def leaves(section, where=""):
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"


def valid():
    config = default_config().to_dict()
    for name, value in VALID.items():
        put(config, name, value)
    return config


def put(config, name, value):
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


def get(config, name):
    for key in name.split("."):
        if not isinstance(config, dict) or key not in config:
            return None
        config = config[key]
    return config


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def means(given, taken):
    """Returns whether a value was accepted unchanged; None stands for the default."""
    if given is None or given == taken:
        return True
    if type(given) is int and isinstance(taken, float):
        return float(given) == taken  # A large integer is rounded to the nearest float.
    if isinstance(given, str) and isinstance(taken, list):
        return [name.strip() for name in given.split(",") if name.strip()] == taken
    return False


NAMES = sorted(leaves(default_config().to_dict()))


@pytest.mark.parametrize("count", COUNTS)
def test_a_wrong_setting_is_rejected_by_name_or_kept_unchanged(count):
    def check(name, value):
        config = valid()
        put(config, name, copy.deepcopy(value))
        names = tuple(name.split("."))
        made, message = outcome(lambda: RunConfig.from_mapping(config), names=names)
        if message:
            return
        mapping = made.to_mapping()
        assert RunConfig.from_mapping(mapping) == made
        assert finite(mapping), f"{name}={value!r} is accepted but not finite"
        assert means(value, get(mapping, name)), f"{name}={value!r} is {get(mapping, name)!r}"

    fuzz(check, st.sampled_from(NAMES), JUNK, count=count)


@pytest.mark.parametrize("count", COUNTS)
def test_an_unknown_setting_is_rejected_by_name(count):
    def check(section, key):
        config = valid()
        put(config, f"{section}.{key}" if section else key, 1)
        _, message = outcome(lambda: RunConfig.from_mapping(config), names=(key,))
        assert "is not a setting" in message

    sections = sorted({name.rpartition(".")[0] for name in NAMES})
    taken = {name.rpartition(".")[2] for name in NAMES} | {"optimizer", "schedule"}
    keys = st.text(st.characters(categories=("Ll", "Nd")), min_size=1, max_size=9)
    fuzz(check, st.sampled_from(sections), keys.filter(lambda key: key not in taken), count=count)
