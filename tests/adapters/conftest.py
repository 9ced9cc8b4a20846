"""Provides a tiny Llama, its loss and a few batches for tests over full models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core import Tree
from peft_jax.models import CausalLM, build_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
BLOOM = {"model_type": "bloom", "vocab_size": 53, "hidden_size": 24, "n_head": 4, "n_layer": 2}


@pytest.fixture(scope="session")
def llama() -> CausalLM:
    return build_model(LLAMA)


@pytest.fixture(scope="session")
def llama_params(llama: CausalLM) -> Tree:
    return llama.init_params(jax.random.key(0))


@pytest.fixture(scope="session")
def bloom() -> CausalLM:
    return build_model(BLOOM)


@pytest.fixture(scope="session")
def loss_fn(llama: CausalLM) -> Callable[[Tree, Any], jax.Array]:
    """Returns the next-token cross-entropy."""

    def loss(params: Tree, tokens: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(llama(params, tokens[:, :-1]))
        picked = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    return loss


@pytest.fixture(scope="session")
def batches() -> list[jax.Array]:
    """Returns three batches of tokens [4, 17], a few of which are frequent, as in text."""
    rng = np.random.default_rng(0)
    odds = 1.0 / np.arange(1, 54)
    draw = rng.choice(53, size=(3, 4, 17), p=odds / odds.sum())
    return [jnp.asarray(tokens, jnp.int32) for tokens in draw]
