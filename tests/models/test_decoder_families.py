"""Each family of decoders agrees with transformers and PEFT, in every variant of its settings.

Checked are logits (with padding, packing, offsets, windows shorter and longer than a row), decoding
with a cache, gradients of a LoRA adapter, saved models, sharding and execution settings.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core import flatten
from peft_jax.hub import load_adapter, load_model, save_model
from peft_jax.models import ExecutionSettings
from peft_jax.parallel import LogicalAxisRules, MeshSettings, make_mesh, on_mesh, sharding_tree
from peft_jax.training.losses import chunked_cross_entropy

GQA = {"num_key_value_heads": 2}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SMALL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = GQA | SMALL_IDS | {"head_dim": 16}
GEMMA2 = GEMMA | {"num_hidden_layers": 5, "sliding_window": 5, "query_pre_attn_scalar": 24}
GEMMA3 = GEMMA2 | {"num_hidden_layers": 8, "sliding_window_pattern": 3}
GEMMA4 = GEMMA | {
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 24,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
SMOLLM3 = GQA | SMALL_IDS | {"num_hidden_layers": 6, "no_rope_layer_interval": 2}
GRANITE = GQA | {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 4.0,
}
OLMO2 = GQA | SMALL_IDS
OLMO3 = OLMO2 | {"num_hidden_layers": 6, "sliding_window": 5}
MIXTRAL = GQA | {"num_local_experts": 4}
COHERE2 = GQA | SMALL_IDS | {"num_hidden_layers": 5, "sliding_window": 5, "logit_scale": 0.5}
GLM4 = GQA | SMALL_IDS | {"head_dim": 16}
GLM4_MOE = (
    GLM4
    | {"num_hidden_layers": 4, "n_routed_experts": 6, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16}
)
MINISTRAL = GQA | {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
QWEN3_MOE = (
    GQA
    | {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3}
    | {"moe_intermediate_size": 16}
)
# Small enough that rows have several chunks and temperatures.
LLAMA4 = (
    GQA
    | SMALL_IDS
    | {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "intermediate_size": 16,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 4,
        "floor_scale": 3,
        "attn_scale": 0.5,
    }
)
QWEN2_MOE = (
    GQA
    | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 24}
)
GPT_OSS = MIXTRAL | {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 5}
NEAR_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "truncate": False,
    "rope_theta": 500.0,
}
DEEPSEEK_V3 = SMALL_IDS | {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
}
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "mscale": 0.8,
    "mscale_all_dim": 1.0,
}
STEEP = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}
PHI3 = SMALL_IDS | {"num_key_value_heads": 4}
ORIGINAL = "original_max_position_embeddings"
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.5, 4.0, 8.0, 16.0],
}
LONGROPE_HALF = LONGROPE | {"short_factor": [1.0, 2.0], "long_factor": [2.0, 9.0]}
GLOBAL_YARN = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
GLOBAL_LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# The first variant of a family is checked in all respects.
VARIANTS = {
    "cohere2": ("Cohere2", COHERE2),
    "cohere2 long window": ("Cohere2", COHERE2 | {"sliding_window": 40}),
    "cohere2 all sliding, biased, untied": (
        "Cohere2",
        COHERE2
        | {"layer_types": ["sliding_attention"] * 5, "attention_bias": True}
        | {"tie_word_embeddings": False},
    ),
    "cohere2 all full, all heads": (
        "Cohere2",
        SMALL_IDS | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    ),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_V3),
    "deepseek_v3 yarn, tied": (
        "DeepseekV3",
        DEEPSEEK_V3 | {"rope_parameters": DEEPSEEK_YARN, "tie_word_embeddings": True},
    ),
    "deepseek_v3 whole queries, one group, shared": (
        "DeepseekV3",
        DEEPSEEK_V3
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
        | {"rope_interleave": False},
    ),
    "deepseek_v3 biased, all experts": (
        "DeepseekV3",
        DEEPSEEK_V3 | {"attention_bias": True, "first_k_dense_replace": 0},
    ),
    "deepseek_v3 unnormalized, no experts": (
        "DeepseekV3",
        DEEPSEEK_V3 | {"norm_topk_prob": False, "first_k_dense_replace": 4},
    ),
    "gemma": ("Gemma", GEMMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma one kv head": ("Gemma", GEMMA | {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2 long window": ("Gemma2", GEMMA2 | {"sliding_window": 40}),
    "gemma2 biased, untied": (
        "Gemma2",
        GEMMA2 | {"attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 4},
    ),
    "gemma2 uncapped": (
        "Gemma2",
        GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2 low caps": (
        "Gemma2",
        GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3 long window": ("Gemma3", GEMMA3 | {"sliding_window": 40}),
    "gemma3 linear": ("Gemma3", GEMMA3 | {"rope_parameters": GLOBAL_LINEAR}),
    "gemma3 whole periods": ("Gemma3", GEMMA3 | {"num_hidden_layers": 6}),
    "gemma3 capped logits": ("Gemma3", GEMMA3 | {"final_logit_softcapping": 8.0}),
    "gemma3 all sliding": ("Gemma3", GEMMA3 | {"layer_types": ["sliding_attention"] * 8}),
    "gemma4": ("Gemma4", GEMMA4),
    "gemma4 own values, long window, capped": (
        "Gemma4",
        GEMMA4 | {"attention_k_eq_v": False, "sliding_window": 40, "final_logit_softcapping": 8.0},
    ),
    "gemma4 equal heads, biased, untied": (
        "Gemma4",
        GEMMA4
        | {"global_head_dim": 16, "num_global_key_value_heads": 2, "attention_bias": True}
        | {"tie_word_embeddings": False, "attention_k_eq_v": False},
    ),
    "gemma4 all full, default rope": (
        "Gemma4",
        GEMMA4
        | {"layer_types": ["full_attention"] * 4}
        | {"rope_parameters": {"full_attention": GLOBAL_YARN["sliding_attention"]}},
    ),
    "glm4": ("Glm4", GLM4),
    "glm4 unbiased, tied": ("Glm4", GLM4 | {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4 all rotated": ("Glm4", GLM4 | {"rope_parameters": {"partial_rotary_factor": 1.0}}),
    "glm4_moe": ("Glm4Moe", GLM4_MOE),
    "glm4_moe normed, biased, tied": (
        "Glm4Moe",
        GLM4_MOE
        | {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": True}
        | {"first_k_dense_replace": 2, "routed_scaling_factor": 1.7},
    ),
    "glm4_moe groups, unnormalized, shared": (
        "Glm4Moe",
        GLM4_MOE | {"n_group": 3, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2},
    ),
    "granite": ("Granite", GRANITE),
    "granite biased, tied": (
        "Granite",
        GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite plain": ("Granite", GQA),
    "llama4": ("Llama4", LLAMA4),
    "llama4 all experts, unnormed, tied": (
        "Llama4",
        LLAMA4
        | {"interleave_moe_layer_step": 1, "num_experts_per_tok": 2, "use_qk_norm": False}
        | {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 0, 1]},
    ),
    "llama4 no experts, no chunks, biased": (
        "Llama4",
        LLAMA4
        | {"moe_layers": [], "attention_chunk_size": None, "attention_bias": True}
        | {"attn_temperature_tuning": False},
    ),
    "llama4 steep llama3 rope, all chunked": (
        "Llama4",
        LLAMA4
        | {"rope_parameters": STEEP, "layer_types": ["chunked_attention"] * 4, "moe_layers": [3]},
    ),
    "ministral": ("Ministral", MINISTRAL),
    "ministral long window, tied": (
        "Ministral",
        MINISTRAL | {"sliding_window": 40, "tie_word_embeddings": True},
    ),
    "ministral full": ("Ministral", MINISTRAL | {"layer_types": ["full_attention"] * 3}),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral windowed, tied": (
        "Mixtral",
        MIXTRAL | {"sliding_window": 5, "tie_word_embeddings": True, "rope_theta": 500.0},
    ),
    "mixtral one expert": ("Mixtral", MIXTRAL | {"num_experts_per_tok": 1}),
    "mixtral all experts": ("Mixtral", MIXTRAL | {"num_experts_per_tok": 4}),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE),
    "qwen3_moe normalized, biased": (
        "Qwen3Moe",
        QWEN3_MOE | {"norm_topk_prob": True, "attention_bias": True},
    ),
    "qwen3_moe windowed, tied": (
        "Qwen3Moe",
        QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": True},
    ),
    "qwen3_moe some dense": (
        "Qwen3Moe",
        QWEN3_MOE | {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]},
    ),
    "qwen3_moe every other": (
        "Qwen3Moe",
        QWEN3_MOE | {"num_hidden_layers": 5, "decoder_sparse_step": 2},
    ),
    "qwen2_moe": ("Qwen2Moe", QWEN2_MOE),
    "qwen2_moe some dense, normalized, unbiased": (
        "Qwen2Moe",
        QWEN2_MOE
        | {"num_hidden_layers": 5, "mlp_only_layers": [1], "norm_topk_prob": True}
        | {"qkv_bias": False},
    ),
    "qwen2_moe windowed, tied": (
        "Qwen2Moe",
        QWEN2_MOE
        | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4}
        | {"max_window_layers": 3, "tie_word_embeddings": True},
    ),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss long window": ("GptOss", GPT_OSS | {"sliding_window": 40}),
    "gpt_oss near yarn, tied": (
        "GptOss",
        GPT_OSS | {"rope_parameters": NEAR_YARN, "tie_word_embeddings": True},
    ),
    "gpt_oss clamped": ("GptOss", GPT_OSS | {"swiglu_alpha": 3.0, "swiglu_limit": 0.5}),
    "gpt_oss unbiased, all full": (
        "GptOss",
        GPT_OSS | {"attention_bias": False, "layer_types": ["full_attention"] * 4},
    ),
    "olmo2": ("Olmo2", OLMO2),
    "olmo2 biased, tied": (
        "Olmo2",
        OLMO2 | {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 500000.0},
    ),
    "olmo2 all heads": ("Olmo2", SMALL_IDS),
    "olmo3": ("Olmo3", OLMO3),
    "olmo3 long window": ("Olmo3", OLMO3 | {"sliding_window": 40}),
    "olmo3 yarn": ("Olmo3", OLMO3 | {"rope_parameters": GLOBAL_YARN}),
    "smollm3": ("SmolLM3", SMOLLM3),
    "smollm3 all rotated": ("SmolLM3", SMOLLM3 | {"no_rope_layers": [1] * 6}),
    "smollm3 irregular": ("SmolLM3", SMOLLM3 | {"no_rope_layers": [1, 0, 0, 1, 1, 0]}),
    "smollm3 windowed": ("SmolLM3", SMOLLM3 | {"use_sliding_window": True, "sliding_window": 5}),
    "smollm3 biased, untied": (
        "SmolLM3",
        SMOLLM3 | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "phi3": ("Phi3", PHI3),
    "phi3 grouped, windowed": ("Phi3", PHI3 | GQA | {"sliding_window": 5}),
    "phi3 long window, tied": (
        "Phi3",
        PHI3 | {"sliding_window": 40, "tie_word_embeddings": True},
    ),
    "phi3 partial": ("Phi3", PHI3 | {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "phi3 short rope": ("Phi3", PHI3 | {"rope_parameters": LONGROPE} | {ORIGINAL: 64}),
    "phi3 long rope": ("Phi3", PHI3 | {"rope_parameters": LONGROPE} | {ORIGINAL: 4}),
    "phi3 partial long rope": (
        "Phi3",
        PHI3
        | {"rope_parameters": LONGROPE_HALF | {"partial_rotary_factor": 0.5}}
        | {ORIGINAL: 4, "tie_word_embeddings": True},
    ),
    "gpt_neox": ("GPTNeoX", SMALL_IDS),
    "gpt_neox sequential": (
        "GPTNeoX",
        SMALL_IDS | {"use_parallel_residual": False, "rotary_pct": 1.0},
    ),
    "gpt_neox unbiased, tied": (
        "GPTNeoX",
        SMALL_IDS
        | {"attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}
        | {"rotary_emb_base": 500.0},
    ),
    "gpt2": ("GPT2", SMALL_IDS),
    "gpt2 untied, inner": (
        "GPT2",
        SMALL_IDS | {"tie_word_embeddings": False, "n_inner": 48, "activation_function": "relu"},
    ),
    "gpt2 unscaled": ("GPT2", SMALL_IDS | {"scale_attn_weights": False, "n_layer": 1}),
    "qwen2 mixed": (
        "Qwen2",
        GQA
        | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4}
        | {"max_window_layers": 2},
    ),
}
PARAMETERS = {
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    "llama4": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}
"""Parameters that PEFT adapts if they are named."""
MODULES = {"llama4": r".*(self_attn|shared_expert|feed_forward)\.\w+_proj"}
"""Modules that PEFT can adapt, where these are not all linear maps: Llama 4's router returns two
arrays."""
SWAPPED = ("llama4",)
"""Families whose experts' inputs PEFT takes for their outputs."""
BY_SLOT = ("llama4",)
"""Families whose chunks and temperatures count slots in transformers, and positions here."""
FIRST = list({kind: name for name, (kind, _) in reversed(VARIANTS.items())}.values())
TOLERANCE = 1e-5
UNSCALED = 3e-5
"""Tolerance of Gemma 4, whose scores are not scaled, which magnifies rounding."""


