"""Layers of Flax with adapters, compared with PEFT on torch where it has the same form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import peft_jax as pj
from peft_jax.flax_models.equation import Equation
from tests.flax_models.user_modules import moved

SPEC = pj.AdapterSpec(pj.LoRA(rank=3, alpha=6.0), target_modules=r".*")


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def adapted(module, x, spec=SPEC):
    """Returns the adapted module's outputs, those of the merged module, and the arrays."""
    model, params = pj.adapt(module, spec, module.init(jax.random.key(0), x), x)
    state = moved(spec.init(jax.random.key(1), params))
    merged = model.to_flax(spec.merge(params, state))
    return model(spec.bind(params, state), x), module.apply(merged, x), params, state


def peft_outputs(layer, x, arrays):
    """Returns the outputs of PEFT's LoRA on a torch layer, with A and B by the names of PEFT."""
    net = torch.nn.Sequential(layer)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    net = get_peft_model(net, config).base_model.model
    with torch.no_grad():
        for name, array in arrays.items():
            weight = getattr(net[0], name)["default"]
            weight = getattr(weight, "weight", weight)
            assert tuple(weight.shape) == array.shape
            weight.copy_(torch.tensor(np.array(array)))
        return net(torch.tensor(np.array(x))).numpy()


@pytest.mark.parametrize("stride", [1, 2])
def test_lora_on_convolutions_is_that_of_peft(stride):
    x = jax.random.normal(jax.random.key(2), (2, 7, 9, 5))
    module = nn.Conv(4, (3, 2), strides=stride, padding=[(1, 1), (1, 1)])
    found, merged, params, state = adapted(module, x)
    np.testing.assert_allclose(found, merged, atol=1e-5)
    conv = torch.nn.Conv2d(5, 4, (3, 2), stride=stride, padding=1)
    kernel = params["kernel"].reshape(3, 2, 5, 4).transpose(3, 2, 0, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(np.array(kernel)))
        conv.bias.copy_(torch.tensor(np.array(params["bias"])))
    a, b = (state.trainable["kernel"][name] for name in "ab")
    arrays = {
        "lora_A": a.reshape(3, 2, 5, 3).transpose(3, 2, 0, 1),
        "lora_B": b.T[:, :, None, None],
    }
    theirs = peft_outputs(conv, x.transpose(0, 3, 1, 2), arrays).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, theirs, atol=1e-5)


def test_lora_on_embeddings_is_that_of_peft():
    ids = jnp.array([[0, 3, 6], [6, 1, 1]])
    found, merged, params, state = adapted(nn.Embed(7, 5), ids)
    np.testing.assert_allclose(found, merged, atol=1e-5)
    table = torch.nn.Embedding(7, 5, _weight=torch.tensor(np.array(params["table"])))
    a, b = (state.trainable["table"][name] for name in "ab")
    arrays = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    np.testing.assert_allclose(found, peft_outputs(table, ids, arrays), atol=1e-5)


CONVOLUTIONS = {
    "one axis": (nn.Conv(4, 3, padding="CAUSAL"), (2, 9, 5)),
    "same": (nn.Conv(4, (3, 3), padding="SAME"), (2, 6, 7, 5)),
    "circular": (nn.Conv(4, (3, 2), padding="CIRCULAR", strides=(2, 1)), (2, 6, 7, 5)),
    "reflect": (nn.Conv(4, (3, 3), padding="REFLECT"), (2, 6, 7, 5)),
    "dilated": (nn.Conv(4, (2, 2), kernel_dilation=2, padding="VALID"), (2, 6, 7, 5)),
    "transposed": (nn.Conv(4, (2, 2), input_dilation=2, padding=1), (2, 6, 7, 5)),
    "two batches": (nn.Conv(4, (2, 2), use_bias=False), (2, 3, 6, 7, 5)),
    "no batch": (nn.Conv(4, (2, 2)), (6, 7, 5)),
}


