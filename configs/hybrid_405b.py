r"""Fine-tunes Llama 3.1 405B on 128 chips of TPU v5p.

    peft-jax train --config=hybrid_405b.py --distributed --workdir=/mnt/bucket/runs/405b \
        --config.model.path=/path/to/Llama-3.1-405B-Instruct --config.data.path=rows.jsonl

Run this on every host, with a bucket mounted at the same path (docs/pods.md). Plan the run first,
on any machine and without the checkpoint:

    peft-jax train --config=hybrid_405b.py --plan --topology=v5p:4x4x8

The argument selects another method: `configs/hybrid_405b.py:method=lora`.
"""

from ml_collections import ConfigDict

from peft_jax.adapters import METHODS
from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid")
    config = config_files.large_model(options.method)
    config.model.path = "meta-llama/Llama-3.1-405B-Instruct"
    config.model.architecture = "llama-3.1-405b"
    config.train.batch_size = 64
    config.train.max_length = 4096
    # The fastest layouts found (docs/planning.md). Products that are saved by name leave memory for
    # large microbatches, which full fine-tuning's gradients and moments do not leave.
    full = METHODS[options.method].trains_base
    if full or options.method == "unitary":
        config.parallel.fsdp = 16
        config.parallel.tensor = 8
        config.execution.remat = "dots" if full else "none"
        config.train.gradient_accumulation = 4
    else:
        config.parallel.fsdp = 32
        config.parallel.tensor = 4
        config.execution.remat = "products"
        config.train.gradient_accumulation = 2
    return config
