"""What a study compares, on what, and by which protocol."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peft_jax.adapters import METHODS
from peft_jax.core.validation import check_positive, check_positive_int
from peft_jax.training import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """One task: a model, data to train on, data to choose learning rates on, data to measure on.

    Attributes:
      name: in cells' names.
      title: on the page.
      config: a run's configuration with model, data, batch and steps, without a method. Its
        held-out rows are taken from the training rows (`data.hold_out`): learning rates are chosen
        on them, and nothing else.
      test: settings of `data` that give the rows for the final measurement in place of `hold_out`.
      metric: the task's own measure, as the recipe calls it; empty for none.
      own_text: a file, a line a text, that the base is at home with, for forgetting; empty for
        text that a causal base writes itself.
      own_texts: how many texts of it.
      arms: the names of the arms that are run on it; empty for all.
      grids: by name, the learning rates that arms choose from: rising, and all of one size. What
        is a good step for one method or model is too long for another, so arms name theirs.
    """

    name: str
    title: str
    config: ConfigDict
    test: Mapping[str, Any]
    grids: Mapping[str, tuple[float, ...]]
    arms: tuple[str, ...] = ()
    metric: str = ""
    own_text: str = ""
    own_texts: int = 64

    def __post_init__(self) -> None:
        check_positive_int("own_texts", self.own_texts)
        for name, rates in self.grids.items():
            for rate in rates:
                check_positive(f"grids[{name!r}]", rate)
            if list(rates) != sorted(set(rates)):
                raise ValueError(f"task {self.name!r}: grid {name!r} must rise: {rates}")
        sizes = {len(rates) for rates in self.grids.values()}
        if len(sizes) != 1:
            raise ValueError(
                f"task {self.name!r}: every grid of learning rates must be as large: {sizes}"
            )
        if not self.config.data.hold_out:
            raise ValueError(
                f"task {self.name!r}: data.hold_out must be set, for rows to choose rates on that"
                " are not those of the final measurement"
            )

    def rates(self, arm: "ArmSettings") -> tuple[float, ...]:
        """The grid of an arm on this task.

        Raises:
          ValueError: there is no grid of that name.
        """
        return self._grid(arm.grid)

    def _grid(self, name: str) -> tuple[float, ...]:
        if name not in self.grids:
            raise ValueError(
                f"task {self.name!r} has no grid {name!r} of learning rates; it has"
                f" {', '.join(sorted(self.grids))}"
            )
        return self.grids[name]

    def rotation_rate(self, arm: "ArmSettings") -> float:
        """The rotation branch's rate as a share of the arm's.

        Raises:
          ValueError: it is not the same all along the two grids; one program serves an arm.
        """
        if not arm.rotation_grid:
            return 1.0
        shares = [
            theirs / rate
            for theirs, rate in zip(self._grid(arm.rotation_grid), self.rates(arm), strict=True)
        ]
        if max(shares) > (1 + 1e-6) * min(shares):
            raise ValueError(
                f"task {self.name!r}: grids {arm.grid!r} and {arm.rotation_grid!r} must be in one"
                f" proportion, but are in {shares}"
            )
        return float(f"{shares[0]:.6g}")

    def run_config(self, arm: "ArmSettings", *, learning_rate: float, seed: int) -> RunConfig:
        """The configuration of one run of an arm."""
        mapping = self.config.to_dict()
        mapping["seed"] = seed
        mapping["train"]["learning_rate"] = learning_rate
        mapping["method"] |= arm.method
        mapping["mixing"] |= {"rotation_rate": self.rotation_rate(arm), **arm.mixing}
        return RunConfig.from_mapping(mapping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """One thing that is compared: a method with its settings, and the rates it may have.

    Attributes:
      name: in cells' names.
      title: on the page.
      method: settings of `method`, the name included.
      mixing: settings of `mixing`, for the hybrid.
      grid: which of a task's grids its rate is chosen from.
      rotation_grid: for the hybrid, the grid of the rotation branch's rate, which is taken from the
        same place; empty for one rate for both branches.
      ablation: whether it varies the hybrid rather than being a method of its own.
    """

    name: str
    title: str
    method: Mapping[str, Any]
    mixing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: str
    rotation_grid: str = ""
    ablation: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """A whole study.

    Attributes:
      name: of the study.
      title: on the page.
      tasks: what is learned.
      arms: what is compared.
      hybrid: the arm whose claim is tested; empty for a study that compares methods and has none.
      branches: the arms of the hybrid's branches alone; the better of them is its measure.
      tune_seed: of the runs that learning rates are chosen by; not among `seeds`.
      seeds: of the runs that are measured.
      about: paragraphs for the page.

    Raises:
      ValueError: names are not unique or not known, or grids differ in size.
    """

    name: str
    title: str
    tasks: tuple[TaskSettings, ...]
    arms: tuple[ArmSettings, ...]
    hybrid: str = ""
    branches: tuple[str, ...] = ()
    tune_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    about: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, items in (("task", self.tasks), ("arm", self.arms)):
            names = [item.name for item in items]
            if not names or len(set(names)) < len(names):
                raise ValueError(f"the {what}s' names must differ, and there must be one: {names}")
        sizes = {len(task.rates(arm)) for task in self.tasks for arm in self.arms}
        if len(sizes) != 1:
            raise ValueError(f"every arm's grid of learning rates must be as large: {sizes}")
        for task in self.tasks:
            for arm in self.arms:
                task.rotation_rate(arm)
        self._check_hybrid()
        for task in self.tasks:
            for name in task.arms:
                self.arm(name)
        if self.tune_seed in self.seeds:
            raise ValueError(f"tune_seed {self.tune_seed} is among the seeds {self.seeds}")
        if len(self.seeds) < 2:
            raise ValueError("a standard deviation needs at least two seeds")

    def _check_hybrid(self) -> None:
        for name in self.branches:
            self.arm(name)
        if not self.hybrid:
            ablations = [arm.name for arm in self.arms if arm.ablation]
            if self.branches or ablations:
                raise ValueError(
                    f"hybrid names no arm, but branches is {self.branches} and the ablations are"
                    f" {ablations}: name the hybrid they belong to, or leave them out"
                )
            return
        method = self.arm(self.hybrid).method.get("name")
        mixed = [name for name, known in METHODS.items() if known.branches]
        if method not in mixed:
            raise ValueError(
                f"hybrid is the arm {self.hybrid!r}, whose method is {method!r}; it must be an arm"
                f" of a method that mixes branches ({', '.join(mixed)}), or empty for a study"
                " without one"
            )
        if not self.branches:
            raise ValueError(
                f"branches is empty: name the arms that the hybrid {self.hybrid!r} is measured by"
            )

    def arms_of(self, task: TaskSettings) -> tuple[ArmSettings, ...]:
        """The arms that are run on a task."""
        return tuple(arm for arm in self.arms if not task.arms or arm.name in task.arms)

    def arm(self, name: str) -> ArmSettings:
        """The arm of that name.

        Raises:
          ValueError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"there is no arm {name!r}; known: {[arm.name for arm in self.arms]}")


def digest(config: RunConfig, task: TaskSettings) -> str:
    """A short name of everything that decides a cell's numbers."""
    mapping = config.to_mapping()
    for section in ("logging", "checkpoint", "evaluate", "export", "parallel"):
        del mapping[section]
    if not config.spec.method.branches:
        del mapping["mixing"]
    # Where a file lies does not matter, and what it is called does.
    for section, name in (("model", "path"), ("data", "path")):
        mapping[section][name] = Path(mapping[section][name]).name
    rest = [dict(task.test), Path(task.own_text).name, task.own_texts]
    text = json.dumps([mapping, rest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
