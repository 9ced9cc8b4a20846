"""Packed kernels of gpt-oss, compared with transformers' conversion and the format's definition."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from peft_jax.convert import convert_checkpoint
from peft_jax.core import flatten
from peft_jax.hub import load_model, save_model
from peft_jax.hub.mxfp4 import unpack
from peft_jax.models import build_model

CONFIG = {
    "model_type": "gpt_oss",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
EXPERTS = ("layers", "mlp", "experts")


def packed(generator, experts, d_out, d_in):
    blocks = generator.integers(0, 256, (experts, d_out, d_in // 32, 16), dtype=np.uint8)
    return blocks, generator.integers(120, 131, blocks.shape[:-1], dtype=np.uint8)


def test_values_are_those_of_the_formats_definition():
    # E2M1: (-1)^s 2^(e - 1) (1 + m / 2), or m / 2 where e = 0. E8M0: 2^(byte - 127).
    codes = np.arange(16)
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, codes & 1
    size = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    levels = (-1.0) ** sign * size
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    scales = np.array([[0, 1, 90, 126, 127, 128, 200, 252] * 2], np.uint8)
    expected = np.empty((1, 16, 16, 2))
    expected[..., 0], expected[..., 1] = levels[blocks % 16], levels[blocks // 16]
    expected *= 2.0 ** (scales.astype(float) - 127)[..., None, None]
    np.testing.assert_array_equal(unpack(blocks, scales), expected.reshape(1, -1))


def test_values_agree_with_transformers():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed(np.random.default_rng(0), 3, 8, 64)
    expected = convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(unpack(blocks, scales).swapaxes(1, 2), expected.numpy())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a packed checkpoint, and the experts' kernels by layer and name."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    model = build_model(CONFIG)
    save_model(folder, model, model.init_params(jax.random.key(0)))
    file = folder / "model.safetensors"
    tensors, kernels = safetensors.numpy.load_file(file), {}
    generator = np.random.default_rng(1)
    for layer in range(2):
        for name, d_out, d_in in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            full = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[full]
            blocks, scales = packed(generator, 3, d_out, d_in)
            tensors |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
            kernels[layer, name] = unpack(blocks, scales).swapaxes(1, 2)
    safetensors.numpy.save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CONFIG["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder, kernels


def test_packed_checkpoints_load_and_are_saved_in_bfloat16(checkpoint, tmp_path):
    folder, kernels = checkpoint
    model, params = load_model(folder, dtype="bfloat16")
    leaves = flatten(params)
    for (layer, name), expected in kernels.items():
        found = leaves[(*EXPERTS, name, "kernel")][layer]
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected)
    save_model(tmp_path, model, params)
    saved = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    again, found = load_model(tmp_path, dtype="bfloat16")
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_packed_checkpoints_convert_without_rounding(checkpoint, tmp_path):
    folder, kernels = checkpoint
    convert_checkpoint(str(folder), str(tmp_path / "converted"))
    _, params = load_model(tmp_path / "converted")
    for (layer, name), expected in kernels.items():
        np.testing.assert_array_equal(flatten(params)[(*EXPERTS, name, "kernel")][layer], expected)


@pytest.mark.slow
def test_packed_checkpoints_give_the_logits_of_transformers(checkpoint):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder, _ = checkpoint
    settings = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(1, 61, (2, 9)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model, params = load_model(folder)
    error = np.abs(np.asarray(jax.jit(model)(params, tokens)) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), "lacks .*down_proj_scales"),
        (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"][:, :4]}), "down_proj_scales has"),
        (lambda t, n: t[f"{n}_scales"].fill(255), "down_proj_scales .* NaN or infinity"),
        (
            lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"].astype(np.float32)}),
            "down_proj_blocks .* F32, but packed kernels must have U8",
        ),
    ],
    ids=["missing", "shape", "NaN", "dtype"],
)
def test_damaged_packed_tensors_are_named(changes, message, checkpoint, tmp_path):
    folder, _ = checkpoint
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    changes(tensors, "model.layers.1.mlp.experts.down_proj")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_the_published_configuration_is_read():
    published = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    }
    model = build_model(published)
    sizes = jax.tree.leaves(model.abstract_params())
    assert sum(leaf.size for leaf in sizes) == 20_914_757_184
    assert [layer.window for layer in model.config.layers[:2]] == [128, None]
    assert (model.config.gate.alpha, model.config.gate.limit) == (1.702, 7.0)


def test_other_packings_are_rejected_by_name():
    with pytest.raises(ValueError, match=r"quant_method = 'bitsandbytes'.* mxfp4 only"):
        build_model(CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}})
