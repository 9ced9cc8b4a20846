r"""The checkpoint in assets/tiny_world, made again from nothing.

    python examples/tiny_world.py stories --rows=120000 --out=out/tiny_world/stories.jsonl
    peft-jax train --config=pretrain_tiny.py --workdir=runs/pretrain_tiny

Full training of a small Llama from random weights on text that the project makes itself; what comes
of it is a checkpoint in Hugging Face's format in `runs/pretrain_tiny/model`. About twenty minutes
on two cores. The architecture is that of `assets/tiny_world/config.json`, whose weights are not
read.
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
