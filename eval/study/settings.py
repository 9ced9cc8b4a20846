"""Defines the settings of a study."""

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

_TRAINING = 2
"""Version of what the settings mean. It is raised when the same settings train differently, so that
older cells are not taken for today's. 2: branches are clipped apart, and evidence is taken before
their rates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Task of a study: a model, and data for training, tuning and testing.

    Attributes:
      name: Name in the names of cells.
      title: Title on the page.
      config: Configuration of a run, without a method. Its held-out rows are taken from the
        training rows (`data.hold_out`), and serve only to choose learning rates.
      test: Settings of `data` that give the test rows, in place of `hold_out`.
      metric: Name of the recipe's metric for the page; empty: none.
      own_text: File with one text per line that the base model knows, to measure forgetting;
        empty: text that a causal base model generates.
      own_texts: Number of these texts.
      arms: Names of the arms that run on the task; empty: all.
      grids: Increasing learning rates to choose from, by name. All grids have the same size. Arms
        name their grid, because methods need different rates.
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
                raise ValueError(
                    f"task {self.name!r}: grid {name!r} is {rates} but must be increasing"
                )
        sizes = {len(rates) for rates in self.grids.values()}
        if len(sizes) != 1:
            raise ValueError(
                f"task {self.name!r}: grids have {sorted(sizes)} learning rates but must all have"
                " the same number"
            )
        if not self.config.data.hold_out:
            raise ValueError(
                f"task {self.name!r}: data.hold_out is {self.config.data.hold_out} but must be set,"
                " so that learning rates are not chosen on test rows"
            )

    def rates(self, arm: "ArmSettings") -> tuple[float, ...]:
        """Returns the grid of an arm on this task.

        Raises:
          ValueError: There is no grid of that name.
        """
        return self._grid(arm.grid)

    def _grid(self, name: str) -> tuple[float, ...]:
        if name not in self.grids:
            raise ValueError(
                f"task {self.name!r} has no grid {name!r}; known: {', '.join(sorted(self.grids))}"
            )
        return self.grids[name]

    def rotation_rate(self, arm: "ArmSettings") -> float:
        """Returns the ratio of the rotation branch's learning rate to the arm's.

        Raises:
          ValueError: The ratio is not constant over the two grids, which one program needs.
        """
        if not arm.rotation_grid:
            return 1.0
        shares = [
            theirs / rate
            for theirs, rate in zip(self._grid(arm.rotation_grid), self.rates(arm), strict=True)
        ]
        if max(shares) > (1 + 1e-6) * min(shares):
            raise ValueError(
                f"task {self.name!r}: the ratios of grids {arm.rotation_grid!r} and {arm.grid!r}"
                f" are {shares} but must be constant"
            )
        return float(f"{shares[0]:.6g}")

    def run_config(self, arm: "ArmSettings", *, learning_rate: float, seed: int) -> RunConfig:
        """Returns the configuration of one run of an arm."""
        mapping = self.config.to_dict()
        mapping["seed"] = seed
        mapping["train"]["learning_rate"] = learning_rate
        mapping["method"] |= arm.method
        mapping["mixing"] |= {"rotation_rate": self.rotation_rate(arm), **arm.mixing}
        return RunConfig.from_mapping(mapping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """Arm of a study: a method with its settings, and its grid of learning rates.

    Attributes:
      name: Name in the names of cells.
      title: Title on the page.
      method: Settings of `method`, including its name.
      mixing: Settings of `mixing`, for the hybrid.
      grid: Name of the grid that its learning rate is chosen from.
      rotation_grid: For the hybrid, name of the grid of the rotation branch's learning rate, which
        has the same index in its grid; empty: one rate for both branches.
      ablation: Whether it is a variant of the hybrid.
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
    """Settings of a study.

    Attributes:
      name: Name of the study.
      title: Title of the page.
      tasks: Tasks.
      arms: Arms to compare.
      hybrid: Name of the arm that is tested against its branches; empty: none.
      branches: Names of the arms of the hybrid's single branches; the better one is the baseline.
      tune_seed: Seed of the cells that learning rates are chosen by; not among `seeds`.
      seeds: Seeds of the measured cells.
      about: Paragraphs for the page.

    Raises:
      ValueError: Names are duplicate or unknown, or grids differ in size.
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
                raise ValueError(
                    f"the names of {what}s are {names} but must be at least one, without duplicates"
                )
        sizes = {len(task.rates(arm)) for task in self.tasks for arm in self.arms}
        if len(sizes) != 1:
            raise ValueError(
                f"the arms' grids have {sorted(sizes)} learning rates but must all have the same"
                " number"
            )
        for task in self.tasks:
            for arm in self.arms:
                task.rotation_rate(arm)
        self._check_hybrid()
        for task in self.tasks:
            for name in task.arms:
                self.arm(name)
        if self.tune_seed in self.seeds:
            raise ValueError(
                f"tune_seed is {self.tune_seed} but must not be among the seeds {self.seeds}"
            )
        if len(self.seeds) < 2:
            raise ValueError(
                f"seeds is {self.seeds} but must have at least two, for a standard deviation"
            )

    def _check_hybrid(self) -> None:
        for name in self.branches:
            self.arm(name)
        if not self.hybrid:
            ablations = [arm.name for arm in self.arms if arm.ablation]
            if self.branches or ablations:
                raise ValueError(
                    f"hybrid is empty, but branches is {self.branches} and the ablations are"
                    f" {ablations}; name the hybrid that they belong to, or omit them"
                )
            return
        method = self.arm(self.hybrid).method.get("name")
        mixed = [name for name, known in METHODS.items() if known.branches]
        if method not in mixed:
            raise ValueError(
                f"hybrid is the arm {self.hybrid!r}, whose method is {method!r}; it must be an arm"
                f" of a method that mixes branches ({', '.join(mixed)}), or empty"
            )
        if not self.branches:
            raise ValueError(
                f"branches is empty; name the arms that the hybrid {self.hybrid!r} is compared with"
            )

    def arms_of(self, task: TaskSettings) -> tuple[ArmSettings, ...]:
        """Returns the arms that run on a task."""
        return tuple(arm for arm in self.arms if not task.arms or arm.name in task.arms)

    def arm(self, name: str) -> ArmSettings:
        """Returns the arm of the given name.

        Raises:
          ValueError: There is no such arm.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"there is no arm {name!r}; known: {[arm.name for arm in self.arms]}")


def digest(config: RunConfig, task: TaskSettings) -> str:
    """Returns a digest of all settings that determine a cell's measurements."""
    mapping = config.to_mapping()
    for section in ("logging", "checkpoint", "evaluate", "export", "parallel"):
        del mapping[section]
    if not config.spec.method.branches:
        del mapping["mixing"]
    # Only the name of a file counts, so that files can be moved.
    for section, name in (("model", "path"), ("data", "path")):
        mapping[section][name] = Path(mapping[section][name]).name
    rest = [dict(task.test), Path(task.own_text).name, task.own_texts, _TRAINING]
    text = json.dumps([mapping, rest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
