"""Tests what a layer of LoRA-FA keeps for its backward pass."""

import jax
import jax.numpy as jnp
import pytest

from peft_jax.adapters import LoRA, LoRAFA
from peft_jax.core import AdaptedKernel, linear


@pytest.mark.parametrize(("method", "kept"), [(LoRAFA(rank=2), False), (LoRA(rank=2), True)])
def test_the_input_is_kept_for_the_gradient_of_a_only(method, kept, key):
    # With more tokens, A B is added to the kernel, which keeps only x for LoRA.
    x, kernel = jnp.ones((3, 12)), jnp.ones((12, 5))
    trainable, constant = method.init(key, kernel.shape)

    def apply(trainable):
        arrays = method.prepare(trainable, constant)
        return linear(x, AdaptedKernel(base=kernel, arrays=arrays, method=method))

    _, pull = jax.vjp(apply, trainable)
    shapes = {leaf.shape for leaf in jax.tree.leaves(pull)}
    assert (x.shape in shapes) == kept
    assert (3, 2) in shapes
