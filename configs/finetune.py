r"""Fine-tunes any supported checkpoint, on any data, with any method.

    peft-jax train --config=finetune.py:hybrid --workdir=runs/gsm8k \
        --config.model.path=/path/to/checkpoint --config.data.recipe=gsm8k

The argument selects the method by its name: hybrid, lora, dora, full, … After a comma, it selects
the precision of the base model: `configs/finetune.py:lora,precision=float32` for a CPU.
Flags change any setting: `--config.method.rank=16`, `--config.train.learning_rate=1e-4`.
"""

from ml_collections import ConfigDict

from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid", precision="bfloat16")
    config = config_files.base(method=options.method, precision=options.precision)
    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.max_length = 1024
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.03
    config.evaluate.every = 200
    config.checkpoint.every = 100
    return config
