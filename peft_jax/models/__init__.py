"""Language models from Hugging Face configurations, as pure functions of their parameters.

- [`registry`][peft_jax.models.registry]: `build_model`, from a `config.json` to a `CausalLM`.
- [`causal_lm`][peft_jax.models.causal_lm]: `CausalLM`, the handle everything else uses.
- [`classifier`][peft_jax.models.classifier]: `SequenceClassifier`, `build_classifier`: encoders.
- [`model`][peft_jax.models.model]: `Model`, what both kinds have in common.
- [`execution`][peft_jax.models.execution]: `ExecutionSettings`, how a model is computed.
- [`cache`][peft_jax.models.cache]: `KVCache`, for decoding.
- [`naming`][peft_jax.models.naming]: `HFTensor`, which checkpoint tensor a leaf is.
"""

from peft_jax.models.cache import KVCache
from peft_jax.models.causal_lm import CausalLM
from peft_jax.models.classifier import (
    ENCODERS,
    SequenceClassifier,
    build_classifier,
    is_encoder,
)
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.model import Model, quantization_of, quantize_params
from peft_jax.models.naming import HFTensor
from peft_jax.models.registry import FAMILIES, build_model

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "CausalLM",
    "ExecutionSettings",
    "HFTensor",
    "KVCache",
    "Model",
    "SequenceClassifier",
    "build_classifier",
    "build_model",
    "is_encoder",
    "quantization_of",
    "quantize_params",
]
