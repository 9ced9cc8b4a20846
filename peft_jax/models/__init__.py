"""Causal language models from Hugging Face configurations, as pure functions of their parameters.

- [`registry`][peft_jax.models.registry]: `build_model`, from a `config.json` to a `CausalLM`.
- [`causal_lm`][peft_jax.models.causal_lm]: `CausalLM`, the handle everything else uses.
- [`execution`][peft_jax.models.execution]: `ExecutionSettings`, how a model is computed.
- [`cache`][peft_jax.models.cache]: `KVCache`, for decoding.
- [`naming`][peft_jax.models.naming]: `HFTensor`, which checkpoint tensor a leaf is.
"""

from peft_jax.models.cache import KVCache
from peft_jax.models.causal_lm import CausalLM, quantise_params
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.naming import HFTensor
from peft_jax.models.registry import FAMILIES, build_model

__all__ = [
    "FAMILIES",
    "CausalLM",
    "ExecutionSettings",
    "HFTensor",
    "KVCache",
    "build_model",
    "quantise_params",
]
