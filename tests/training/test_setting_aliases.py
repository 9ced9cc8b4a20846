"""Tests that other tools' names lead to the settings here."""

import re

import pytest

from peft_jax.training import RunConfig, default_config, from_config_dict
from peft_jax.training.setting_aliases import OTHER_NAMES


def leaves(section, where=""):
    for key, value in section.items():
        if hasattr(value, "keys") and value:
            yield from leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"


def test_every_alias_leads_to_an_existing_setting():
    known = set(leaves(default_config().to_dict()))
    assert {name for name in OTHER_NAMES.values() if not name.startswith("--")} <= known


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train.lr", "train.learning_rate"),
        ("train.bs", "train.batch_size"),
        ("train.num_train_epochs", "train.epochs"),
        ("train.max_seq_length", "train.max_length"),
        ("method.r", "method.rank"),
        ("method.lora_alpha", "method.alpha"),
        ("train.rank", "method.rank"),
        ("data.batch_size", "train.batch_size"),
        ("model.checkpoint", "model.path"),
        ("lora_r", "method.rank"),
        ("train.output_dir", "--workdir"),
        ("optimizer.warmup_steps", "optimizer.schedule.warmup_steps"),
    ],
)
def test_intended_setting_is_named(given, meant):
    config = default_config()
    section, _, key = given.rpartition(".")
    holder = config[section] if section else config
    with holder.unlocked():
        holder[key] = 3
    message = f"{given} is not a setting; did you mean {meant}?"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_config_dict(config)


def test_columns_may_have_any_name(tiny):
    assert tiny(data__columns={"instruction": "lr"}).data.columns == {"instruction": "lr"}


@pytest.mark.parametrize("name", [[], {}, 3, None])
def test_method_name_must_be_a_string(name):
    with pytest.raises(ValueError, match=r"^method\.name "):
        RunConfig.from_mapping({"method": {"name": name}})
