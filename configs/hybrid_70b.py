r"""Fine-tunes Llama 3.3 70B on 64 chips of TPU v5p.

    peft-jax train --config=hybrid_70b.py --distributed --workdir=/mnt/bucket/runs/70b \
        --config.model.path=/path/to/Llama-3.3-70B-Instruct --config.data.path=rows.jsonl

Run this on every host, with a bucket mounted at the same path (docs/pods.md). Plan the run first,
on any machine and without the checkpoint:

    peft-jax train --config=hybrid_70b.py --plan --topology=v5p:4x4x4

The argument selects another method: `configs/hybrid_70b.py:method=lora`.
"""

from ml_collections import ConfigDict

from peft_jax.adapters import METHODS
from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid")
    config = config_files.large_model(options.method)
    config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
    config.model.architecture = "llama-3.3-70b"
    config.train.batch_size = 64
    config.train.max_length = 4096
    # The fastest layouts found (docs/planning.md). Full fine-tuning has no memory for rows with all
    # of their features.
    full = METHODS[options.method].trains_base
    config.parallel.fsdp = 32 if full else 64
    config.parallel.tensor = 2 if full else 1
    config.execution.remat = "products"
    config.train.gradient_accumulation = 1
    return config
