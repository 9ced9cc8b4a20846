"""Tests configurations: known keys, types of values, and conversion to mappings."""

import dataclasses
import json
import re

import pytest
from ml_collections import ConfigDict

from peft_jax.adapters import BOFT, METHODS, Hybrid
from peft_jax.commands.config_flags import let_flags_win
from peft_jax.optim import MixingSettings
from peft_jax.training import RunConfig, config_files, default_config, from_config_dict


def config(**changes) -> ConfigDict:
    """Returns a complete configuration with changes by dotted name."""
    made = default_config()
    given = {
        "model.path": "somewhere",
        "method.name": "lora",
        "data.recipe": "gsm8k",
        "train.steps": 10,
        "train.batch_size": 4,
        "train.learning_rate": 1e-3,
        "train.max_length": 64,
    } | changes
    for name, value in given.items():
        *sections, key = name.split(".")
        holder = made
        for section in sections:
            holder = holder[section]
        holder[key] = value
    return made


def test_common_settings_are_converted():
    run = from_config_dict(config(**{"method.rank": 16, "seed": 7, "data.path": "here"}))
    assert (run.model.path, run.data.path, run.data.recipe) == ("somewhere", "here", "gsm8k")
    assert (run.spec.method.name, run.spec.method.rank) == ("lora", 16)
    assert (run.train.steps, run.train.batch_size, run.train.max_length) == (10, 4, 64)
    assert run.optimizer.learning_rate == run.train.learning_rate == 1e-3
    assert run.seed == 7


@pytest.mark.parametrize("name", METHODS)
def test_configuration_survives_json(name):
    run = from_config_dict(
        config(
            **{
                "method.name": name,
                "method.target_modules": ("q_proj", "v_proj"),
                "method.modules_to_save": "norm",
                "optimizer.schedule.warmup_ratio": 0.1,
                "data.columns": {"question": "the.question"},
            }
        )
    )
    mapping = json.loads(json.dumps(run.to_mapping()))
    assert RunConfig.from_mapping(mapping) == run
    assert mapping["method"]["name"] == name
    assert mapping["data"]["columns"] == {"question": "the.question"}


def test_placeholders_are_the_dataclasses_defaults():
    """The placeholders of `default_config` stand for what the dataclasses have."""
    run = from_config_dict(config())
    assert run == RunConfig.from_mapping(
        {
            "model": {"path": "somewhere"},
            "method": {"name": "lora"},
            "data": {"recipe": "gsm8k"},
            "train": {"steps": 10, "batch_size": 4, "learning_rate": 1e-3, "max_length": 64},
        }
    )


