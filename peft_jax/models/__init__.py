"""Builds language models from Hugging Face configurations, as pure functions of parameters.

- [`registry`][peft_jax.models.registry]: `build_model`: a `CausalLM` from a `config.json`.
- [`causal_lm`][peft_jax.models.causal_lm]: `CausalLM`: decoder-only language models.
- [`classifier`][peft_jax.models.classifier]: `SequenceClassifier`, `build_classifier`: encoders.
- [`model`][peft_jax.models.model]: `Model`, the base class of both.
- [`trainable`][peft_jax.models.trainable]: `TrainableModel`, what training needs of any model.
- [`execution`][peft_jax.models.execution]: `ExecutionSettings`: dtype, remat, kernels.
- [`cache`][peft_jax.models.cache]: `KVCache`, for decoding.
- [`naming`][peft_jax.models.naming]: `HFTensor`: a leaf's tensor in a checkpoint.
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
from peft_jax.models.trainable import TrainableModel

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "CausalLM",
    "ExecutionSettings",
    "HFTensor",
    "KVCache",
    "Model",
    "SequenceClassifier",
    "TrainableModel",
    "build_classifier",
    "build_model",
    "is_encoder",
    "quantization_of",
    "quantize_params",
]
