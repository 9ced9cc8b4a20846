"""Experts on the mesh axis "expert" compute what one device does, and uneven meshes are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_mixtral import MIXTRAL

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.core import flatten, grouped_linear, unflatten
from peft_jax.models import build_model
from peft_jax.models.experts import Routing
from peft_jax.parallel import (
    LogicalAxisRules,
    MeshSettings,
    check_divides,
    expert_shards,
    make_mesh,
    mix_experts,
    on_mesh,
    sharding_tree,
)

MODELS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": MIXTRAL
    | {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "head_dim": 8}
    | {"num_local_experts": 8, "num_experts_per_tok": 3},
}
MESHES = {
    "expert=4": {"data": 2, "expert": 4},
    "expert=2, tensor=2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}
TARGETS = ("experts.gate_up_proj", "experts.down_proj", "gate", "q_proj", "o_proj")
ROUTER = ("layers", "mlp", "gate", "kernel")
KERNEL = ("layers", "mlp", "experts", "down_proj", "kernel")
FAST = ("qwen3_moe", "expert=2, tensor=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (name, mesh) if (name, mesh) == FAST else pytest.param(name, mesh, marks=pytest.mark.slow)
        for name in MODELS
        for mesh in MESHES
    ],
)
def test_losses_and_gradients_of_adapters_are_those_of_one_device(name, mesh):
    model = build_model(MODELS[name])
    params = model.init_params(jax.random.key(0))
    spec = AdapterSpec(LoRA(rank=2), target_modules=TARGETS)
    state = spec.init(jax.random.key(1), params)
    generator = np.random.default_rng(1)
    trainable = jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * generator.standard_normal(x.shape), x.dtype),
        state.trainable,
    )
    tokens = jnp.asarray(generator.integers(1, 61, (8, 8)), jnp.int32)

    def loss(trainable, params):
        bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
        return jnp.mean(jnp.square(model(bound, tokens)))

    alone, sharded = (jax.jit(jax.value_and_grad(loss)) for _ in range(2))
    sizes, rules = MESHES[mesh], LogicalAxisRules()
    mesh = make_mesh(MeshSettings(**sizes))
    check_divides(model.shardable_sizes(), mesh, rules)
    axes = model.logical_axes()
    shardings = sharding_tree(axes, mesh, rules, params)
    own = sharding_tree(spec.axes(params, axes).trainable, mesh, rules, trainable)
    placed = jax.device_put(trainable, own)
    parts = sizes["expert"] * sizes.get("tensor", 1)
    for array in (flatten(placed)[(*KERNEL, "a")], jax.device_put(params, shardings)):
        array = array if isinstance(array, jax.Array) else flatten(array)[KERNEL]
        assert array.sharding.shard_shape(array.shape)[1] == array.shape[1] // parts
    # A router of zeros sends every token to the same experts, all of which one device holds.
    leaves = flatten(params)
    to_few = unflatten(leaves | {ROUTER: jnp.zeros_like(leaves[ROUTER])})
    for base in (params, to_few):
        expected, gradients = alone(trainable, base)
        with on_mesh(mesh, rules):
            found, sharded_gradients = sharded(placed, jax.device_put(base, shardings))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        for path, gradient in flatten(gradients).items():
            largest = float(jnp.abs(gradient).max())
            np.testing.assert_allclose(
                flatten(sharded_gradients)[path], gradient, atol=1e-5 * largest, err_msg=path
            )


def test_tokens_in_parts_compute_what_all_together_do(monkeypatch):
    generator = np.random.default_rng(0)
    shapes = {"x": (2, 7, 6), "logits": (2, 7, 4), "kernels": (4, 6, 6), "dy": (2, 7, 6)}
    x, logits, kernels, dy = (
        jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes.values()
    )

    def pulled_back(rows):
        monkeypatch.setattr(expert_shards, "_MOST_ROWS", rows)

        @jax.jit
        def products(x, logits, kernels):
            def mixed(x, logits, kernels):
                return mix_experts(
                    x,
                    logits,
                    kernels,
                    [("experts", "embed", None)],
                    route=Routing(num_experts=4, experts_per_token=2, normalized=True),
                    apply=lambda rows, sizes, kernels: grouped_linear(rows, kernels, sizes),
                )

            y, pull_back = jax.vjp(mixed, x, logits, kernels)
            return y, *pull_back(dy)

        return products(x, logits, kernels)

    for found, expected in zip(pulled_back(9), pulled_back(28), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MIXTRAL, r"expert=8 does not divide experts \(4\); on 8 devices .*expert=4"),
        (
            {key: value for key, value in MIXTRAL.items() if "experts" not in key}
            | {"model_type": "llama"},
            "expert=8 shards experts, but the model has none; on 8 devices these meshes do: ",
        ),
    ],
    ids=["mixtral", "llama"],
)
def test_a_mesh_that_does_not_divide_the_experts_is_named(model, message):
    mesh = make_mesh(MeshSettings(data=1, expert=8))
    with pytest.raises(ValueError, match=message) as refusal:
        check_divides(build_model(model).shardable_sizes(), mesh)
    assert "expert=8" not in str(refusal.value).partition(";")[2]
