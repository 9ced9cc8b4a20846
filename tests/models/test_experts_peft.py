"""Adapters of experts and routers that are written for PEFT, and loaded by it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import METHODS, AdapterSpec, LoRA
from peft_jax.hub import load_adapter, save_adapter

MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2},
    ),
}
ROUTERS = {"mixtral": "gate", "gpt_oss": "router"}


def trained(spec, params):
    """Returns the adapter's arrays with noise in place of the start."""
    state = spec.init(jax.random.key(0), params)
    generator = np.random.default_rng(0)
    noise = jax.tree.map(
        lambda x: jnp.asarray(0.1 * generator.standard_normal(x.shape), x.dtype), state.trainable
    )
    return dataclasses.replace(state, trainable=noise)


TARGETS = {
    "both": ("gate_up_proj", "down_proj", "q_proj", "router"),
    "down_proj": ("down_proj",),
    "gate_up_proj": ("gate_up_proj", "v_proj"),
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_peft_loads_adapters_of_experts(name, targets, pair, tokens, relative_error, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    kind, settings = MODELS[name]
    theirs, model, params = pair(kind, **settings)
    router = ROUTERS[name]
    modules = tuple(router if module == "router" else module for module in TARGETS[targets])
    ranks = {module: 3 for module in modules if module in ("gate_up_proj", router)}
    spec = AdapterSpec(LoRA(rank=2, alpha=3.0), target_modules=modules, rank_pattern=ranks)
    state = trained(spec, params)
    save_adapter(tmp_path, model, spec, state, "someone/base")
    loaded, found = load_adapter(tmp_path, model, params)
    assert loaded == spec
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, state))
    (tmp_path / "peft_jax_adapter.json").unlink()
    again, found = load_adapter(tmp_path, model, params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found.trainable, state.trainable))

    folder = theirs.save(tmp_path / "model")
    module = type(theirs.module).from_pretrained(folder, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(module, tmp_path).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
    ours = jax.jit(model)(again.bind(params, found), tokens)
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(ours, theirs.logits(tokens)) > 1e-2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec(METHODS["loha"](rank=2), target_modules=("down_proj",)), "by LoRA only"),
        (
            AdapterSpec(LoRA(), target_modules=("gate",), layers_to_transform=(1,)),
            "parameters in all layers",
        ),
    ],
    ids=["loha", "layers"],
)
def test_what_peft_cannot_hold_is_written_for_this_library_alone(spec, message, pair, tmp_path):
    kind, settings = MODELS["mixtral"]
    _, model, params = pair(kind, **settings)
    state = trained(spec, params)
    save_adapter(tmp_path, model, spec, state, "someone/base")
    config = json.loads((tmp_path / "peft_jax_adapter.json").read_text())
    assert message in config["peft"]["why"]
    loaded, found = load_adapter(tmp_path, model, params)
    assert loaded == spec
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, state))
