"""Nonlinearities by their names in transformers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.models.attributes import given

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Nonlinearities of MLPs and heads; three names are of GELU's tanh form (arXiv 1606.08415)."""


def read_activation(hf_config: Mapping[str, Any], name: str, default: str = "gelu") -> str:
    """Returns the name of a nonlinearity.

    Args:
      hf_config: The parsed `config.json`.
      name: Name of the attribute.
      default: Value where the attribute is absent.

    Raises:
      ValueError: The nonlinearity is not implemented.
    """
    activation = given(hf_config, name, default)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json sets {name} = {activation!r}, which is not implemented; choose from:"
            f" {', '.join(ACTIVATIONS)}"
        )
    return activation
