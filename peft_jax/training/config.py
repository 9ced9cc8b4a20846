"""Declares the settings of a run, with their types, defaults and meanings.

A configuration file builds an `ml_collections.ConfigDict` on top of `default_config()`, flags
change single values of it, and `from_config_dict` makes a `RunConfig` of the result: the one
conversion, in which a key that is not known, or a value of the wrong type, is an error.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from peft_jax.adapters import METHODS, AdapterSpec, method_settings
from peft_jax.adapters.sketch import check_passes
from peft_jax.core import did_you_mean
from peft_jax.core.typed_settings import (
    differences,
    from_mapping,
    is_required,
    to_mapping,
    union_members,
)
from peft_jax.core.validation import check_positive_int
from peft_jax.data import DataSettings
from peft_jax.models import ExecutionSettings
from peft_jax.optim import MixingSettings, OptimizerSettings
from peft_jax.parallel import MeshSettings
from peft_jax.training.config_sections import (
    CheckpointSettings,
    EvaluateSettings,
    ExportSettings,
    LoggingSettings,
    ModelSettings,
    StartSettings,
    TrainSettings,
)
from peft_jax.training.method_section import START_SETTINGS, fill_in, read_method
from peft_jax.training.setting_aliases import check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run.

    In a configuration the section `method` gives `spec`, `init_batches` and `init_passes`: there
    the method's own settings stand beside the common ones, and None stands for the method's
    default.

    Attributes:
      seed: Seed of the adapter's initial arrays, of dropout and of the order of the rows.
      model: The checkpoint.
      execution: How the model is computed.
      spec: The method, and the modules it applies to.
      init_batches: Number of microbatches from which LoRA-GA, LoRA-One, and the hybrid's low-rank
        branch estimate the gradient that they start along, and EVA the inputs' components. Training
        then begins at the first batch again.
      init_passes: Number of passes over those microbatches: 1, or 2 and 2 more for each power
        iteration, which estimates the directions more closely.
      adapter: The adapter to start from, instead of a new one.
      mixing: Weights of the hybrid's branches; for other methods it must be left alone. Rates that
        are None become the method's.
      data: Source of the rows.
      train: Length, learning rate and batch.
      optimizer: The optimizer and its schedule; its learning rate is that of `train`.
      evaluate: Evaluation on held-out data.
      checkpoint: Checkpoints to resume from.
      parallel: The mesh of devices.
      logging: Logging of metrics.
      export: Format of the result.
    """

    seed: int = 0
    model: ModelSettings
    execution: ExecutionSettings = dataclasses.field(default_factory=ExecutionSettings)
    spec: AdapterSpec
    init_batches: int = START_SETTINGS["init_batches"]
    init_passes: int = START_SETTINGS["init_passes"]
    adapter: StartSettings = dataclasses.field(default_factory=StartSettings)
    mixing: MixingSettings = dataclasses.field(default_factory=MixingSettings)
    data: DataSettings
    train: TrainSettings
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    evaluate: EvaluateSettings = dataclasses.field(default_factory=EvaluateSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    parallel: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    logging: LoggingSettings = dataclasses.field(default_factory=LoggingSettings)
    export: ExportSettings = dataclasses.field(default_factory=ExportSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2³² - 1")
        check_positive_int("method.init_batches", self.init_batches)
        check_passes("method.init_passes", self.init_passes)
        optimizer = dataclasses.replace(self.optimizer, learning_rate=self.train.learning_rate)
        object.__setattr__(self, "optimizer", optimizer)
        if self.model.quantization != "none" and self.spec.method.trains_base:
            raise ValueError(
                f"model.quantization is {self.model.quantization!r}, and method.name 'full', which"
                " trains every parameter, but quantized weights cannot be trained: use an adapter's"
                " method, or model.quantization none"
            )
        if self.export.merged and not self.spec.method.merges:
            raise ValueError(
                f"export.merged is true, but {self.spec.method.name} trains virtual tokens, which"
                " cannot be merged; leave it out, and use adapter/"
            )
        branches = self.spec.method.branches
        object.__setattr__(self, "mixing", self.mixing.with_rates(branches))
        if not branches:
            unmixed = MixingSettings().with_rates(branches)
            changed = differences(to_mapping(unmixed), to_mapping(self.mixing))
            for name in changed:
                raise ValueError(
                    f"mixing.{name} is given, but only the hybrid has branches to mix, and"
                    f" method.name is {self.spec.method.name!r}; where a configuration file gives"
                    " it, choose the method by the file's argument, as in configs/finetune.py:lora"
                )

    @property
    def applied_optimizer(self) -> OptimizerSettings:
        """Returns the optimizer's settings with the arrays that the method keeps from decay."""
        no_decay = dict.fromkeys((*self.optimizer.no_decay, *self.spec.method.no_decay))
        return dataclasses.replace(self.optimizer, no_decay=tuple(no_decay))

    def to_mapping(self) -> dict[str, Any]:
        """Returns all settings as nested dictionaries that JSON can hold."""
        mapping = to_mapping(self)
        del mapping["optimizer"]["learning_rate"]
        common = mapping.pop("spec")
        own = common.pop("method")
        mapping["method"] = {
            "name": self.spec.method.name,
            **own,
            **common,
            **{name: mapping.pop(name) for name in START_SETTINGS},
        }
        return mapping

    @staticmethod
    def from_mapping(given: Mapping[str, Any]) -> "RunConfig":
        """Reads the settings from nested dictionaries; inverse of `to_mapping`.

        Raises:
          ValueError: A key is unknown, a value is wrong, or a required one is missing.
        """
        given = dict(given)
        if isinstance(given.get("optimizer"), Mapping) and "learning_rate" in given["optimizer"]:
            raise ValueError("optimizer.learning_rate is given; it is called train.learning_rate")
        known = default_config().to_dict()
        check_names(given, known)
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"{unknown[0]} is not a setting{did_you_mean(unknown[0], known)}")
        if not isinstance(given.get("method"), Mapping):
            raise ValueError("method must be given, as a section with at least a name")
        given["spec"], start = read_method(given.pop("method"))
        given |= start
        fill_in(given, given["spec"].method)
        return from_mapping(RunConfig, given)


LENGTH = ("train.steps", "train.epochs")
"""Settings of a run's length, which may change before it is resumed, even after its end."""

MAY_CHANGE = (
    *LENGTH,
    "logging",
    "checkpoint",
    "evaluate",
    "export",
    "execution",
    "parallel",
    "data.prefetch",
    "data.check_rows",
    "data.on_bad_row",
)
"""Settings that may change when a run is resumed.

They change how things are computed, what is logged and where a run stops, but not what is computed;
except that some schedules depend on the length."""

ROUNDING = ("execution", "parallel")
"""Settings that change how sums are rounded, so that a result is not the same bit for bit."""


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    """Returns whether a dotted name is one of the prefixes, or below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def default_config() -> ConfigDict:
    """Returns all settings at their defaults, for configuration files to build on.

    The section `method` holds the settings of all methods. There, and for the learning rate and the
    rates of branches, None stands for the method's default. Required settings are None too.

    Example:
      >>> config = default_config()
      >>> config.method.name, config.train.max_length = "lora", 512
      >>> config.method.rank is None
      True
    """
    config = _section(RunConfig)
    del config.optimizer["learning_rate"]
    method = config["method"] = config.spec
    del config["spec"]
    del method["method"]
    method["name"] = FieldReference(None, field_type=str)
    for name in START_SETTINGS:
        method[name] = config.get_ref(name)
        del config[name]
    for name in sorted({name for known in METHODS for name in method_settings(known)}):
        method[name] = FieldReference(None, field_type=object)
    return config


def from_config_dict(config: ConfigDict) -> RunConfig:
    """Returns the validated settings of a configuration file and flags.

    Raises:
      ValueError: As `RunConfig.from_mapping`.
    """
    return RunConfig.from_mapping(config.to_dict())


def _section(cls: Any) -> ConfigDict:
    """Returns a dataclass's fields at their defaults.

    On the command line, strings stay strings, so that a path of digits is no number. Other values
    are read as Python literals, and the conversion checks their types.
    """
    hints = typing.get_type_hints(cls)
    section = ConfigDict()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            section[field.name] = _section(hints[field.name])
            continue
        if is_required(field):
            value = None
        elif field.default is not dataclasses.MISSING:
            value = field.default
        else:
            value = typing.cast(Any, field.default_factory)()
        section[field.name] = FieldReference(value, field_type=_flag_type(hints[field.name]))
    return section


def _flag_type(annotation: Any) -> type:
    members = [m for m in union_members(annotation) if m is not type(None)] or [annotation]
    only = members[0] if len(members) == 1 else object
    return str if only is str or typing.get_origin(only) is Literal else object
