"""Checks that the arms at the budget have equally many trainable parameters."""

from typing import TYPE_CHECKING

from peft_jax.adapters import count_parameters
from peft_jax.hub import find_folder
from peft_jax.training.prepare import build_base, train_head

from .settings import StudySettings, TaskSettings
from .trials import Trial

if TYPE_CHECKING:
    from peft_jax.models import Model

TOLERANCE = 0.01
"""Largest relative difference between arms at the budget."""


def check_budget(study: StudySettings, task: TaskSettings) -> None:
    """Raises ValueError unless the arms at the budget agree within `TOLERANCE` on a task."""
    sizes = trainable_sizes(study, task)
    budget = {arm.name: sizes[arm.name] for arm in study.arms_of(task) if arm.at_budget}
    if budget and max(budget.values()) > (1 + TOLERANCE) * min(budget.values()):
        listing = ", ".join(f"{name} {size:,}" for name, size in budget.items())
        raise ValueError(
            f"task {task.name!r}: the arms at the budget have {listing} trainable parameters, but"
            f" they must agree within {TOLERANCE:.0%}; change their ranks, rank_pattern or block"
            " sizes in the task's methods"
        )


def trainable_sizes(study: StudySettings, task: TaskSettings) -> dict[str, int]:
    """Returns each arm's number of trainable parameters, without loading the model."""
    sizes = {}
    model: Model | None = None
    for arm in study.arms_of(task):
        config = task.run_config(arm, Trial(1.0), seed=0)
        if model is None:
            model = build_base(find_folder(config.model.path), config)
        params = model.abstract_params()
        spec = train_head(config.spec, model)
        sizes[arm.name] = count_parameters(spec, params, spec.abstract(params)).trainable
    return sizes
