"""A mixture of experts with 2 layers of 4 experts, and adapters of it away from their start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


def moved(state, scale=0.05):
    """Returns the state with noise added to every trainable array."""
    generator = np.random.default_rng(1)
    noise = jax.tree.map(
        lambda x: jnp.asarray(scale * generator.standard_normal(x.shape), x.dtype), state.trainable
    )
    return dataclasses.replace(state, trainable=jax.tree.map(jnp.add, state.trainable, noise))
