"""Adapts Flax modules of one's own, without a change to their code.

- [`adapting`][peft_jax.flax_models.adapting]: `adapt` makes a model of a Linen or an NNX module.
- [`model`][peft_jax.flax_models.model]: `FlaxModel`, the model.
- [`linen`][peft_jax.flax_models.linen]: `LinenModel`, by interception of methods.
- [`graph`][peft_jax.flax_models.graph]: `NNXModel`, by layers replaced in a copy of the graph.
- [`layers`][peft_jax.flax_models.layers]: `Einsum` and the other kinds of layers.
"""

from peft_jax.flax_models.adapting import adapt
from peft_jax.flax_models.bound_kernel import KernelUseError
from peft_jax.flax_models.graph import NNXModel
from peft_jax.flax_models.layers import LAYERS, Einsum
from peft_jax.flax_models.linen import LinenModel
from peft_jax.flax_models.model import FlaxModel

__all__ = ["LAYERS", "Einsum", "FlaxModel", "KernelUseError", "LinenModel", "NNXModel", "adapt"]
