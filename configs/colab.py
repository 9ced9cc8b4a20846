r"""Fine-tunes Qwen2.5 1.5B on the one chip of a free Colab runtime: a TPU v5e, or a GPU.

    peft-jax train --config=colab.py --workdir=runs/colab --config.data.path=rows.jsonl

Plan the run first, on any machine and without the checkpoint:

    peft-jax train --config=colab.py --plan --topology=v5e:1x1

The argument selects another method: `configs/colab.py:method=lora`.
"""

from ml_collections import ConfigDict

from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid")
    config = config_files.base(method=options.method)
    config.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    config.model.architecture = "qwen2.5-1.5b"
    config.data.recipe = "alpaca"
    config.execution.remat = "full"
    config.train.steps = 500
    config.train.batch_size = 16
    config.train.gradient_accumulation = 4
    config.train.max_length = 1024
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.03
    config.evaluate.every = 100
    config.checkpoint.every = 50
    return config
