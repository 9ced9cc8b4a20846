"""Execution settings change neither logits nor gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core import AdaptedKernel, linear
from peft_jax.models import ExecutionSettings, build_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOOM = {"model_type": "bloom", "vocab_size": 37, "hidden_size": 16, "n_layer": 3, "n_head": 4}
CONFIGS = {"llama": LLAMA, "bloom": BLOOM}


@dataclasses.dataclass(frozen=True)
class Shift:
    """A fake method: y = x W + (x · u) v."""

    def project(self, x, base, arrays, *, dropout_key=None):
        along = jnp.sum(x * arrays["u"].astype(x.dtype), axis=-1, keepdims=True)
        return linear(x, base) + along * arrays["v"].astype(x.dtype)

    def merge(self, base, arrays):
        return base + jnp.outer(arrays["u"], arrays["v"])


def random_model(kind: str, key, *, layers: int = 3) -> tuple[Any, Any]:
    depth = {"llama": "num_hidden_layers", "bloom": "n_layer"}[kind]
    model = build_model(CONFIGS[kind] | {depth: layers})
    params = model.init_params(key)
    noise = jax.random.normal(key, (len(jax.tree.leaves(params)),))
    leaves, treedef = jax.tree.flatten(params)
    spread = [
        8.0 * leaf + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32) + n).reshape(leaf.shape)
        for leaf, n in zip(leaves, noise, strict=True)
    ]
    return model, jax.tree.unflatten(treedef, spread)


def adapt(params, kind, key):
    """Returns the fake method's arrays for one kernel, and functions that bind and merge them."""
    module, name = {"llama": ("mlp", "up_proj"), "bloom": ("self_attention", "query_key_value")}[
        kind
    ]
    kernel = params["layers"][module][name]["kernel"]
    keys = jax.random.split(key)
    arrays = {
        "u": 0.3 * jax.random.normal(keys[0], (kernel.shape[0], kernel.shape[1])),
        "v": 0.3 * jax.random.normal(keys[1], (kernel.shape[0], kernel.shape[2])),
    }

    def bind(arrays, kernel=kernel):
        inner = dict(params["layers"][module])
        inner[name] = {**inner[name], "kernel": AdaptedKernel(kernel, arrays, None, Shift())}
        return {**params, "layers": {**params["layers"], module: inner}}

    def merge(arrays):
        merged = kernel + arrays["u"][:, :, None] * arrays["v"][:, None, :]
        inner = dict(params["layers"][module])
        inner[name] = {**inner[name], "kernel": merged}
        return {**params, "layers": {**params["layers"], module: inner}}

    return arrays, bind, merge


def loss_of(model, tokens):
    segment_ids = jnp.broadcast_to(
        jnp.asarray(np.repeat([1, 2, 0], [5, 6, tokens.shape[1] - 11]), jnp.int32), tokens.shape
    )

    def loss(params):
        logits = model(params, tokens, segment_ids=segment_ids)
        return jnp.mean(jnp.square(logits[:, :11]))

    return loss


@pytest.fixture
def tokens(key):
    return jax.random.randint(key, (2, 13), 0, 37)


EXECUTIONS = {
    "llama unrolled": ("llama", {"scan_layers": False}),
    "llama full": ("llama", {"remat": "full"}),
    "llama dots, chunked": ("llama", {"remat": "dots", "attention": "chunked"}),
    "llama products": ("llama", {"remat": "products"}),
    "llama attention, chunked": ("llama", {"remat": "attention", "attention": "chunked"}),
    "llama offload": ("llama", {"remat": "offload"}),
    "bloom unrolled, full": ("bloom", {"remat": "full", "scan_layers": False}),
    "bloom chunked": ("bloom", {"attention": "chunked"}),
}


@functools.cache
def loss_and_gradients(kind, execution):
    """Returns the loss of a model with a bound adapter, and the adapter's gradients."""
    key = jax.random.key(3)
    tokens = jax.random.randint(key, (2, 13), 0, 37)
    model, params = random_model(kind, key)
    arrays, bind, _ = adapt(params, kind, key)
    loss = loss_of(model.with_execution(execution), tokens)
    return jax.jit(jax.value_and_grad(lambda arrays: loss(bind(arrays))))(arrays)


