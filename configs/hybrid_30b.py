r"""Fine-tunes Wizard-Vicuna 30B on 32 chips of TPU v5p.

    peft-jax train --config=hybrid_30b.py --distributed --workdir=/mnt/bucket/runs/30b \
        --config.model.path=/path/to/Wizard-Vicuna-30B --config.data.path=rows.jsonl

Run this on every host, with a bucket mounted at the same path (docs/pods.md). Plan the run first,
on any machine and without the checkpoint:

    peft-jax train --config=hybrid_30b.py --plan --topology=v5p:2x4x4

The argument selects another method: `configs/hybrid_30b.py:method=lora`. The model's 52 heads can
be sharded over at most 4 devices of "tensor", because the next divisors are 13 and 26.
"""

from ml_collections import ConfigDict

from peft_jax.training import config_files


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="hybrid")
    config = config_files.large_model(options.method)
    config.model.path = "QuixiAI/Wizard-Vicuna-30B-Uncensored"
    config.model.architecture = "wizard-vicuna-30b"
    config.train.batch_size = 64
    config.train.max_length = 2048
    config.parallel.fsdp = 32
    # The fastest layout found, for all methods (docs/planning.md).
    config.execution.remat = "products"
    config.train.gradient_accumulation = 1
    return config
