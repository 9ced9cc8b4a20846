"""Models of other packages from PyPI, adapted without a change.

Their pins exclude this library's test environment, so that they need one of their own:

    pip install google-tunix flaxmodels
    python -m pytest -o addopts= tests/flax_models/test_foreign_models.py
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_jax as pj
from peft_jax.flax_models import Einsum
from tests.flax_models.user_modules import moved

pytestmark = pytest.mark.slow

NO_TUNIX = "google-tunix is not installed: pip install it in an environment of its own"


@pytest.fixture(autouse=True)
def precise():
    # The packages' own code promotes dtypes.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("method", [pj.LoRA(rank=4), pj.HRA(rank=2)], ids=lambda m: m.name)
def test_tunix_llama(method):
    tunix = pytest.importorskip("tunix.models.llama3.model", reason=NO_TUNIX)
    config = tunix.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=32,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    module = tunix.Llama3(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12).reshape(2, 6)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
    args = (tokens, positions, None, mask)

    spec = pj.AdapterSpec(method)
    model, params = pj.adapt(module, spec, *args, layers={tunix.Einsum: Einsum("w")})
    adapted = {".".join(path[:-1]) for path in spec.targets(params).adapted}
    blocks = ("attn.q_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert {f"layers.{layer}.{name}" for layer in range(2) for name in blocks} <= adapted
    state = moved(spec.init(jax.random.key(1), params))
    found, _ = jax.jit(lambda p, s: model(spec.bind(p, s), *args))(params, state)
    merged = model.to_flax(spec.merge(params, state))
    expected, _ = merged(*args)
    base, _ = module(*args)
    assert float(jnp.abs(expected - base).max()) > 1e-2
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("method", [pj.LoRA(rank=2), pj.HRA(rank=2)], ids=lambda m: m.name)
def test_a_block_of_flaxmodels_gpt2(method):
    reason = "flaxmodels is not installed: pip install flaxmodels"
    gpt2 = pytest.importorskip("flaxmodels.gpt2.gpt2", reason=reason)
    config = types.SimpleNamespace(
        vocab_size=32,
        n_positions=16,
        n_embd=8,
        n_head=2,
        n_layer=2,
        n_inner=None,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        activation_function="gelu",
    )
    module, x = gpt2.GPT2Block(config=config), jax.random.normal(jax.random.key(0), (2, 6, 8))
    variables = module.init(jax.random.key(0), x)
    spec = pj.AdapterSpec(method)
    model, params = pj.adapt(module, spec, variables, x)
    assert len(spec.targets(params).adapted) == 4
    state = moved(spec.init(jax.random.key(1), params))
    found = model(spec.bind(params, state), x)[0]
    expected = module.apply(model.to_flax(spec.merge(params, state)), x)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    base = module.apply(variables, x)[0]
    assert float(jnp.abs(expected - base).max()) > 1e-2
