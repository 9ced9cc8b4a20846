"""Tiny random transformers models, and the same models loaded here."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
"""Dimensions of the tiny models of the Llama family."""

GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}

CONFIGS = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text", "Gemma4": "Gemma4Text"}
"""Names of configurations that differ from those of their models."""

MODULES = {"GPT2": "GPT2LMHeadModel"}
"""Names of models that do not end in ForCausalLM."""


class TorchModel:
    """A transformers model with random weights, biases and norms, in float32."""

    def __init__(self, kind: str, settings: dict[str, Any]):
        import torch
        import transformers

        # Threads slow down models this small.
        torch.set_num_threads(1)
        # transformers adds to the rope parameters it is given.
        settings = copy.deepcopy(settings)
        config = getattr(transformers, f"{CONFIGS.get(kind, kind)}Config")(**settings)
        config._attn_implementation = "eager"
        generator = torch.Generator().manual_seed(0)
        make = getattr(transformers, MODULES.get(kind, f"{kind}ForCausalLM"))
        self.module = make(config).eval()
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1.0 + 0.2 * noise if is_scale else 0.2 * noise)
            for name, buffer in self.module.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
                if name.endswith("layer_scalar"):
                    buffer.copy_(1.0 + 0.2 * torch.randn(buffer.shape, generator=generator))

    def logits(self, tokens, *, mask=None, positions=None) -> np.ndarray:
        """Returns logits [B, T, V] of tokens [B, T]; mask 0 is padding."""
        import torch

        arguments = {"input_ids": torch.tensor(np.asarray(tokens), dtype=torch.long)}
        if mask is not None:
            arguments["attention_mask"] = torch.tensor(np.asarray(mask), dtype=torch.long)
        if positions is not None:
            arguments["position_ids"] = torch.tensor(np.asarray(positions), dtype=torch.long)
        with torch.no_grad():
            return self.module(**arguments).logits.numpy()

    def save(self, folder: Path) -> Path:
        """Saves the model in transformers' format."""
        self.module.save_pretrained(folder)
        return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Callable:
    """Returns a cached factory of (torch model, the same model here, its parameters)."""
    made: dict = {}

    def make(kind: str, **settings):
        from peft_jax.hub import load_model

        settings = {**{"Bloom": BLOOM, "GPT2": GPT2}.get(kind, LLAMA), **settings}
        key = (kind, repr(sorted(settings.items())))
        if key not in made:
            theirs = TorchModel(kind, settings)
            folder = theirs.save(tmp_path_factory.mktemp(kind))
            made[key] = (theirs, *load_model(folder))
        return made[key]

    return make


@pytest.fixture
def tokens() -> jax.Array:
    """Returns random tokens [3, 13] of the tiny models' vocabulary."""
    return jnp.asarray(np.random.default_rng(0).integers(1, 61, (3, 13)), jnp.int32)


@pytest.fixture(scope="session")
def relative_error() -> Callable:
    """Returns a function for the largest difference relative to the largest expected value.

    Where all expected values are zero, it is the largest difference.
    """

    def error(found, expected) -> float:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape
        return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))

    return error
