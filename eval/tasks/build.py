"""Builds tasks of lm-evaluation-harness, with their data."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from . import own
from .local_data import MissingDataError, open_by_recipe, open_local
from .names import is_flores, reads_local_data
from .trained_prompts import TASKS as WITH_TRAINED_PROMPTS
from .trained_prompts import with_trained_prompts

Prompts = Literal["harness", "trained"]

_FEWSHOT_SEED = 1234
"""Seed that few-shot examples are sampled with, as in the harness."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings that a task is built with.

    Attributes:
      data: Folder of local data; None: the hub.
      prompts: "harness": prompts of lm-evaluation-harness, comparable with published results;
        "trained": prompts of the training recipes.
      num_fewshot: Number of examples before each question; None: the task's.
      max_new_tokens: Maximum new tokens of a completion; None: the task's.
    """

    data: Path | None = None
    prompts: Prompts = "harness"
    num_fewshot: int | None = None
    max_new_tokens: int | None = None


def build_task(name: str, settings: TaskSettings, manager: TaskManager) -> dict[str, Any]:
    """Builds a task of this project, or a task or group of the harness, for `evaluate`.

    Args:
      name: Name of the task or group; neither HumanEval nor MT-Bench.
      settings: Settings of the task.
      manager: Tasks of the harness.

    Returns:
      A mapping as of `TaskManager.load`: "tasks", and "groups" for a group.

    Raises:
      MissingDataError: The local folder has no data for the task.
      ValueError: The data cannot be loaded.
    """
    try:
        if reads_local_data(name):
            tasks: dict[str, Any] = {"tasks": {name: _build_ours(name, settings, manager)}}
        else:
            tasks = dict(manager.load([name]))
    except MissingDataError:
        raise
    except Exception as error:
        # The harness and its data libraries raise errors of many types.
        hint = "; without access to the hub, give a folder of local data as --data"
        if not reads_local_data(name):
            hint = "; it needs access to the hub, because only this project's tasks read --data"
        elif settings.data:
            hint = ""
        raise ValueError(f"task {name} cannot be built: {error}{hint}") from error
    for task in tasks["tasks"].values():
        _configure(task, settings)
    return tasks


def _build_ours(name: str, settings: TaskSettings, manager: TaskManager) -> ConfigurableTask:
    if name == "stsb":
        config = own.sts_b()
    elif is_flores(name):
        config = own.flores(name)
    else:
        config = _harness_config(name, manager)
    if settings.prompts == "trained" and name in WITH_TRAINED_PROMPTS and name != "stsb":
        config = with_trained_prompts(config)
    shots = config.get("num_fewshot") if settings.num_fewshot is None else settings.num_fewshot
    by_recipe = name == "stsb" or is_flores(name)
    if settings.data is not None or by_recipe:
        if settings.data is not None:
            splits = open_local(name, settings.data, examples=bool(shots))
        else:
            splits = open_by_recipe(name, examples=bool(shots))
        config |= _with_splits(name, config, splits)
    return ConfigurableTask(config=config)


def _with_splits(name: str, config: dict[str, Any], splits: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a configuration that set its data to `splits`."""
    wanted = config.get("test_split") or config["validation_split"]
    if wanted not in splits:
        raise MissingDataError(
            f"{name} needs the split {wanted!r}, but its data have only {', '.join(splits)}"
        )
    parts: dict[str, Any] = {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}
    if "train" not in splits:
        # Few-shot examples are then taken from the other evaluated rows.
        parts |= {"training_split": None, "fewshot_split": None}
    return parts


def _harness_config(name: str, manager: TaskManager) -> dict[str, Any]:
    """Returns the harness's configuration of a task."""
    config = copy.deepcopy(load_yaml(manager.task_index[name].yaml_path))
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return config


def _configure(task: Any, settings: TaskSettings) -> None:
    """Applies the settings that the harness's own command applies to a task."""
    own_shots = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own_shots != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own_shots is None:
        task.set_config(key="num_fewshot", value=0)
    if settings.max_new_tokens and task.get_config("output_type") == "generate_until":
        limits = {"max_gen_toks": settings.max_new_tokens}
        task.set_config(key="generation_kwargs", value=limits, update=True)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
