"""Published configurations are read; unknown attributes raise ValueError with their name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core import flatten
from peft_jax.models import build_model
from peft_jax.models.architectures import find_architecture
from peft_jax.models.rope import RotarySettings
from peft_jax.models.rope_scaling import Llama3Scaling, YarnScaling

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BLOOM = {"model_type": "bloom", "vocab_size": 32, "hidden_size": 8, "n_layer": 2, "n_head": 2}

NEOX = {"model_type": "gpt_neox", "rotary_pct": 1.0}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 4}
FACTORS = {"short_factor": [1.0, 2.0, 3.0], "long_factor": [1.0, 2.0, 3.0]}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 8} | FACTORS

# The config.json of each model on the hub.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
VICUNA_7B = {
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "unk_token_id": 0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "transformers_version": "4.20.0",
    "use_cache": True,
    "vocab_size": 250880,
    "architectures": ["BloomForCausalLM"],
}


PYTHIA_6_9B = {
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
LLAMA4 = LLAMA | {"model_type": "llama4_text", "head_dim": 4, "intermediate_size_mlp": 16}
GEMMA4 = LLAMA | {"model_type": "gemma4_text", "head_dim": 4, "hidden_size_per_layer_input": 0}
DEEPSEEK_V3 = LLAMA | {"model_type": "deepseek_v3", "moe_intermediate_size": 8}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "n_ctx": 1024,
    "summary_type": "cls_index",
}


def parameters(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params()))


# The counts come from the model cards.
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LLAMA_3_1_8B, 8_030_261_248),
        (VICUNA_7B, 6_738_415_616),
        (QWEN2_5_7B, 7_615_616_512),
        (BLOOM_560M, 559_214_592),
    ],
    ids=["llama", "vicuna", "qwen2", "bloom"],
)
def test_published_configurations_have_the_published_parameter_counts(config, count):
    assert parameters(build_model(config)) == count


# The counts come from the model cards, and of Gemma 3 without the vision tower.
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (find_architecture("deepseek-v3"), 671_026_419_200),
        (find_architecture("gemma-2-27b"), 27_227_128_320),
        (find_architecture("gemma-3-27b"), 27_009_346_304),
        (find_architecture("gpt-oss-120b"), 116_829_156_672),
        (find_architecture("olmo-2-7b"), 7_298_617_344),
        (find_architecture("phi-4"), 14_659_507_200),
        (find_architecture("qwen3-30b-a3b"), 30_532_122_624),
        (find_architecture("qwen3-235b-a22b"), 235_093_634_560),
        (PYTHIA_6_9B, 6_857_302_016),
        (GPT2, 124_439_808),
    ],
    ids=lambda value: None if isinstance(value, int) else value["model_type"],
)
def test_published_dimensions_have_the_published_parameter_counts(config, count):
    assert parameters(build_model(config)) == count


def test_llama_3_rotary_scaling_is_read_from_both_formats():
    old = build_model(LLAMA_3_1_8B).config.layers[0].rotary
    assert old == RotarySettings(
        head_dim=128,
        theta=500000.0,
        scaling=Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )
    new = dict(LLAMA_3_1_8B)
    new["rope_parameters"] = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    assert build_model(new).config.layers[0].rotary == old


def test_yarn_reads_its_original_length_from_max_position_embeddings():
    scaling = {"type": "yarn", "factor": 4.0}
    model = build_model(LLAMA | {"rope_scaling": scaling, "max_position_embeddings": 64})
    expected = YarnScaling(factor=4.0, original_max_position_embeddings=64)
    assert model.config.layers[0].rotary.scaling == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gptj"}, "model_type = 'gptj'"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "x", "auto_map": {"AutoModel": "m.M"}}, "auto_map"),
        ({}, "model_type = None"),
        (LLAMA | {"logit_scale": 2.0}, "logit_scale = 2.0"),
        (LLAMA | {"rms_norm_epsilon": 1e-5}, "did you mean 'rms_norm_eps'"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu' or 'swish'"),
        (LLAMA | {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        (LLAMA | {"sliding_window": 128}, "sliding_window = 128"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClass"),
        (LLAMA | {"hidden_size": 9}, "hidden_size = 9"),
        (LLAMA | {"num_key_value_heads": 3}, "num_heads .*num_kv_heads = 3"),
        (LLAMA | {"head_dim": 5}, "head_dim is 5"),
        (LLAMA | {"hidden_size": None}, "hidden_size"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (LLAMA | {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "'linear' .*factor"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor = -1.0"),
        (LLAMA | {"rope_parameters": {"mrope_section": [1]}}, "mrope_section ="),
        (LLAMA | {"rope_parameters": {"full_attention": {}}}, r"\(full_attention\)"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            LLAMA | {"rope_parameters": {"factor": 2.0}, "rope_scaling": {"factor": 3.0}},
            "rope_parameters = .* rope_scaling =",
        ),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        (GEMMA3 | {"sliding_window": None}, "sliding_window is null"),
        (GEMMA3 | {"rope_parameters": {"rope_type": "default"}}, "rope_type = 'default'"),
        (LLAMA | {"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv = 8.0"),
        (LLAMA | {"model_type": "phi3", "attention_bias": True}, "attention_bias = True"),
        (LLAMA | {"model_type": "phi3", "partial_rotary_factor": 2.0}, "at most 1.0"),
        (LLAMA | {"model_type": "phi3", "rope_scaling": LONGROPE}, "short_factor has 3"),
        (LLAMA | NEOX | {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        (LLAMA | {"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers of 1"),
        (DEEPSEEK_V3 | {"head_dim": 128}, "head_dim = 128.*qk_rope_head_dim"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        (DEEPSEEK_V3 | {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (DEEPSEEK_V3 | {"n_group": 7}, "n_group is 7"),
        (DEEPSEEK_V3 | {"n_group": 256}, "n_group is 256"),
        (DEEPSEEK_V3 | {"topk_group": 9}, "topk_group is 9"),
        (DEEPSEEK_V3 | {"num_experts_per_tok": 129}, "num_experts_per_tok is 129"),
        (DEEPSEEK_V3 | {"num_key_value_heads": 1}, "num_kv_heads is 1"),
        (LLAMA4 | {"layer_types": ["sliding_attention"] * 2}, "'sliding_attention'"),
        (LLAMA4 | {"no_rope_layers": [1]}, "no_rope_layers of 1"),
        (LLAMA4 | {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (
            LLAMA4 | {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 2},
            "attention_chunk_size is null",
        ),
        (
            {"model_type": "mistral3", "text_config": LLAMA | {"model_type": "ministral3"}},
            "text_config sets model_type = 'ministral3'",
        ),
        (GEMMA4 | {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256"),
        (
            {key: value for key, value in GEMMA4.items() if "per_layer" not in key},
            "hidden_size_per_layer_input = 256",
        ),
        (GEMMA4 | {"num_kv_shared_layers": 1}, "num_kv_shared_layers = 1"),
        (GEMMA4 | {"enable_moe_block": True}, "enable_moe_block = True"),
        (GEMMA4 | {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        (GEMMA4 | {"per_layer_config": {"0": {"head_dim": 8}}}, "layers differ from the model"),
        (GEMMA4 | {"per_layer_config": {"1": {"sliding_window": 8}}}, "with sliding_window"),
        (GPT2 | {"n_head": 5}, "n_head = 5"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx = True"),
        (BLOOM | {"hidden_dropout": 0.1}, "hidden_dropout = 0.1"),
        (BLOOM | {"n_inner": 16}, "n_inner = 16"),
        (BLOOM | {"n_head": 3}, "hidden_size .*num_heads = 3"),
        (BLOOM | {"alibi": False}, "alibi = False"),
    ],
    ids=str,
)
def test_unsupported_configurations_raise_with_the_attribute(config, message):
    with pytest.raises(ValueError, match=message):
        build_model(config)


@pytest.mark.parametrize(
    "config",
    [
        {"qk_norm": None, "_attn_implementation_autoset": True},
        {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "m.M"}},
        {"temperature": 0.7, "max_length": 20, "is_decoder": False},
        {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},  # SmolLM2's
    ],
)
def test_irrelevant_attributes_are_accepted(config):
    assert build_model(LLAMA | config) == build_model(LLAMA)


def test_models_that_compute_the_same_are_equal_and_hash_equally():
    one, other = build_model(LLAMA), build_model(LLAMA | {"eos_token_id": 5})
    assert one == other
    assert hash(one) == hash(other)
    assert other.hf_config["eos_token_id"] == 5
    assert one != build_model(LLAMA | {"rms_norm_eps": 1e-5})


@pytest.mark.parametrize("config", [LLAMA, LLAMA | {"tie_word_embeddings": True}, BLOOM])
def test_axes_names_and_shapes_are_consistent(config):
    model = build_model(config)
    shapes, axes = flatten(model.abstract_params(jnp.bfloat16)), flatten(model.logical_axes())
    assert shapes.keys() == axes.keys() == model.hf_names().keys()
    sizes = {"layers": 2, "vocab": 32, "embed": 8}
    for path, leaf in shapes.items():
        assert leaf.dtype == jnp.bfloat16
        for axis, size in zip(axes[path], leaf.shape, strict=True):
            assert sizes.get(axis, size) == size
    assert ("lm_head", "kernel") not in shapes or not config.get("tie_word_embeddings")


def test_module_names_match_hugging_face():
    llama, bloom = build_model(LLAMA), build_model(BLOOM)
    path = ("layers", "self_attn", "q_proj", "kernel")
    assert llama.module_name(path, 1) == "model.layers.1.self_attn.q_proj"
    assert llama.module_name(("lm_head", "kernel")) == "lm_head"
    path = ("layers", "mlp", "dense_h_to_4h", "kernel")
    assert bloom.module_name(path, 0) == "transformer.h.0.mlp.dense_h_to_4h"
    assert bloom.hf_names()[path].name(1) == "transformer.h.1.mlp.dense_h_to_4h.weight"
    with pytest.raises(ValueError, match="layer is None"):
        bloom.module_name(path)


def test_random_parameters_have_the_configured_distribution(key):
    model = build_model(LLAMA | {"vocab_size": 4096, "initializer_range": 0.1})
    params = model.init_params(key, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(params["norm"]["scale"].astype(jnp.float32), 1.0)
    table = params["embed_tokens"]["embedding"].astype(jnp.float32)
    assert abs(table.std() - 0.1) < 0.002
    assert abs(table.mean()) < 0.002
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_random_parameters_drawn_in_several_groups_all_differ(key, monkeypatch):
    monkeypatch.setattr("peft_jax.models.model._MAX_DRAW", 600)
    params = build_model(LLAMA | {"vocab_size": 33}).init_params(key)
    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.std() > 0]
    assert all(abs(leaf.std() - 0.02) < 0.01 for leaf in leaves)
    assert len({float(leaf.ravel()[0]) for leaf in leaves}) == len(leaves) == 9


def test_parameters_of_another_model_are_rejected(key):
    model = build_model(LLAMA)
    params = model.init_params(key)
    tokens = jnp.zeros((1, 3), jnp.int32)
    bias = {**params, "norm": {**params["norm"], "bias": jnp.zeros(8)}}
    with pytest.raises(ValueError, match=r"norm\.bias"):
        model(bias, tokens)
    with pytest.raises(ValueError, match=r"norm\.scale"):
        model({**params, "norm": {}}, tokens)
