"""Tiny models with the same weights here and on torch, and adapters with random values."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import Tree
from peft_jax.models import CausalLM

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BLOOM = {"vocab_size": 37, "hidden_size": 16, "n_layer": 2, "n_head": 4}
SETTINGS = {
    "llama": ("Llama", LLAMA),
    "llama tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "bloom": ("Bloom", BLOOM),
    "gpt2": ("GPT2", {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4}),
    # Layers of two types; embeddings of tokens are scaled, those of virtual tokens are not.
    "gemma2": ("Gemma2", LLAMA | {"head_dim": 8, "sliding_window": 32}),
    # One map to queries, keys and values of grouped heads.
    "phi3": ("Phi3", LLAMA | {"pad_token_id": 0}),
    # Both kinds of embeddings are scaled.
    "granite": ("Granite", LLAMA | {"embedding_multiplier": 3.0}),
}


@dataclasses.dataclass
class Base:
    """A tiny model, with the same weights here and on torch."""

    model: CausalLM
    params: Tree
    module: Any

    def copy_of_module(self) -> Any:
        """Returns a copy that PEFT may modify."""
        return copy.deepcopy(self.module)

    @functools.cached_property
    def _forward(self) -> Any:
        return jax.jit(self.model)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the logits of the base."""
        return np.asarray(self._forward(self.params, jnp.asarray(tokens, jnp.int32)))

    def adapted_logits(
        self, tokens: np.ndarray, spec: AdapterSpec, state: AdapterState
    ) -> np.ndarray:
        """Returns the logits of the base with a bound adapter."""

        @jax.jit
        def forward(params: Tree, state: AdapterState, tokens: jax.Array) -> jax.Array:
            return self.model(spec.bind(params, state), tokens)

        return np.asarray(forward(self.params, state, jnp.asarray(tokens, jnp.int32)))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Returns a cached factory of bases by name."""
    made: dict[str, Base] = {}

    def make(name: str) -> Base:
        import torch
        import transformers

        from peft_jax.hub import load_model

        if name not in made:
            kind, settings = SETTINGS[name]
            ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
            module = getattr(transformers, f"{kind}{ending}")(
                getattr(transformers, f"{kind}Config")(**settings)
            ).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in module.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + 0.2 * noise)
            folder = tmp_path_factory.mktemp(kind)
            module.save_pretrained(folder)
            made[name] = Base(*load_model(folder), module)
        return made[name]

    return make


@pytest.fixture
def tokens() -> np.ndarray:
    """Returns random tokens [2, 7]."""
    return np.random.default_rng(0).integers(1, 37, (2, 7))


@pytest.fixture(scope="session")
def arbitrary_state() -> Callable[..., AdapterState]:
    """Returns a function that draws random values for all of an adapter's arrays.

    Constant arrays that follow from the base's kernels are computed where its values are given.
    """

    def make(spec: AdapterSpec, params: Tree) -> AdapterState:
        rng = np.random.default_rng(0)

        def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jnp.integer):  # places in a kernel
                return jnp.asarray(rng.integers(0, 8, leaf.shape), leaf.dtype)
            return jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), leaf.dtype)

        state = jax.tree.map(draw, spec.abstract(params))
        given = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
        if given and getattr(spec.method, "uses_kernel", False):
            return state.replace(constant=spec.init(jax.random.key(0), params).constant)
        return state

    return make
