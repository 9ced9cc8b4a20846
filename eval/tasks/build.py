"""Tasks of lm-evaluation-harness, with their data, ready to be evaluated."""

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
"""What examples are drawn with; the harness's own choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What decides how a task is built.

    Attributes:
      data: a folder of local data; None: the hub.
      prompts: "harness": those of lm-evaluation-harness, by which numbers are comparable with
        published ones; "trained": those of the training recipes.
      num_fewshot: how many examples are put before each question; None: as many as the task says.
      max_new_tokens: the most new tokens where text is generated; None: as many as the task says.
    """

    data: Path | None = None
    prompts: Prompts = "harness"
    num_fewshot: int | None = None
    max_new_tokens: int | None = None


def build_task(name: str, settings: TaskSettings, manager: TaskManager) -> dict[str, Any]:
    """One task of the project, or a task or group of the harness, as `evaluate` takes it.

    Args:
      name: its name; neither HumanEval nor MT-Bench.
      settings: how it is built.
      manager: the harness's tasks.

    Returns:
      What `TaskManager.load` gives: "tasks", and "groups" where the name is of one.

    Raises:
      MissingDataError: the local folder does not have the task's data.
      ValueError: the data cannot be had or used.
    """
    try:
        if reads_local_data(name):
            tasks: dict[str, Any] = {"tasks": {name: _build_ours(name, settings, manager)}}
        else:
            tasks = dict(manager.load([name]))
    except MissingDataError:
        raise
    except Exception as error:
        # The harness, and the libraries that it loads data with, raise whatever they like.
        hint = "; without the hub, give local files with --data"
        if not reads_local_data(name):
            hint = "; its data come from the hub: only this project's tasks read --data"
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
    """The parts of a configuration that make the data these."""
    wanted = config.get("test_split") or config["validation_split"]
    if wanted not in splits:
        raise MissingDataError(
            f"{name} is evaluated on the split {wanted!r}, and there is only {', '.join(splits)}"
        )
    parts: dict[str, Any] = {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}
    if "train" not in splits:
        # Examples, if any are asked for, come from the rows that are evaluated on, save the row.
        parts |= {"training_split": None, "fewshot_split": None}
    return parts


def _harness_config(name: str, manager: TaskManager) -> dict[str, Any]:
    """The harness's own configuration of a task."""
    config = copy.deepcopy(load_yaml(manager.task_index[name].yaml_path))
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return config


def _configure(task: Any, settings: TaskSettings) -> None:
    """What the harness's own command sets on each task."""
    own_shots = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own_shots != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own_shots is None:
        task.set_config(key="num_fewshot", value=0)
    if settings.max_new_tokens and task.get_config("output_type") == "generate_until":
        limits = {"max_gen_toks": settings.max_new_tokens}
        task.set_config(key="generation_kwargs", value=limits, update=True)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
