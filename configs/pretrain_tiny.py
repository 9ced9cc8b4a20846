r"""Pretrains the checkpoint in assets/tiny_world from random weights.

    python examples/tiny_world.py stories --rows=120000 --out=out/tiny_world/stories.jsonl
    peft-jax train --config=pretrain_tiny.py --workdir=runs/pretrain_tiny

This trains a small Llama on text that the project generates. The result is a checkpoint in Hugging
Face format in `runs/pretrain_tiny/model`. It takes about twenty minutes on two cores. The
architecture is that of `assets/tiny_world/config.json`, whose weights are not read.
"""

from ml_collections import ConfigDict

from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, steps=12000)
    config = config_files.base(method="full", precision="float32")
    config.model.path = "assets/tiny_world"
    config.model.weights = "random"
    config.data.recipe = "text"
    config.data.path = "out/tiny_world/stories.jsonl"
    config.data.hold_out = 256
    config.train.steps = options.steps
    config.train.batch_size = 4
    config.train.max_length = 256
    config.train.learning_rate = 3e-3
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.02
    config.evaluate.every = 1000
    config.checkpoint.every = 1000
    config.logging.every = 10
    return config
