"""Declares the settings of a run, with their types, defaults and meanings.

A configuration file builds an `ml_collections.ConfigDict` on top of `default_config()`, flags
change single values of it, and `from_config_dict` makes a `RunConfig` of the result: the one
conversion, in which a key that is not known, or a value of the wrong type, is an error.
"""

import dataclasses
import re
import typing
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from peft_jax.adapters import METHODS, AdapterSpec, TrainingMethod, method_settings
from peft_jax.adapters.sketch import check_passes
from peft_jax.core import did_you_mean
from peft_jax.core.typed_settings import (
    convert,
    differences,
    from_mapping,
    is_required,
    to_mapping,
    union_members,
)
from peft_jax.core.validation import check_choice, check_positive, check_positive_int
from peft_jax.data import DataSettings
from peft_jax.models import ExecutionSettings
from peft_jax.models.architectures import ARCHITECTURES
from peft_jax.optim import (
    MIXING_RATES,
    MixingSettings,
    OptimizerSettings,
    usual_learning_rate,
)
from peft_jax.parallel import MeshSettings
from peft_jax.training.setting_aliases import check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The checkpoint to fine-tune.

    Attributes:
      path: Folder in Hugging Face's format (config.json, safetensors, a tokenizer), name on the
        Hugging Face hub, or location of a converted checkpoint ("gs://bucket/model"; see
        `peft_jax/convert.py`).
      revision: Branch, tag or commit on the hub; empty: the newest.
      dtype: Dtype of the base's parameters. Trainable arrays have that of `method.dtype`.
      architecture: Name of the architecture that the checkpoint must have, one of
        `peft_jax.models.architectures`. With it, a run can be planned without the checkpoint.
        Empty: any.
      quantization: Format of the frozen kernels of the transformer blocks, which are quantized
        while they are loaded: "int8", "nf4" (4 bits), "w8a8" (int8, with forward products of 8-bit
        integers), "w8a8g8" (as "w8a8", with backward products of 8-bit integers too), or "none" for
        `dtype`. Embeddings, head, norms and scales have `dtype`.
      weights: "checkpoint", or "random" for training the architecture of config.json from scratch,
        which needs no safetensors.
    """

    path: str
    revision: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    architecture: str = ""
    quantization: Literal["none", "int8", "nf4", "w8a8", "w8a8g8"] = "none"
    weights: Literal["checkpoint", "random"] = "checkpoint"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; give a folder with a Hugging Face checkpoint")
        if self.architecture:
            check_choice("architecture", self.architecture, ARCHITECTURES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartSettings:
    """The adapter to start from.

    Attributes:
      path: Folder of an adapter, ours or Hugging Face PEFT's, or its name on the hub; its method
        and modules have to be those of the section `method`. Empty: a new adapter.
      revision: Branch, tag or commit on the hub; empty: the newest.
    """

    path: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        if self.revision and not self.path:
            raise ValueError(
                f"adapter.revision is {self.revision!r}, and adapter.path is empty; give the"
                " adapter's name on the hub"
            )


MOST_STEPS = 2**31 - 1
"""Largest number of steps: the optimizer counts them in int32."""


def check_steps(steps: int, of: str = "train.steps") -> None:
    """Raises ValueError if a run has more steps than can be counted.

    Args:
      steps: Number of steps.
      of: Name of the setting, for the message.
    """
    if steps > MOST_STEPS:
        raise ValueError(f"{of} makes too many steps; a run has at most {MOST_STEPS:,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Length, learning rate and batch of a run.

    Exactly one of `steps` and `epochs` is given.

    Attributes:
      steps: Optimizer steps.
      epochs: Passes over the training rows, instead of `steps`; 0.5 is half a pass. All rows are
        encoded before the first step to find the number of steps.
      learning_rate: Peak of the schedule, which `optimizer.schedule` describes; by default the
        method's, and 1 for the optimizer prodigy, which estimates its own.
      batch_size: Number of rows in one optimizer step, over all devices and microbatches.
      gradient_accumulation: Number of microbatches that a step's rows are divided into. The result
        is the same up to rounding, in less memory.
      max_length: Number of tokens in a row.
      loss_chunk: Number of positions whose logits are held at once.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float
    batch_size: int
    gradient_accumulation: int = 1
    max_length: int
    loss_chunk: int = 1024

    def __post_init__(self) -> None:
        self._check_length()
        check_positive("learning_rate", self.learning_rate)
        for name in ("batch_size", "gradient_accumulation", "loss_chunk"):
            check_positive_int(name, getattr(self, name))
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a row needs at least 2 tokens")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size is {self.batch_size}, and gradient_accumulation ="
                f" {self.gradient_accumulation} does not divide it; choose a divisor of the batch"
                f" size: {_divisors(self.batch_size)}"
            )

    def _check_length(self) -> None:
        """Raises ValueError unless exactly one of `steps` and `epochs` is given."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs:g}; give one of the"
                " two, and set the other to None"
            )
        if self.steps is not None:
            check_positive_int("steps", self.steps)
            check_steps(self.steps)
        elif self.epochs is not None:
            check_positive("epochs", self.epochs)
            if self.epochs > MOST_STEPS:
                raise ValueError(f"epochs is {self.epochs:g}; it must be at most {MOST_STEPS:,}")
        else:
            raise ValueError("train.steps or train.epochs must be given; both are None")

    @property
    def microbatch_size(self) -> int:
        """Returns the number of rows in one microbatch, over all devices."""
        return self.batch_size // self.gradient_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluation on held-out data, always before the first and after the last step.

    Attributes:
      every: Number of steps between evaluations; 0: only before and after.
    """

    every: int = 0

    def __post_init__(self) -> None:
        _check_not_negative(self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints to resume from, also before the first step and on a request to stop.

    Attributes:
      every: Number of steps between checkpoints; 0: only those.
      keep: Number of checkpoints to keep.
      asynchronous: Whether they are written while training continues.
    """

    every: int = 100
    keep: int = 3
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _check_not_negative(self, "every")
        if self.keep < 2:
            raise ValueError(
                f"keep is {self.keep}; at least 2, so that one is left if one is damaged"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Logging of metrics.

    Attributes:
      every: Number of steps between lines of metrics.jsonl; the first and the last step always have
        one.
      tensorboard: Whether to write TensorBoard events too, to the work directory's `tensorboard/`.
      wandb_project: Project on Weights & Biases to log to; empty: none.
      wandb_name: Name of the run there; empty: that of the work directory.
    """

    every: int = 1
    tensorboard: bool = True
    wandb_project: str = ""
    wandb_name: str = ""

    def __post_init__(self) -> None:
        check_positive_int("every", self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Format of the result.

    Attributes:
      merged: Whether to write the whole model to `model/`, in Hugging Face's format and in
        `model.dtype`, beside `adapter/`. None: for the method "full" only, whose result is the
        whole model and no adapter.
    """

    merged: bool | None = None


_INIT_BATCHES, _INIT_PASSES = 4, 1
START_SETTINGS = MappingProxyType({"init_batches": _INIT_BATCHES, "init_passes": _INIT_PASSES})
"""Defaults of the settings of a run that stand in the section `method` of a configuration."""


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
      mixing: Weights of the hybrid's branches; for other methods it must be left alone.
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
    init_batches: int = _INIT_BATCHES
    init_passes: int = _INIT_PASSES
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
        if not self.spec.method.branches:
            changed = differences(to_mapping(MixingSettings()), to_mapping(self.mixing))
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
        given["spec"], start = _read_method(given.pop("method"))
        given |= start
        _fill_in(given, given["spec"].method)
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
    for name in MIXING_RATES.values():
        config.mixing[name] = FieldReference(None, field_type=object)
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


ALTERNATIVES = (
    ("train.steps", "train.epochs"),
    ("optimizer.schedule.warmup_steps", "optimizer.schedule.warmup_ratio"),
    ("data.hold_out", "data.eval_path"),
    ("data.hold_out", "data.eval_split"),
)
"""Pairs of settings of which one may be given."""


def let_flags_win(config: ConfigDict, flags: Collection[str]) -> None:
    """Resets what a configuration file sets where a flag sets its alternative.

    A file that sets `train.steps` gives a default. With `--config.train.epochs=2` the user wants
    epochs, and should not have to take the file's steps back as well. Where two flags, or two lines
    of a file, give both alternatives, both stay, and the conversion rejects them.

    Args:
      config: Settings of the file and the flags; modified in place.
      flags: Dotted names of the settings that flags have set.

    Example:
      >>> config = default_config()
      >>> config.train.steps, config.train.epochs = 1000, 2
      >>> let_flags_win(config, ["train.epochs"])
      >>> config.train.steps is None, config.train.epochs
      (True, 2)
    """
    defaults = default_config()
    for pair in ALTERNATIVES:
        for name, other in (pair, pair[::-1]):
            if name in flags and other not in flags and _value(config, name):
                section, _, key = other.rpartition(".")
                if _value(config, other) is not None:
                    _value(config, section)[key] = _value(defaults, other)


def _value(config: ConfigDict, name: str) -> Any:
    """Returns the value at a dotted name; None if a section is missing."""
    for part in name.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return None
        config = config[part]
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


def _read_method(given: Mapping[str, Any]) -> tuple[AdapterSpec, dict[str, int]]:
    """Reads the section `method`; returns the specification and `START_SETTINGS`."""
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


def _fill_in(given: dict[str, Any], method: TrainingMethod) -> None:
    """Sets the rates that are left to the method, or to the optimizer."""
    if isinstance(given.get("train"), Mapping) and given["train"].get("learning_rate") is None:
        optimizer = given.get("optimizer")
        name = optimizer.get("name") if isinstance(optimizer, Mapping) else None
        rate = default_learning_rate(method, str(name))
        given["train"] = {**given["train"], "learning_rate": rate}
    if not isinstance(given.get("mixing", {}), Mapping):
        return
    mixing = dict(given.get("mixing", {}))
    for name in MIXING_RATES.values():
        if mixing.get(name, 0.0) is None:
            del mixing[name]
    given["mixing"] = mixing_rates(method) | mixing


def default_learning_rate(method: TrainingMethod, optimizer: str) -> float:
    """Returns the peak learning rate of a method with an optimizer of the given name."""
    return usual_learning_rate(optimizer) or method.learning_rate


def mixing_rates(method: TrainingMethod) -> dict[str, Any]:
    """Returns the fields of `MixingSettings` that a method sets: its branches' rates."""
    return {MIXING_RATES[branch]: factor for branch, factor in method.branches.items()}


def _names(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Splits names separated by commas, as on a command line; returns other text unchanged.

    Example:
      >>> _names("q_proj,v_proj"), _names("all-linear"), _names(r".*_proj")
      (('q_proj', 'v_proj'), 'all-linear', '.*_proj')
    """
    if isinstance(targets, str) and re.fullmatch(r"\w+(\.\w+)*(\s*,\s*\w+(\.\w+)*)*", targets):
        return tuple(re.split(r"\s*,\s*", targets))
    return targets


def _divisors(number: int) -> str:
    """Lists the first divisors of a number.

    Example:
      >>> _divisors(12)
      '1, 2, 3, 4, 6, 12'
    """
    few = [n for n in range(1, min(number, 4096) + 1) if number % n == 0]
    return ", ".join(map(str, few[:12])) + (", ..." if len(few) > 12 else "")


def _check_not_negative(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 0")
