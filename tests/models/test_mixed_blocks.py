"""Layers of several forms, as DeepSeek-V3 has them: training, adapters, files and generation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax.adapters import AdapterSpec, Full, LoRA
from peft_jax.core import flatten
from peft_jax.generation import GenerationSettings, generate
from peft_jax.hub import load_model, save_model
from peft_jax.training.step import norms_by_layer

SETTINGS = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "eos_token_id": None,
}
CORRECTION = ("layers", "mlp", "gate", "e_score_correction_bias")
GATE, UP = ("layers", "mlp", "gate", "kernel"), ("layers", "mlp", "up_proj", "kernel")


@pytest.fixture(scope="module")
def deepseek(pair):
    return pair("DeepseekV3", **SETTINGS)


def test_leaves_have_rows_for_the_layers_that_have_them(deepseek):
    _, model, params = deepseek
    rows = {path[1:-1]: leaf.shape[0] for path, leaf in flatten(params).items() if len(path) > 2}
    assert rows["self_attn", "kv_b_proj"] == 3
    assert rows["mlp", "up_proj"] == 1
    assert rows["mlp", "experts", "down_proj"] == rows["mlp", "shared_experts", "up_proj"] == 2
    assert list(model.layers_of(GATE)) == [1, 2]
    assert model.hf_names()[UP].rows(3) == {0: "model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": (0,)},
        {"target_modules": ("layers.0.mlp.up_proj",)},
        {"rank_pattern": {"layers.0.mlp.up_proj": 3}},
        {"exclude_modules": ("layers.0.mlp.up_proj",)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_layers_of_modules_that_only_some_layers_have_cannot_differ(settings, deepseek):
    _, _, params = deepseek
    with pytest.raises(ValueError, match=r"mlp\.\w+ is in 1 of 3 layers"):
        AdapterSpec(LoRA(rank=2), **settings).targets(params)


def test_layers_of_modules_that_all_layers_have_may_differ(deepseek):
    _, _, params = deepseek
    spec = AdapterSpec(LoRA(rank=2), target_modules=("kv_b_proj",), layers_to_transform=(1,))
    (methods,) = spec.targets(params).by_layer.values()
    assert [method is None for method in methods] == [True, False, True]


def test_corrections_stay_in_float32_and_are_not_trained(deepseek, tmp_path):
    _, model, params = deepseek
    save_model(tmp_path / "whole", model, params)
    again, narrow = load_model(tmp_path / "whole", dtype=jnp.bfloat16)
    assert flatten(narrow)[GATE].dtype == jnp.bfloat16
    np.testing.assert_array_equal(flatten(narrow)[CORRECTION], flatten(params)[CORRECTION])
    assert (
        flatten(model.init_params(jax.random.key(0), jnp.bfloat16))[CORRECTION].dtype == "float32"
    )
    save_model(tmp_path / "narrow", again, narrow)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    for spec in (AdapterSpec(Full()), AdapterSpec(LoRA(), modules_to_save=("gate",))):
        trained = spec.targets(params).trained
        assert GATE in trained
        assert CORRECTION not in trained


def test_layers_that_predict_several_tokens_are_not_read(deepseek, tmp_path):
    _, model, params = deepseek
    save_model(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    _, found = load_model(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_norms_by_layer_count_the_layers_that_have_a_module():
    norms = norms_by_layer(
        {
            "layers": {
                "q_proj": {"kernel": {"a": jnp.array([[3.0], [1.0]])}},
                "up_proj": {"kernel": {"a": jnp.array([[2.0]])}},
            }
        }
    )
    assert {name: norm.tolist() for name, norm in norms.items()} == {
        "adapter": [3.0, 1.0],
        "adapter_1": [2.0],
    }


def test_quantized_kernels_keep_their_rows(deepseek):
    _, model, _ = deepseek
    shapes = flatten(model.abstract_params(quantization="int8"))
    assert shapes[UP].shape[0] == 1
    assert shapes[GATE].dtype == jnp.float32


@pytest.mark.slow
def test_greedy_continuations_equal_those_of_transformers(deepseek, tokens):
    torch = pytest.importorskip("torch")
    theirs, model, params = deepseek
    prompts = tokens[:, :6]
    inputs = torch.tensor(np.asarray(prompts), dtype=torch.long)
    expected = theirs.module.generate(
        input_ids=inputs, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    settings = GenerationSettings(max_new_tokens=8, eos_ids=())
    found = generate(model, params, list(np.asarray(prompts)), settings).completions
    assert [one.tokens.tolist() for one in found] == expected[:, 6:].tolist()