def tolerance(name):
    """Returns the tolerance of a variant."""
    return UNSCALED if name.split()[0] == "gemma4" else TOLERANCE


def fast(names, *quick):
    """Marks all but a few variants slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def variant(pair):
    """Returns a function that makes a variant, here and in transformers."""
    return lambda name: pair(VARIANTS[name][0], **VARIANTS[name][1])


INDEX, LENGTHS = np.arange(13)[None, :], np.array([13, 9, 4])[:, None]
ROWS = {
    "whole": (np.ones((3, 13), bool), 0),
    "padded left, offset": (INDEX >= 13 - LENGTHS, 11),
    "padded right": (INDEX < LENGTHS, 0),
}


@pytest.mark.parametrize("name", fast(VARIANTS, *FIRST))
def test_logits_agree_with_transformers(name, variant, tokens, relative_error):
    theirs, model, params = variant(name)
    forward = jax.jit(model)

    def ours(positions, segment_ids):
        positions, segment_ids = (
            jnp.broadcast_to(jnp.asarray(array, jnp.int32), tokens.shape)
            for array in (positions, segment_ids)
        )
        return np.asarray(forward(params, tokens, positions=positions, segment_ids=segment_ids))

    for case, (mask, offset) in ROWS.items():
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) + offset
        if offset and name.split()[0] in BY_SLOT:
            positions, expected = positions - offset, rows_alone(theirs, tokens, mask)
        else:
            expected = theirs.logits(tokens, mask=mask, positions=positions)
        found = ours(positions, mask)
        assert relative_error(found[mask], expected[mask]) < tolerance(name), case
    found = ours(np.r_[0:5, 0:6, 0:2], np.repeat([1, 2, 0], [5, 6, 2]))
    for segment in (slice(0, 5), slice(5, 11)):
        expected = theirs.logits(tokens[:, segment])
        assert relative_error(found[:, segment], expected) < tolerance(name)


def rows_alone(theirs, tokens, mask):
    """Returns the logits of each row without its padding on the left, which gets zeros."""
    rows = []
    for row, own in zip(np.asarray(tokens), mask, strict=True):
        padded = len(own) - own.sum()
        rows.append(np.pad(theirs.logits(row[None, padded:])[0], ((padded, 0), (0, 0))))
    return np.stack(rows)


@pytest.mark.parametrize("name", fast(VARIANTS, "gemma3"))
def test_decoding_with_a_cache_agrees_with_transformers(name, variant, tokens, relative_error):
    theirs, model, params = variant(name)
    lengths = np.array([8, 5, 1])
    mask = jnp.asarray(np.arange(8) >= 8 - lengths[:, None], jnp.int32)

    @jax.jit
    def decode(params, tokens):
        cache = model.init_cache(3, 16)
        hidden, cache = model.hidden_states(params, tokens[:, :8], segment_ids=mask, cache=cache)

        def step(cache, token):
            hidden, cache = model.hidden_states(params, token[:, None], cache=cache)
            return cache, hidden[:, 0]

        _, steps = jax.lax.scan(step, cache, tokens[:, 8:].T)
        return model.logits(params, jnp.concatenate([hidden, jnp.swapaxes(steps, 0, 1)], axis=1))

    logits = decode(params, tokens)
    for row, length in enumerate(lengths):
        expected = theirs.logits(tokens[row : row + 1, 8 - length :])[0]
        assert relative_error(logits[row, 8 - length :], expected) < tolerance(name)


@pytest.mark.parametrize("name", fast(FIRST, "gemma2", "gpt2"))
def test_saved_models_load_in_transformers(name, variant, tokens, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, model, params = variant(name)
    save_model(tmp_path, model, params)
    theirs_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, found = theirs.module.state_dict(), theirs_again.state_dict()
    assert type(theirs_again) is type(theirs.module)
    assert found.keys() == expected.keys()
    assert all((found[key] == expected[key]).all() for key in expected)
    again, read = load_model(tmp_path)
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))


@pytest.mark.parametrize("name", fast(FIRST, "gemma2"))
def test_gradients_of_an_adapter_agree_with_peft(name, variant, tokens, relative_error, tmp_path):
    pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    theirs, model, params = variant(name)
    adapter = peft_adapter(
        copy.deepcopy(theirs.module),
        tmp_path,
        MODULES.get(name, "all-linear"),
        PARAMETERS.get(name, []),
    )
    inputs = torch.tensor(np.asarray(tokens), dtype=torch.long)
    adapter(input_ids=inputs, labels=inputs).loss.backward()
    expected = {
        parameter.removesuffix(".default.weight").replace(".default", ""): value.grad.numpy()
        for parameter, value in adapter.named_parameters()
        if value.requires_grad
    }
    spec, state = load_adapter(tmp_path, model, params)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
        hidden, _ = model.hidden_states(bound, tokens)
        loss, count = chunked_cross_entropy(
            hidden[:, :-1].reshape(-1, hidden.shape[-1]),
            model.head_kernel(bound),
            tokens[:, 1:].reshape(-1),
            jnp.ones(tokens[:, 1:].size),
            chunk_size=12,
            logit_rule=model.logit_rule,
        )
        return loss / count

    found = {}
    for path, stacked in flatten(gradient(state.trainable)).items():
        kernel = path[: path.index("kernel") + 1]
        for layer, one in zip(model.layers_of(kernel), np.asarray(stacked), strict=True):
            module, leaf = model.module_name(kernel, layer), path[-1]
            if "experts" in kernel:
                module, _, parameter = module.rpartition(".")
                module += ".base_layer" if parameter == "gate_up_proj" else ""
                if name in SWAPPED:
                    one, leaf = one.swapaxes(1, 2), {"a": "b", "b": "a"}[leaf]
                # [experts, d_in, r] to [r experts, d_in], and [experts, r, d_out] to [d_out, …].
                one = one.swapaxes(1, 2).reshape(-1, one.shape[1]).T if leaf == "a" else one
                one = one.T.reshape(one.shape[-1], -1).T if leaf == "b" else one
            end = {"a": "lora_A", "b": "lora_B"}[leaf]
            found[f"base_model.model.{module}.{end}"] = one.T
    assert found.keys() == {name.removesuffix(".weight") for name in expected}
    for key, value in expected.items():
        assert relative_error(found[key.removesuffix(".weight")], value) < 1e-4, key


def peft_adapter(module, folder, modules, parameters):
    """Returns PEFT's LoRA adapter with random values, and saves it.

    It adapts some linear maps and some parameters. PEFT itself adds those of Mixtral and Qwen3 MoE.
    """
    import peft
    import torch

    settings = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=modules, target_parameters=parameters
    )
    adapter = peft.get_peft_model(module, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter.save_pretrained(folder)
    return adapter


EXECUTIONS = {
    "unrolled": {"scan_layers": False},
    "chunked": {"attention": "chunked", "remat": "full"},
    "dots": {"remat": "dots"},
}


@pytest.mark.slow
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", FIRST)
def test_execution_settings_leave_logits_and_gradients_the_same(
    name, execution, variant, tokens, relative_error
):
    _, model, params = variant(name)
    other = model.with_execution(ExecutionSettings(**EXECUTIONS[execution]))

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params):
        def loss(params):
            return jnp.mean(jnp.square(model(params, tokens)))

        return jax.value_and_grad(loss)(params)

    for found, expected in zip(
        *(jax.tree.leaves(run(one, params)) for one in (other, model)), strict=True
    ):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", fast(FIRST, "gemma3"))
def test_sharded_and_unsharded_logits_agree(name, variant, tokens, relative_error):
    _, model, params = variant(name)
    rows = jnp.concatenate([tokens, tokens[:1]])[:, :12]
    expected = jax.jit(model)(params, rows)
    mesh, rules = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2)), LogicalAxisRules()
    shardings = sharding_tree(model.logical_axes(), mesh, rules, model.abstract_params())
    with on_mesh(mesh, rules):
        found = jax.jit(model)(jax.device_put(params, shardings), rows)
    assert relative_error(found, expected) < TOLERANCE


VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 8}
VISION |= {"num_attention_heads": 1, "patch_size": 4}
WITH_IMAGES = {
    "gemma3": (
        "Gemma3",
        GEMMA3 | {"num_hidden_layers": 3},
        VISION,
        {"mm_tokens_per_image": 1, "image_token_index": 60},
    ),
    "gemma4": (
        "Gemma4",
        GEMMA4,
        VISION | {"head_dim": 8, "num_key_value_heads": 1, "position_embedding_size": 16},
        {"image_token_id": 60, "audio_config": None},
    ),
    "llama4": (
        "Llama4",
        LLAMA4,
        VISION | {"vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8},
        {"image_token_index": 60},
    ),
    "mistral3": (
        "Mistral3",
        GQA | {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": None},
        VISION | {"head_dim": 8},
        {"image_token_index": 60, "tie_word_embeddings": False},
    ),
}
"""Class in transformers, settings of the language model, of the vision tower and of the whole."""


@pytest.mark.parametrize("name", fast(WITH_IMAGES, "mistral3"))
def test_the_language_model_of_a_model_with_images_loads_and_saves(name, tokens, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    kind, text, vision, settings = copy.deepcopy(WITH_IMAGES[name])
    config = getattr(transformers, f"{kind}Config")(
        text_config=LLAMA | text, vision_config=vision, **settings
    )
    module = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    module.save_pretrained(tmp_path / "whole")
    rows = torch.tensor(np.asarray(tokens) % 60, dtype=torch.long)

    def theirs(module):
        # The whole of Llama 4 fails without images in this version of transformers.
        if type(module).__name__ == "Llama4ForConditionalGeneration":
            module = module.language_model
        with torch.no_grad():
            return module(input_ids=rows).logits.numpy()

    model, params = load_model(tmp_path / "whole")
    found = jax.jit(model)(params, tokens % 60)
    np.testing.assert_allclose(found, theirs(module), atol=1e-5)
    save_model(tmp_path / "alone", model, params)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert type(alone).__name__ == model.family.alone.architecture
    np.testing.assert_array_equal(theirs(alone), theirs(module))
    again, _ = load_model(tmp_path / "alone")
    assert again.config == model.config

    settings = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|up_proj)")
    peft.get_peft_model(module, settings).save_pretrained(tmp_path / "adapter")
    spec, _ = load_adapter(tmp_path / "adapter", model, params)
    assert spec.target_modules == ("q_proj", "up_proj")
