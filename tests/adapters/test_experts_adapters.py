"""Adapters of experts: each expert's arrays act on its rows, as if it were a kernel of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_mixtral import MIXTRAL, moved

from peft_jax.adapters import (
    METHODS,
    AdapterSpec,
    LoftQ,
    LoRA,
    VirtualMethod,
    approximate_by_lora,
    bind_adapters,
    combine_adapters,
    stack_adapters,
)
from peft_jax.core import dequantize, flatten, grouped_linear, linear, unflatten
from peft_jax.hub import load_adapter, save_adapter
from peft_jax.models import build_model
from peft_jax.models.model import quantize_params
from peft_jax.parallel import LogicalAxisRules, MeshSettings, make_mesh, on_mesh, sharding_tree

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
EVERYWHERE = (*EXPERTS, "gate", "q_proj")
ABLE = ("lora", "lora_fa", "pissa", "olora", "loha", "gralora", "adalora")
PATH = ("layers", "mlp", "experts", "down_proj", "kernel")


@pytest.fixture(scope="module")
def mixtral():
    model = build_model(MIXTRAL)
    return model, model.init_params(jax.random.key(0))


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(1, 61, (8, 8)), jnp.int32)


@pytest.mark.fast("lora", "pissa", "adalora")
@pytest.mark.parametrize("name", ABLE)
def test_each_expert_is_adapted_as_a_kernel_of_its_own(name, mixtral):
    _, params = mixtral
    spec = AdapterSpec(METHODS[name](rank=2), target_modules=("experts.down_proj",))
    state = moved(spec.init(jax.random.key(1), params))
    kernel = jax.tree.map(lambda x: x[1], flatten(spec.bind(params, state))[PATH])
    rows = jnp.asarray(np.random.default_rng(2).standard_normal((9, 16)), jnp.float32)
    found = grouped_linear(rows, kernel, jnp.array([2, 0, 4, 3]))
    merged = flatten(spec.merge(params, state))[PATH][1]
    for expert, own in ((0, slice(0, 2)), (2, slice(2, 6)), (3, slice(6, 9))):
        one = jax.tree.map(lambda x, expert=expert: x[expert], kernel)
        np.testing.assert_allclose(found[own], linear(rows[own], one), atol=1e-5)
        np.testing.assert_allclose(found[own], rows[own] @ merged[expert], atol=1e-5)


@pytest.mark.fast("lora", "pissa", "adalora")
@pytest.mark.parametrize("name", ABLE)
def test_the_start_changes_nothing(name, mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(METHODS[name](rank=2), target_modules=EVERYWHERE)
    state = spec.init(jax.random.key(1), params)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), spec.abstract(params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == expected
    forward = jax.jit(model)
    found = forward(spec.bind(params, state), tokens)
    np.testing.assert_allclose(found, forward(params, tokens), atol=2e-5)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_bound_and_merged_models_agree(quantization, mixtral, tokens):
    model, params = mixtral
    params = quantize_params(params, quantization)
    spec = AdapterSpec(LoRA(rank=2), target_modules=EVERYWHERE, rank_pattern={"down_proj": 3})
    state = moved(spec.init(jax.random.key(1), params))
    forward = jax.jit(model)
    found = forward(spec.bind(params, state), tokens)
    np.testing.assert_allclose(found, forward(spec.merge(params, state), tokens), atol=2e-5)


def test_layers_may_differ(mixtral):
    _, params = mixtral
    spec = AdapterSpec(
        LoRA(rank=2),
        target_modules=EXPERTS,
        layers_to_transform=(1,),
    )
    state = moved(spec.init(jax.random.key(1), params))
    merged = flatten(spec.merge(params, state))[PATH]
    assert jnp.array_equal(merged[0], flatten(params)[PATH][0])
    assert not jnp.array_equal(merged[1], flatten(params)[PATH][1])


@pytest.mark.slow
def test_experts_and_adapters_on_a_mesh_compute_what_one_device_does(mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(LoRA(rank=2), target_modules=EVERYWHERE)
    state = moved(spec.init(jax.random.key(1), params))

    def loss(trainable, params):
        bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
        return jnp.mean(jnp.square(model(bound, tokens)))

    expected = jax.jit(jax.grad(loss))(state.trainable, params)
    mesh, rules = make_mesh(MeshSettings(data=1, fsdp=2, tensor=4)), LogicalAxisRules()
    axes = model.logical_axes()
    own = sharding_tree(spec.axes(params, axes).trainable, mesh, rules, state.trainable)
    placed = jax.device_put(state.trainable, own)
    factors = flatten(placed)[(*PATH, "a")]
    assert factors.sharding.shard_shape(factors.shape)[1] == 1
    base = jax.device_put(params, sharding_tree(axes, mesh, rules, params))
    with on_mesh(mesh, rules):
        found = jax.jit(jax.grad(loss))(placed, base)
    for path, gradient in flatten(expected).items():
        largest = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(
            flatten(found)[path], gradient, atol=1e-5 * largest, err_msg=path
        )


def test_no_gradient_has_the_size_of_the_experts(mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(LoRA(rank=2), target_modules=EXPERTS)
    state = spec.init(jax.random.key(1), params)

    def loss(trainable):
        bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
        return jnp.sum(model(bound, tokens))

    kernels = {leaf.shape[1:] for path, leaf in flatten(params).items() if "experts" in path}
    made = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "ragged_dot_general", "add", "mul"):
                made.extend(out.aval.shape for out in equation.outvars)
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss))(state.trainable).jaxpr)
    assert (128, 32) in made  # rows of two experts for each of 64 tokens
    assert not kernels & set(made)


def test_adapters_of_experts_are_saved_and_loaded(mixtral, tmp_path):
    model, params = mixtral
    spec = AdapterSpec(METHODS["loha"](rank=2), target_modules=EVERYWHERE)
    state = moved(spec.init(jax.random.key(1), params))
    save_adapter(tmp_path, model, spec, state, "someone/base")
    loaded, found = load_adapter(tmp_path, model, params)
    assert loaded == spec
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, state))


def test_a_lower_rank_of_experts_is_the_nearest(mixtral):
    _, params = mixtral
    spec = AdapterSpec(METHODS["loha"](rank=2), target_modules=("experts.down_proj",))
    state = moved(spec.init(jax.random.key(1), params), scale=1.0)
    found = approximate_by_lora(spec, params, state, rank=2)
    difference = flatten(spec.merge(params, state))[PATH] - flatten(params)[PATH]
    factors = flatten(found.state.trainable)
    near = factors[(*PATH, "a")] @ factors[(*PATH, "b")]
    values = np.linalg.svd(np.asarray(difference), compute_uv=False)
    best = np.sqrt(np.square(values[..., 2:]).sum())
    error = float(jnp.linalg.norm(near - difference))
    assert best * 0.999 < error < best * 1.02
    assert (
        abs(found.errors["layers.mlp.experts.down_proj"] * np.linalg.norm(values) / best - 1) < 0.2
    )


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in METHODS.items()
        if name not in (*ABLE, "loftq", "full", "ln_tuning")
        and not issubclass(method, VirtualMethod)
    ],
)
def test_other_methods_are_rejected_by_name(name, mixtral):
    _, params = mixtral
    spec = AdapterSpec(METHODS[name](), target_modules=("experts.down_proj",))
    with pytest.raises(ValueError, match=rf"experts\.down_proj .*\b{name}\b.*; lora, "):
        spec.targets(params)


def test_loftq_corrects_each_expert_by_itself(mixtral):
    _, originals = mixtral
    params = quantize_params(originals, "nf4")
    spec = AdapterSpec(LoftQ(rank=2), target_modules=("experts.down_proj",))
    state = spec.init(jax.random.key(1), params, originals=originals)
    a, b = (np.asarray(flatten(state.trainable)[(*PATH, name)], np.float64) for name in "ab")
    whole, rounded = flatten(originals)[PATH], dequantize(flatten(params)[PATH])
    error = np.asarray(whole, np.float64) - np.asarray(rounded, np.float64)
    for place in np.ndindex(*error.shape[:2]):
        u, s, vt = np.linalg.svd(error[place])
        found = spec.method.scale * a[place] @ b[place]
        np.testing.assert_allclose(found, u[:, :2] * s[:2] @ vt[:2], atol=1e-5 * s[0])


def test_dropout_of_experts_is_rejected(mixtral):
    _, params = mixtral
    spec = AdapterSpec(LoRA(dropout=0.1), target_modules=EXPERTS)
    with pytest.raises(ValueError, match=r"dropout is 0\.1, but must be 0 for experts"):
        spec.targets(params)
    assert AdapterSpec(LoRA(dropout=0.1)).targets(params).adapted.keys().isdisjoint([PATH])


def test_several_adapters_of_experts_stack_but_do_not_combine(mixtral, tokens):
    model, params = mixtral
    spec = AdapterSpec(LoRA(rank=2), target_modules=EXPERTS)
    adapters = {
        name: (spec, moved(spec.init(jax.random.key(1), params), scale))
        for name, scale in (("one", 0.05), ("two", 0.1))
    }
    both = bind_adapters(params, adapters, ("one", "two"))
    leaves = flatten(params)
    for _, state in adapters.values():
        merged = flatten(spec.merge(params, state))
        leaves = {
            path: leaf + merged[path] - flatten(params)[path] for path, leaf in leaves.items()
        }
    found = jax.jit(model)(both, tokens)
    np.testing.assert_allclose(found, jax.jit(model)(unflatten(leaves), tokens), atol=2e-5)
    with pytest.raises(ValueError, match=r"'one' adapts the experts .* cannot be combined"):
        combine_adapters(params, adapters, {"one": 1.0, "two": 1.0})
    with pytest.raises(ValueError, match=r"'one' adapts the experts .* rows cannot differ"):
        stack_adapters(params, adapters)