def test_method_settings_reach_the_method():
    run = from_config_dict(
        config(**{"method.name": "hybrid", "method.block_size": 4, "method.unitary_modules": "a,b"})
    )
    assert run.spec.method == Hybrid(block_size=4, unitary_modules=("a", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 3}, "sede is not a setting; did you mean 'seed'?"),
        ({"train.step": 3}, "train.step is not a setting; did you mean 'steps'?"),
        ({"trian": {"steps": 3}}, "trian is not a setting; did you mean 'train'?"),
        ({"method.rnak": 3}, "method.rnak is not a setting; did you mean 'rank'"),
        ({"method.name": "loar"}, "method.name is 'loar'; did you mean 'lora'"),
        ({"method.name": None}, "method.name must be given; known: full, "),
        (
            {"method.n_butterfly_factors": 3},
            "method.n_butterfly_factors is a setting of boft, hybrid, not of 'lora'",
        ),
        ({"method.init_batches": 8}, "method.init_batches is given, but only methods that start"),
        ({"method.rank": "eight"}, "method.rank must be an integer; it is 'eight'"),
        ({"method.rank": 0}, "method: rank must be"),
        ({"method.dtype": "float8"}, "method.dtype is 'float8'"),
        ({"mixing.rule": "fixed"}, "mixing.rule is given, but only the hybrid has branches"),
        ({"model.path": None}, "model.path must be given"),
        ({"model.path": ""}, "model: path is empty"),
        ({"data.recipe": None}, "data.recipe must be given"),
        ({"data.shuffle": 1}, "data.shuffle must be true or false; it is 1"),
        ({"data.on_bad_row": "ignore"}, "data.on_bad_row is 'ignore'"),
        ({"train.steps": 1.5}, "train.steps must be an integer; it is 1.5"),
        ({"train.epochs": 2}, "train.steps is 10 and train.epochs is 2; give one of the two"),
        ({"train.steps": None}, "train.steps or train.epochs must be given; both are None"),
        ({"train.steps": None, "train.epochs": 0}, "epochs must be a number above 0"),
        ({"train.steps": None, "train.epochs": float("inf")}, "epochs must be a finite number"),
        ({"train.steps": None, "train.epochs": "2"}, "train.epochs must be a number; it is '2'"),
        ({"train.steps": 10**20}, "train.steps makes too many steps; a run has at most 2,147"),
        (
            {"train.steps": None, "train.epochs": 1e300},
            "epochs is 1e+300; it must be at most 2,147",
        ),
        ({"train.steps": 0}, "steps must"),
        ({"train.steps": True}, "train.steps must be an integer; it is True"),
        ({"train.learning_rate": -1.0}, "learning_rate must be a number above 0"),
        ({"train.gradient_accumulation": 3}, "gradient_accumulation = 3"),
        ({"train.max_length": 1}, "max_length is 1"),
        ({"optimizer.learning_rate": 1.0}, "it is called train.learning_rate"),
        ({"optimizer.name": "adamv"}, "did you mean 'adam' or 'adamw'"),
        ({"optimizer.schedule.nmae": "x"}, "optimizer.schedule.nmae is not a setting"),
        ({"checkpoint.keep": 1}, "keep is 1; at least 2"),
        ({"parallel.data": 0}, "data must be at least 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_invalid_setting_is_named(changes, message):
    made = config(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config_dict(made)


def test_epochs_replace_steps():
    run = from_config_dict(config(**{"train.steps": None, "train.epochs": 2}))
    assert (run.train.steps, run.train.epochs) == (None, 2.0)
    assert RunConfig.from_mapping(json.loads(json.dumps(run.to_mapping()))) == run


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ({"train.steps": 9}, {"train.epochs": 2}, {"train.steps": None, "train.epochs": 2}),
        (
            {"train.steps": None, "train.epochs": 2},
            {"train.steps": 5},
            {"train.steps": 5, "train.epochs": None},
        ),
        (
            {"optimizer.schedule.warmup_ratio": 0.1},
            {"optimizer.schedule.warmup_steps": 3},
            {"optimizer.schedule.warmup_ratio": 0.0, "optimizer.schedule.warmup_steps": 3},
        ),
        (
            {"data.hold_out": 100},
            {"data.eval_path": "dev.jsonl"},
            {"data.hold_out": None, "data.eval_path": "dev.jsonl"},
        ),
        # Neither is taken back where the user gives both, or takes one back.
        (
            {},
            {"train.steps": 5, "train.epochs": 2},
            {"train.steps": 5, "train.epochs": 2},
        ),
        ({"train.steps": 9}, {"train.epochs": None}, {"train.steps": 9, "train.epochs": None}),
    ],
)
def test_flag_overrides_its_alternative_in_the_file(file, flags, expected):
    made = config(**file, **flags) if not set(file) & set(flags) else config(**(file | flags))
    let_flags_win(made, list(flags))
    for name, value in expected.items():
        holder = made
        for part in name.split("."):
            holder = holder[part]
        assert holder == value, name


def test_targets_may_be_comma_separated_or_one_expression():
    names = from_config_dict(config(**{"method.target_modules": "q_proj, mlp.up_proj"}))
    assert names.spec.target_modules == ("q_proj", "mlp.up_proj")
    expression = from_config_dict(config(**{"method.target_modules": r".*\.(q|v)_proj"}))
    assert expression.spec.target_modules == r".*\.(q|v)_proj"
    everything = from_config_dict(config())
    assert everything.spec.target_modules == "all-linear"


def test_rates_of_branches_are_the_methods_unless_given():
    base = from_config_dict(config(**{"method.name": "hybrid", "mixing.ema": 0.9}))
    assert MixingSettings().rotation_rate is None
    assert base.mixing.low_rank_rate == Hybrid.branches["low_rank"]
    assert base.mixing.rotation_rate == Hybrid.branches["rotation"]
    # In Python, as on the command line.
    python = dataclasses.replace(base, mixing=MixingSettings(ema=0.9))
    assert python == base
    given = dataclasses.replace(base, mixing=MixingSettings(rotation_rate=1.0))
    assert given.mixing.rotation_rate == 1.0
    # A method without branches has rates of 1 in its record.
    plain = from_config_dict(config())
    assert plain.to_mapping()["mixing"]["rotation_rate"] == 1.0
    with pytest.raises(ValueError, match=r"mixing.rotation_rate is given"):
        dataclasses.replace(plain, mixing=MixingSettings(rotation_rate=3.0))


def test_a_method_keeps_its_arrays_from_decay():
    settings = from_config_dict(config(**{"method.name": "lora_ga"}))
    assert {"a", "b"} <= set(settings.applied_optimizer.no_decay)
    plain = from_config_dict(config(**{"method.name": "lora"}))
    assert plain.applied_optimizer == plain.optimizer


def test_a_large_model_asks_a_method_for_its_rank_and_factors(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(BOFT):
        rank: int = 4

    monkeypatch.setitem(METHODS, "mine", Mine)
    found = {name: config_files.large_model(name).method for name in METHODS}
    assert found["lora"].rank == found["hybrid"].rank == found["dora"].rank == 16
    # A larger default stays, and methods without a rank get none.
    assert found["vera"].rank is found["boft"].rank is None
    assert found["boft"].block_size == found["hybrid"].block_size == 32
    assert found["lora"].block_size is None
    assert (found["mine"].rank, found["mine"].n_butterfly_factors) == (16, 3)