@pytest.mark.fast(
    "lora-one axis", "lora-circular", "lora-dilated", "lora-transposed", "lora-two batches"
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("method", [pj.LoRA(rank=2), pj.HRA(rank=2)], ids=lambda m: m.name)
def test_convolutions_of_every_kind(name, method):
    module, shape = CONVOLUTIONS[name]
    x = jax.random.normal(jax.random.key(2), shape)
    found, merged, *_ = adapted(module, x, pj.AdapterSpec(method, target_modules=r".*"))
    assert found.shape == merged.shape
    np.testing.assert_allclose(found, merged, atol=1e-5)


GENERAL = {
    "several outputs": nn.DenseGeneral((3, 2)),
    "several inputs": nn.DenseGeneral((3, 2), axis=(-2, -1)),
    "inputs in another order": nn.DenseGeneral(3, axis=(-1, 1)),
    "an inner input": nn.DenseGeneral(3, axis=2, use_bias=False),
    "batch": nn.DenseGeneral((3, 2), axis=-1, batch_dims=(0,)),
    "batches": nn.DenseGeneral((3,), axis=(-1,), batch_dims=(0, 1)),
    "einsum": nn.Einsum((5, 4, 3, 2), "abcd,dcef->aefb"),
    "einsum with a batch": nn.Einsum((4, 5, 6), "abcd,cde->abce"),
    "einsum with an ellipsis": nn.Einsum((6, 5), "...d,ed->...e"),
}


@pytest.mark.fast(
    "lora-several outputs",
    "lora-inputs in another order",
    "lora-batches",
    "lora-einsum with a batch",
)
@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("method", [pj.LoRA(rank=2), pj.HRA(rank=2)], ids=lambda m: m.name)
def test_contractions_of_every_kind(name, method):
    module = GENERAL[name]
    x = jax.random.normal(jax.random.key(2), (2, 3, 4, 5))
    found, merged, *_ = adapted(module, x, pj.AdapterSpec(method, target_modules=r".*"))
    assert found.shape == merged.shape
    np.testing.assert_allclose(found, merged, atol=1e-5)


@pytest.mark.parametrize("method", [pj.LoRA(rank=2), pj.HRA(rank=2)], ids=lambda m: m.name)
@pytest.mark.parametrize(
    "module", [nn.Conv(4, (3, 2)), nn.DenseGeneral((3, 2), axis=(-3, -1))], ids=["conv", "general"]
)
def test_gradients_are_finite_differences(module, method):
    x = jax.random.normal(jax.random.key(2), (2, 5, 6, 3))
    spec = pj.AdapterSpec(method, target_modules=r".*")
    model, params = pj.adapt(module, spec, module.init(jax.random.key(0), x), x)
    state = moved(spec.init(jax.random.key(1), params))
    zeros = state.replace(trainable=jax.tree.map(jnp.zeros_like, state.trainable))
    direction = moved(zeros, key=5, by=1.0).trainable

    @jax.jit
    def loss(t):
        arrays = jax.tree.map(lambda a, d: a + t * d, state.trainable, direction)
        y = model(spec.bind(params, state.replace(trainable=arrays)), x)
        return jnp.mean(jnp.square(y))

    exact, step = jax.grad(loss)(0.0), 3e-3
    near = (loss(step) - loss(-step)) / (2 * step)
    assert abs(exact) > 0.02
    np.testing.assert_allclose(exact, near, rtol=1e-2)


def test_lookups_and_attend_use_the_same_table():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 5, name="embed")
            return embed.attend(jnp.tanh(embed(ids)))

    found, merged, *_ = adapted(Tied(), jnp.array([[0, 3, 6], [6, 1, 1]]))
    np.testing.assert_allclose(found, merged, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ab,bc", "must have an input, a kernel"),
        ("ab,bc,cd->ad", "must have an input, a kernel"),
        ("ab,...c->ac", "without an ellipsis"),
        ("ab,bc->a", "summed over one operand alone"),
        ("aab,bc->ac", "a letter is twice"),
    ],
)
def test_equations_that_are_no_product_with_a_matrix(text, why):
    with pytest.raises(ValueError, match=why):
        Equation.parse(text)
