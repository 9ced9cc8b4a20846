r"""Fine-tunes BLOOMZ 7B1 on 16 chips of TPU v5e.

    peft-jax train --config=hybrid_7b.py --distributed --workdir=/mnt/bucket/runs/7b \
        --config.model.path=/path/to/bloomz-7b1 --config.data.path=rows.jsonl

Run this on every host, with a bucket mounted at the same path (docs/pods.md). Plan the run first,
on any machine and without the checkpoint:

    peft-jax train --config=hybrid_7b.py --plan --topology=v5e:4x4

The argument selects another method: `configs/hybrid_7b.py:method=lora`.
"""

from ml_collections import ConfigDict

from peft_jax.adapters import METHODS
from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid")
    config = config_files.large_model(options.method)
    config.model.path = "bigscience/bloomz-7b1"
    config.model.architecture = "bloomz-7b1"
    config.train.batch_size = 64
    config.train.max_length = 2048
    config.parallel.fsdp = 16
    # The fastest layouts that fit (docs/planning.md).
    full = METHODS[options.method].trains_base
    config.execution.remat = "full" if full else "dots"
    config.train.gradient_accumulation = 2 if full else 4
    return config
