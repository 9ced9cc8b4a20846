r"""Teaches the small checkpoint in assets/tiny_world to answer questions, as a demo.

    peft-jax train --config=demo.py --workdir=runs/demo

The base model was pretrained on stories and songs, without any questions. A few hundred steps of
the hybrid teach it to answer them. `make demo` runs this, and shows answers before and after. The
argument selects another method: `configs/demo.py:lora`.
"""

from ml_collections import ConfigDict

from peft_jax.adapters import METHODS
from peft_jax.training import config_files

LEARNING_RATES = {
    "full": 1e-3,
    "lora": 2e-3,
    "lora_ga": 2e-3,
    "boft": 1e-2,
    "unitary": 1e-2,
    "hybrid": 2e-3,
}
"""Rates of some methods for this tiny model; the others take ten times their default."""


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid", steps=200)
    config = config_files.base(method=options.method, precision="float32")
    config.model.path = "assets/tiny_world"
    config.data.recipe = "chat"
    config.data.path = "assets/tiny_world_questions"
    config.train.steps = options.steps
    config.train.batch_size = 16
    config.train.max_length = 256
    default = 10 * METHODS[options.method].learning_rate
    config.train.learning_rate = LEARNING_RATES.get(options.method, default)
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.05
    config.evaluate.every = 100
    config.checkpoint.every = 100
    return config
