r"""Follows PEFT's comparison of methods: Llama-3.2-3B on MetaMathQA, tested on GSM8K.

    python -m eval.metamath --config=metamath.py:lora --workdir=runs/metamath/lora

The argument selects the method by its name, and takes the settings that the published experiment of
that method has. The protocol is huggingface/peft, method_comparison/MetaMathQA at commit
5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40: default_training_params.json for the settings of all
methods, experiments/ for those of each. docs/metamath.md describes it.
"""

from typing import Any

from ml_collections import ConfigDict

from peft_jax.training import config_files

_RANK_32: dict[str, Any] = {"rank": 32, "alpha": 64.0}

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "lora": _RANK_32,
    "dora": _RANK_32,
    "loha": _RANK_32,
    "lokr": {**_RANK_32, "decompose_factor": 4},
    "boft": {"block_size": 4, "n_butterfly_factors": 1},
    "oft": {"block_size": 96},
    "miss": {"rank": 64},
    "vera": {"rank": 256},
}
"""Settings of `method` of the published experiments, by method. Others have their defaults."""

LEARNING_RATES = {"lokr": 3e-3, "vera": 1e-3, "full": 1e-5}
"""Learning rates of the published experiments, where they are not 1e-4."""

WEIGHT_DECAYS = {"vera": 0.01, "full": 0.01}
"""Weight decays of the published experiments, where they are not 0.1."""

OURS: dict[str, dict[str, Any]] = {
    "lora_fa": _RANK_32,
    "lora_ga": _RANK_32,
    "lora_one": _RANK_32,
    "eva": _RANK_32,
    "pissa": _RANK_32,
    "olora": _RANK_32,
    "hybrid": {"rank": 24, "alpha": 48.0},
    "unitary": {},
}
"""Settings of methods without a published experiment, whose learning rates are the methods'."""


def get_config(arg: str = "") -> ConfigDict:
    options = config_files.parse_arg(arg, method="lora", precision="bfloat16")
    config = config_files.base(method=options.method, precision=options.precision)
    config.model.path = "meta-llama/Llama-3.2-3B"
    if options.method not in ("full", "ln_tuning"):
        config.method.target_modules = "q_proj,v_proj"
    for name, value in (EXPERIMENTS | OURS).get(options.method, {}).items():
        config.method[name] = value
    if options.method not in OURS:
        config.train.learning_rate = LEARNING_RATES.get(options.method, 1e-4)
    config.data.recipe = "metamath"
    config.data.shuffle = False
    config.data.packing = False
    config.train.steps = 5000
    config.train.batch_size = 4
    config.train.max_length = 768
    config.optimizer.weight_decay = WEIGHT_DECAYS.get(options.method, 0.1)
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_ratio = 0.1
    config.evaluate.every = 250
    # As in the published runs: four rows are not enough for several devices.
    config.parallel.devices = 1
    return config