@pytest.mark.parametrize(
    "name",
    [
        name if "attention" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in EXECUTIONS
    ],
)
def test_all_execution_settings_give_the_same_loss_and_gradients(name):
    kind, settings = EXECUTIONS[name]
    expected_loss, expected = loss_and_gradients(kind, ExecutionSettings())
    loss, gradients = loss_and_gradients(kind, ExecutionSettings(**settings))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradients[name] / scale, expected[name] / scale, atol=2e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapted_kernel_computes_the_same_as_its_merged_kernel(kind, key, tokens):
    model, params = random_model(kind, key)
    arrays, bind, merge = adapt(params, kind, key)
    forward = jax.jit(model)
    before = forward(params, tokens)
    adapted, merged = forward(bind(arrays), tokens), forward(merge(arrays), tokens)
    assert np.abs(adapted - before).max() > 0.01 * np.abs(before).max()
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-5 * np.abs(merged).max())


def test_an_adapted_head_computes_logits(key, tokens):
    model, params = random_model("llama", key)
    kernel = params["lm_head"]["kernel"]
    arrays = {"u": jnp.ones(16), "v": jnp.arange(37.0)}
    bound = {**params, "lm_head": {"kernel": AdaptedKernel(kernel, arrays, None, Shift())}}
    merged = {**params, "lm_head": {"kernel": Shift().merge(kernel, arrays)}}
    forward = jax.jit(model)
    found, expected = forward(bound, tokens), forward(merged, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.head_kernel(bound), AdaptedKernel)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "products", "attention"])
def test_remat_decides_which_values_are_saved(key, remat):
    model, params = random_model("llama", key)
    model = model.with_execution(ExecutionSettings(remat=remat))
    tokens = jnp.zeros((2, 64), jnp.int32)
    _, keep = jax.vjp(lambda params: model(params, tokens), params)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(keep) if leaf.ndim and leaf.shape[0] == 3)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    per_layer = (kept - held) / 3 / (2 * 64 * 4)
    # Values saved per token and block: 16 for its input and 16 + 8 + 8 + 16 + 24 + 24 + 16 for the
    # outputs of its maps, of which the last is the next block's input. "none" adds the inputs of
    # maps and norms, and 64 weights for each of 4 heads. "attention" leaves out 24 + 24.
    bounds = {
        "none": (64 * 4, 64 * 4 + 200),
        "full": (16, 20),
        "dots": (100, 130),
        "products": (16 + 96, 16 + 112),
        "attention": (16 + 48, 16 + 64),
    }
    low, high = bounds[remat]
    assert low <= per_layer <= high


def test_bfloat16_logits_are_close_to_float32(key, tokens):
    model, params = random_model("llama", key)
    expected = jax.jit(model)(params, tokens)
    model = model.with_execution(ExecutionSettings(compute_dtype="bfloat16"))
    hidden, _ = jax.jit(model.hidden_states)(params, tokens)
    assert hidden.dtype == jnp.bfloat16
    found = model.logits(params, hidden)
    assert found.dtype == jnp.float32
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def sizes_of_intermediates(jaxpr):
    """Yields the number of elements of every intermediate array, at any depth."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "size", 0)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from sizes_of_intermediates(inner)


def test_chunked_attention_creates_no_array_of_all_scores(key):
    tokens = jnp.zeros((1, 4096), jnp.int32)
    largest = {}
    for attention in ("dense", "auto"):
        model = build_model(LLAMA, ExecutionSettings(attention=attention))
        params = model.abstract_params()
        jaxpr = jax.make_jaxpr(jax.grad(loss_of(model, tokens)))(params)
        largest[attention] = max(sizes_of_intermediates(jaxpr.jaxpr))
    assert largest["dense"] >= 4 * 4096 * 4096
    assert largest["auto"] < 4096 * 4096 / 8


def test_chunked_attention_memory_is_linear_in_length(key):
    execution = ExecutionSettings(attention="chunked")
    model = build_model(LLAMA | {"num_hidden_layers": 1}, execution)

    def gradient(params, tokens):
        return jax.grad(loss_of(model, tokens))(params)

    def temporary_bytes(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(gradient).lower(model.abstract_params(), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    all_scores = 4 * 4096 * 4096 * 4
    assert long < all_scores / 8
    assert long < 2.5 * short


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"compute_dtype": "float16"}, "did you mean 'bfloat16'"),
        ({"attention": "flash"}, "auto, chunked, dense"),
    ],
)
def test_unknown_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        ExecutionSettings(**settings)
