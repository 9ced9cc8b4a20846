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

from .trials import Grid, Trial

_TRAINING = 3
"""Version of what the settings mean. It is raised when the same settings train or measure
differently, so that older cells are not taken for today's. 2: branches are clipped apart, and
evidence is taken before their rates. 3: trials have a scale of the attention."""

SINCE_THEN: Mapping[str, Any] = {
    "execution.async_collectives": True,
    "method.bias": "none",
    "method.share_experts": False,
    "method.trainable_token_indices": [],
    "optimizer.b3": None,
    "optimizer.clusters": None,
    "optimizer.recluster_ratio": None,
    "optimizer.damping": None,
}
"""Settings added after cells were committed, by dotted name, with the value that means what was
done before. A setting with that value is not part of a digest, so that the cells stay valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Task of a study: a model, and data for training, tuning and testing.

    Attributes:
      name: Name in the names of cells.
      title: Title on the page.
      config: Configuration of a run, without a method. Its held-out rows are taken from the
        training rows (`data.hold_out`), and serve only to choose trials and to draw curves.
      test: Settings of `data` that give the test rows, in place of `hold_out`.
      grids: Increasing learning rates to choose from, by name. All grids have the same size. Arms
        name their grid, because methods need different rates.
      scales: Increasing factors on the learning rate of the attention, tried with each rate.
      attention: Path component of the attention's arrays: "self_attn" in a Llama,
        "self_attention" in BLOOM, "attention" in BERT.
      arms: Names of the arms that run on the task; empty: all.
      timed: Names of further arms whose steps are timed, and whose memory is counted, without
        training them: full fine-tuning of a model that is too large for it.
      methods: Settings of `method` on this task by arm, which replace those of the arm, for example
        a `rank_pattern` that meets the budget.
      mixing: Settings of `mixing` on this task, below those of the arm.
      seeds: Seeds of the measured cells; empty: those of the study.
      tune_steps: Steps of a tuning run, over which its schedule extends; None: those of `config`.
      curve_rows: Number of the tuning rows whose loss is measured during a measured run.
      curve_points: Number of these measurements, evenly spaced over the steps.
      metric: Name of the recipe's metric for the page; empty: none.
      model: Name of the model in digests, so that cells of a local copy and of the hub's model are
        the same; empty: the last part of its path.
      own_text: File with one text per line that the base model knows, to measure forgetting;
        empty: text that a causal base model generates.
      own_texts: Number of these texts.
      about: Sentences for the page.
    """

    name: str
    title: str
    config: ConfigDict
    test: Mapping[str, Any]
    grids: Mapping[str, tuple[float, ...]]
    scales: tuple[float, ...] = (0.25, 1.0, 4.0)
    attention: str = "self_attn"
    arms: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()
    methods: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    mixing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    tune_steps: int | None = None
    curve_rows: int = 32
    curve_points: int = 10
    metric: str = ""
    model: str = ""
    own_text: str = ""
    own_texts: int = 64
    about: str = ""

    def __post_init__(self) -> None:
        for name in ("own_texts", "curve_rows", "curve_points"):
            check_positive_int(name, getattr(self, name))
        for name, values in {**self.grids, "scales": self.scales}.items():
            for value in values:
                check_positive(f"grids[{name!r}]" if name in self.grids else name, value)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(
                    f"task {self.name!r}: {name} is {tuple(values)} but must be increasing, with at"
                    " least one value"
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
        if self.tune_steps is not None:
            check_positive_int("tune_steps", self.tune_steps)
            steps = self.config.train.steps
            if steps is None or self.tune_steps > steps:
                raise ValueError(
                    f"task {self.name!r}: tune_steps is {self.tune_steps} but must be at most"
                    f" train.steps, which is {steps}"
                )

    def rates(self, arm: "ArmSettings") -> tuple[float, ...]:
        """Returns the learning rates of an arm's grid on this task.

        Raises:
          ValueError: There is no grid of that name.
        """
        if arm.grid not in self.grids:
            raise ValueError(
                f"task {self.name!r} has no grid {arm.grid!r}; known:"
                f" {', '.join(sorted(self.grids))}"
            )
        return tuple(self.grids[arm.grid])

    def run_config(
        self, arm: "ArmSettings", trial: Trial, *, seed: int, final: bool = True
    ) -> RunConfig:
        """Returns the configuration of one run of an arm.

        Args:
          arm: Arm to train.
          trial: Learning rate and scale of the attention.
          seed: Seed of the run.
          final: Whether it is a measured run and not a tuning run, which may be shorter.
        """
        mapping = self.config.to_dict()
        mapping["seed"] = seed
        mapping["train"]["learning_rate"] = trial.rate
        if not final and self.tune_steps is not None:
            mapping["train"]["steps"] = self.tune_steps
        mapping["method"] |= {**arm.method, **self.methods.get(arm.name, {})}
        if arm.mixes:
            mapping["mixing"] |= {**self.mixing, **arm.mixing}
        factors = {**mapping["optimizer"]["rate_factors"], **arm.rate_factors}
        factors[self.attention] = factors.get(self.attention, 1.0) * trial.scale
        mapping["optimizer"]["rate_factors"] = factors
        return RunConfig.from_mapping(mapping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """Arm of a study: a method with its settings, and its grid of learning rates.

    Attributes:
      name: Name in the names of cells.
      title: Title on the page.
      method: Settings of `method`, including its name.
      mixing: Settings of `mixing`, for the hybrid.
      rate_factors: Settings of `optimizer.rate_factors`; `{"b": 16}` is LoRA+.
      grid: Name of the grid that its learning rate is chosen from.
      at_budget: Whether its number of trainable parameters must equal that of the other arms at the
        budget, within 1%.
      variant: Whether it is a variant of the hybrid, which runs after the other arms.
    """

    name: str
    title: str
    method: Mapping[str, Any]
    mixing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    grid: str
    at_budget: bool = False
    variant: bool = False

    @property
    def mixes(self) -> bool:
        """Returns whether the method has branches to mix."""
        known = METHODS.get(self.method.get("name", ""))
        return bool(known and known.branches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """Names of the arms that the page compares; empty: there is no such arm.

    Attributes:
      hybrid: The hybrid with its default settings.
      branches: The hybrid's single branches at its size. The contrast of the study is the hybrid
        against the one with the lower loss on tuning rows.
      full: Full fine-tuning.
      lora: Plain LoRA.
      paper_rule: The hybrid with the rule of the paper.
      unmixed: The hybrid without mixing.
      unitary: The unitary adapter alone.
      frozen_rotation: The hybrid whose rotation is frozen at its start.
    """

    hybrid: str = ""
    branches: tuple[str, ...] = ()
    full: str = ""
    lora: str = ""
    paper_rule: str = ""
    unmixed: str = ""
    unitary: str = ""
    frozen_rotation: str = ""

    def named(self) -> dict[str, str]:
        """Returns the names by role, without empty ones."""
        single = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "branches"
        }
        single |= {f"branches[{at}]": name for at, name in enumerate(self.branches)}
        return {role: name for role, name in single.items() if name}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study.

    Attributes:
      name: Name of the study.
      title: Title of the page.
      tasks: Tasks.
      arms: Arms to compare.
      roles: Which arm is which.
      tune_seed: Seed of the tuning runs; not among the seeds of any task.
      seeds: Seeds of the measured cells, of tasks that name none.
      extensions: Largest number of trials of an arm outside its grid.
      about: Paragraphs for the page.

    Raises:
      ValueError: Names are duplicate or unknown, or grids differ in size.
    """

    name: str
    title: str
    tasks: tuple[TaskSettings, ...]
    arms: tuple[ArmSettings, ...]
    roles: Roles = dataclasses.field(default_factory=Roles)
    tune_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    extensions: int = 4
    about: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, items in (("task", self.tasks), ("arm", self.arms)):
            names = [item.name for item in items]
            if not names or len(set(names)) < len(names):
                raise ValueError(
                    f"the names of {what}s are {names} but must be at least one, without duplicates"
                )
        if self.extensions < 0:
            raise ValueError(f"extensions is {self.extensions} but must be at least 0")
        for task in self.tasks:
            for name in (*task.arms, *task.timed, *task.methods):
                self.arm(name)
        self._check_trials()
        self._check_roles()
        for task in self.tasks:
            seeds = self.seeds_of(task)
            if self.tune_seed in seeds:
                raise ValueError(
                    f"tune_seed is {self.tune_seed} but must not be among the seeds {seeds}"
                )
            if len(set(seeds)) < max(2, len(seeds)):
                raise ValueError(
                    f"seeds is {seeds} but must have at least two, without duplicates, for a"
                    " standard deviation"
                )

    def _check_trials(self) -> None:
        """Raises ValueError unless all arms of the study have the same number of trials."""
        sizes = {
            len(task.rates(arm)) * len(task.scales)
            for task in self.tasks
            for arm in self.arms_of(task)
        }
        if len(sizes) != 1:
            raise ValueError(
                f"the arms have {sorted(sizes)} trials but must all have the same number"
            )

    def _check_roles(self) -> None:
        for name in self.roles.named().values():
            self.arm(name)
        hybrid = self.roles.hybrid
        if not hybrid:
            variants = [arm.name for arm in self.arms if arm.variant]
            if self.roles.branches or variants:
                raise ValueError(
                    f"roles.hybrid is empty, but roles.branches is {self.roles.branches} and the"
                    f" variants are {variants}; name the hybrid that they belong to, or omit them"
                )
            return
        if not self.arm(hybrid).mixes:
            mixed = [name for name, known in METHODS.items() if known.branches]
            raise ValueError(
                f"roles.hybrid is the arm {hybrid!r}, whose method is"
                f" {self.arm(hybrid).method.get('name')!r}; it must be an arm of a method that"
                f" mixes branches ({', '.join(mixed)}), or empty"
            )
        if not self.roles.branches:
            raise ValueError(
                f"roles.branches is empty; name the arms that the hybrid {hybrid!r} is compared"
                " with"
            )

    def arms_of(self, task: TaskSettings) -> tuple[ArmSettings, ...]:
        """Returns the arms that run on a task."""
        return tuple(arm for arm in self.arms if not task.arms or arm.name in task.arms)

    def timed_on(self, task: TaskSettings) -> tuple[ArmSettings, ...]:
        """Returns the arms whose steps are timed on a task."""
        arms = self.arms_of(task)
        return (*arms, *(arm for arm in self.arms if arm.name in task.timed and arm not in arms))

    def seeds_of(self, task: TaskSettings) -> tuple[int, ...]:
        """Returns the seeds of the measured cells of a task."""
        return tuple(task.seeds or self.seeds)

    def grid(self, task: TaskSettings, arm: ArmSettings) -> Grid:
        """Returns the trials of an arm on a task."""
        return Grid(task.rates(arm), tuple(task.scales), self.extensions)

    def arm(self, name: str) -> ArmSettings:
        """Returns the arm of the given name.

        Raises:
          ValueError: There is no such arm.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"there is no arm {name!r}; known: {[arm.name for arm in self.arms]}")


def digest(config: RunConfig, task: TaskSettings, *, final: bool) -> str:
    """Returns a digest of all settings that determine a cell's measurements."""
    mapping = config.to_mapping()
    for section in ("logging", "checkpoint", "evaluate", "export", "parallel"):
        del mapping[section]
    if not config.spec.method.branches:
        del mapping["mixing"]
    # Only the name of a file counts, so that files can be moved.
    for section, name in (("model", "path"), ("data", "path")):
        mapping[section][name] = Path(mapping[section][name]).name
    mapping["model"]["path"] = task.model or mapping["model"]["path"]
    for name, before in SINCE_THEN.items():
        section, setting = name.split(".")
        if section in mapping and mapping[section].get(setting) == before:
            del mapping[section][setting]
    rest: list[Any] = [dict(task.test), _TRAINING]
    if final:
        rest += [Path(task.own_text).name, task.own_texts, task.curve_rows, task.curve_points]
    text = json.dumps([mapping, rest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
