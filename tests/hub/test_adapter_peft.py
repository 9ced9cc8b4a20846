"""Adapters exchanged with Hugging Face PEFT compute the same there and here."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from peft_jax.adapters import (
    BOFT,
    EVA,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    AdapterSpec,
    DoRA,
    FourierFT,
    Full,
    GraLoRA,
    HiRA,
    Hybrid,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAGA,
    LoRAOne,
    MiSS,
    PiSSA,
    RandLora,
    SHiRA,
    Unitary,
    VeRA,
)
from peft_jax.core import flatten
from peft_jax.hub import export_merged, load_adapter, save_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4

LLAMA_SPECS = {
    "lora": AdapterSpec(method=LoRA(rank=2, alpha=3.0)),
    "lora some modules": AdapterSpec(
        method=LoRA(rank=2), target_modules=("q_proj", "mlp.up_proj", "lm_head")
    ),
    "lora patterns": AdapterSpec(
        method=LoRA(rank=2, alpha=2.0),
        exclude_modules=("o_proj",),
        rank_pattern={"q_proj": 4, r".*\.mlp\..*": 1},
        alpha_pattern={"up_proj": 5.0, "k_proj": 0.5},
        modules_to_save=("norm", "lm_head", "input_layernorm"),
    ),
    "lora rank-stabilized": AdapterSpec(
        method=LoRA(rank=3, rank_stabilized=True), rank_pattern={"self_attn.k_proj": 5}
    ),
    "dora": AdapterSpec(
        method=DoRA(rank=2), rank_pattern={"q_proj": 3}, modules_to_save=("lm_head",)
    ),
    "lora_ga": AdapterSpec(
        method=LoRAGA(rank=2, alpha=3.0), rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 1.0}
    ),
    "lora_ga not rank-stabilized": AdapterSpec(
        method=LoRAGA(rank=2, alpha=3.0, rank_stabilized=False), modules_to_save=("lm_head",)
    ),
    "lora_fa": AdapterSpec(method=LoRAFA(rank=3), rank_pattern={"q_proj": 2}),
    "lora_one": AdapterSpec(method=LoRAOne(rank=2)),
    "eva": AdapterSpec(method=EVA(rank=2), rank_pattern={"q_proj": 3}),
    "vera": AdapterSpec(method=VeRA(rank=32), modules_to_save=("norm",)),
    "randlora": AdapterSpec(method=RandLora(rank=5), modules_to_save=("norm",)),
    "fourierft": AdapterSpec(method=FourierFT(n_frequency=50), modules_to_save=("norm",)),
    "shira": AdapterSpec(method=SHiRA(rank=2), modules_to_save=("norm",)),
    "adalora": AdapterSpec(method=AdaLoRA(rank=3), modules_to_save=("norm",)),
    "pissa": AdapterSpec(method=PiSSA(rank=2), rank_pattern={"q_proj": 3}),
    "loha": AdapterSpec(
        method=LoHa(rank=2), rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 1.0}
    ),
    "lokr": AdapterSpec(method=LoKr(rank=1), modules_to_save=("norm",)),
    "gralora": AdapterSpec(method=GraLoRA(rank=4), modules_to_save=("norm",)),
    "hybrid gralora": AdapterSpec(method=GraLoRA(rank=4, blocks=4, hybrid_rank=1)),
    "hira": AdapterSpec(method=HiRA(rank=2), modules_to_save=("norm",)),
    "miss": AdapterSpec(method=MiSS(rank=5)),
    "ia3": AdapterSpec(
        method=IA3(feedforward_modules=("down_proj", "o_proj")),
        target_modules=("k_proj", "v_proj", "o_proj", "down_proj"),
    ),
    "oft": AdapterSpec(method=OFT(block_size=4), modules_to_save=("lm_head",)),
    "hra": AdapterSpec(method=HRA(rank=4)),
    "boft": AdapterSpec(
        method=BOFT(block_size=4, n_butterfly_factors=1), modules_to_save=("lm_head",)
    ),
    "boft odd blocks": AdapterSpec(
        method=BOFT(block_size=3, n_butterfly_factors=1), target_modules=("down_proj",)
    ),
    "boft two factors": AdapterSpec(method=BOFT(block_size=4, n_butterfly_factors=2)),
    "boft three factors": AdapterSpec(
        method=BOFT(block_size=2, n_butterfly_factors=3), modules_to_save=("norm",)
    ),
}
BLOOM_SPECS = {
    "ia3 of inputs": AdapterSpec(
        method=IA3(feedforward_modules=("dense_4h_to_h",)), target_modules=("dense_4h_to_h",)
    ),
    "oft": AdapterSpec(method=OFT(block_size=8, neumann_terms=0)),
    "lora": AdapterSpec(
        method=LoRA(rank=2),
        rank_pattern={"dense": 4},
        modules_to_save=("ln_f", "word_embeddings_layernorm"),
    ),
    "lora_ga": AdapterSpec(method=LoRAGA(rank=2)),
    "dora": AdapterSpec(method=DoRA(rank=2)),
    "boft": AdapterSpec(method=BOFT(block_size=4, n_butterfly_factors=1)),
    "boft two factors": AdapterSpec(method=BOFT(block_size=4, n_butterfly_factors=2)),
    "lora with trained embedding": AdapterSpec(
        method=LoRA(rank=2), modules_to_save=("word_embeddings",)
    ),
}
TIED_SPECS = {
    "lora with trained embedding": AdapterSpec(
        method=LoRA(rank=2), modules_to_save=("embed_tokens",)
    ),
    "boft with trained embedding": AdapterSpec(
        method=BOFT(block_size=4, n_butterfly_factors=1), modules_to_save=("embed_tokens",)
    ),
}
EXPORTED = [
    *(("llama", name, spec) for name, spec in LLAMA_SPECS.items()),
    *(("bloom", name, spec) for name, spec in BLOOM_SPECS.items()),
    *(("llama tied", name, spec) for name, spec in TIED_SPECS.items()),
]


@pytest.fixture(autouse=True)
def no_cuda_extension(monkeypatch):
    """Disables PEFT's CUDA extension, for which it would search a compiler at every layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def theirs(module, tokens) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def assert_same(found, expected, away_from) -> None:
    """Asserts equality up to `TOLERANCE`, and a difference from the base."""
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < TOLERANCE * scale
    assert np.abs(found - away_from).max() > 0.05 * scale


def load_in_peft(base, folder):
    with warnings.catch_warnings():
        # PEFT only warns of unused and missing keys.
        # Modules also list the random bases that all of them share.
        missing = r".*missing adapter keys.*'[^']*(?<!randlora_A)(?<!randlora_B)\.default'"
        warnings.filterwarnings("error", message=missing)
        warnings.filterwarnings("error", message=".*[Uu]nexpected.*")
        return peft.PeftModel.from_pretrained(base.copy_of_module(), folder)


@pytest.mark.fast(
    "llama: lora patterns",
    "llama: dora",
    "llama: lora_ga not rank-stabilized",
    "llama: vera",
    "llama: boft two factors",
    "bloom: oft",
    "llama tied: lora with trained embedding",
)
@pytest.mark.parametrize(
    ("kind", "spec"),
    [pytest.param(kind, spec, id=f"{kind}: {name}") for kind, name, spec in EXPORTED],
)
def test_saved_adapters_load_in_peft(kind, spec, base, arbitrary_state, tokens, tmp_path):
    base = base(kind)
    state = arbitrary_state(spec, base.params)
    save_adapter(tmp_path / "adapter", base.model, spec, state, base_model_name="someone/base")
    ours = base.adapted_logits(tokens, spec, state)
    module = load_in_peft(base, tmp_path / "adapter")
    assert_same(ours, theirs(module, tokens), base.logits(tokens))


@pytest.mark.fast("boft two factors")
@pytest.mark.parametrize("name", ["lora patterns", "lora_ga", "boft two factors"])
def test_peft_files_written_here_load_here(name, base, arbitrary_state, tokens, tmp_path):
    base, spec = base("llama"), LLAMA_SPECS[name]
    state = arbitrary_state(spec, base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    (tmp_path / "peft_jax_adapter.json").unlink()
    found = base.adapted_logits(tokens, *load_adapter(tmp_path, base.model, base.params))
    assert_same(found, base.adapted_logits(tokens, spec, state), base.logits(tokens))


LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
CONFIGS = {
    "lora": ("llama", "LoraConfig", {"r": 3, "lora_alpha": 5, "target_modules": LINEAR["llama"]}),
    "rank-stabilized": (
        "llama",
        "LoraConfig",
        {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "patterns": (
        "llama",
        "LoraConfig",
        {
            "r": 2,
            "target_modules": r".*\.(self_attn\..*|mlp\.up)_proj",
            "rank_pattern": {"(q|k)_proj": 3, "^model.layers.[01].self_attn.v_proj": 1},
            "alpha_pattern": {"mlp.up_proj": 7, ".*k_proj": 1.5},
            "modules_to_save": ["norm", "lm_head"],
            "init_lora_weights": "gaussian",
        },
    ),
    "dora": (
        "llama",
        "LoraConfig",
        {"r": 2, "use_dora": True, "rank_pattern": {"q_proj": 3}, "target_modules": "all-linear"},
    ),
    "bloom dora": (
        "bloom",
        "LoraConfig",
        {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": LINEAR["bloom"]},
    ),
    "pissa": (
        "llama",
        "LoraConfig",
        {"r": 2, "init_lora_weights": "pissa", "target_modules": LINEAR["llama"]},
    ),
    "olora": (
        "llama",
        "LoraConfig",
        {"r": 2, "init_lora_weights": "olora", "use_rslora": True, "target_modules": ["q_proj"]},
    ),
    "loha": (
        "llama",
        "LoHaConfig",
        {"r": 2, "rank_pattern": {"q_proj": 3}, "target_modules": LINEAR["llama"]},
    ),
    "lokr": ("llama", "LoKrConfig", {"r": 1, "target_modules": LINEAR["llama"]}),
    "gralora": ("llama", "GraloraConfig", {"r": 4, "target_modules": LINEAR["llama"]}),
    "hybrid gralora": (
        "bloom",
        "GraloraConfig",
        {"r": 4, "hybrid_r": 3, "gralora_k": 4, "target_modules": LINEAR["bloom"]},
    ),
    "hira": (
        "llama",
        "HiraConfig",
        {"r": 2, "rank_pattern": {"q_proj": 3}, "target_modules": LINEAR["llama"]},
    ),
    "miss": ("llama", "MissConfig", {"r": 5, "target_modules": LINEAR["llama"]}),
    "ia3": (
        "llama",
        "IA3Config",
        {"target_modules": LINEAR["llama"], "feedforward_modules": ["down_proj"]},
    ),
    "oft": ("llama", "OFTConfig", {"oft_block_size": 4, "target_modules": LINEAR["llama"]}),
    "oft, exact and shared": (
        "bloom",
        "OFTConfig",
        {
            "oft_block_size": 8,
            "use_cayley_neumann": False,
            "block_share": True,
            "target_modules": LINEAR["bloom"],
        },
    ),
    "randlora": ("llama", "RandLoraConfig", {"r": 5, "target_modules": LINEAR["llama"]}),
    "sparse randlora": (
        "bloom",
        "RandLoraConfig",
        {"r": 5, "sparse": True, "randlora_alpha": 20, "target_modules": LINEAR["bloom"]},
    ),
    "fourierft": (
        "llama",
        "FourierFTConfig",
        {"n_frequency": 50, "random_loc_seed": 5, "target_modules": LINEAR["llama"]},
    ),
    "shira": ("llama", "ShiraConfig", {"r": 2, "target_modules": LINEAR["llama"]}),
    "hra": ("llama", "HRAConfig", {"r": 4, "target_modules": LINEAR["llama"]}),
    "all-linear": ("llama", "LoraConfig", {"r": 2, "target_modules": "all-linear"}),
    # For these, PEFT also saves a copy of the base's head.
    "lora over the head": (
        "llama",
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj", "lm_head"]},
    ),
    "boft over the head": (
        "llama",
        "BOFTConfig",
        {"boft_block_size": 4, "target_modules": ["lm_head"]},
    ),
    "boft": ("llama", "BOFTConfig", {"boft_block_size": 4, "target_modules": LINEAR["llama"]}),
    "boft, clamped": (
        "llama",
        "BOFTConfig",
        {
            "boft_block_size": 4,
            "boft_n_butterfly_factor": 2,
            "target_modules": ["up_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
    "boft by number": (
        "llama",
        "BOFTConfig",
        {"boft_block_size": 0, "boft_block_num": 2, "target_modules": ["q_proj", "up_proj"]},
    ),
    "bloom lora": (
        "bloom",
        "LoraConfig",
        {"r": 2, "target_modules": LINEAR["bloom"], "modules_to_save": ["ln_f"]},
    ),
    "bloom boft": (
        "bloom",
        "BOFTConfig",
        {"boft_block_size": 8, "target_modules": ["query_key_value", "dense"]},
    ),
    "tied": (
        "llama tied",
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
}


def save_with_peft(base, folder, config_class, settings):
    """Saves an adapter with random values by PEFT, and returns the module."""
    config = getattr(peft, config_class)(**settings, task_type="CAUSAL_LM")
    module = peft.get_peft_model(base.copy_of_module(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(folder)
    return module


@pytest.mark.fast("lora", "dora", "lokr", "oft, exact and shared", "bloom boft", "tied")
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_adapters_load(name, base, tokens, tmp_path):
    kind, config_class, settings = CONFIGS[name]
    base = base(kind)
    module = save_with_peft(base, tmp_path, config_class, settings)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    found = base.adapted_logits(tokens, spec, state)
    assert_same(found, theirs(module, tokens), base.logits(tokens))


def test_norms_of_a_base_that_is_given_by_shapes_are_read_from_its_files(base, tmp_path):
    base = base("llama")
    settings = {"r": 2, "use_dora": True, "target_modules": ["q_proj", "lm_head"]}
    save_with_peft(base, tmp_path, "LoraConfig", settings)
    _, expected = load_adapter(tmp_path, base.model, base.params)
    _, found = load_adapter(tmp_path, base.model, base.model.abstract_params())
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    unknown = dataclasses.replace(base.model, origin="")
    with pytest.raises(ValueError, match=r"values of (lm_head|layers\.self_attn\.q_proj)\.kernel"):
        load_adapter(tmp_path, unknown, base.model.abstract_params())


def test_adalora_with_dropped_directions_loads(base, tokens, tmp_path):
    base = base("llama")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=2, target_modules=LINEAR["llama"], task_type="CAUSAL_LM"
    )
    module = peft.get_peft_model(base.copy_of_module(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
    for step in range(3):
        module.base_model.update_and_allocate(step)
    ranks = [sum(left) for left in module.peft_config["default"].rank_pattern.values()]
    assert len(set(ranks)) > 1
    module.save_pretrained(tmp_path)
    spec, state = load_adapter(tmp_path, base.model, base.params)
    assert spec.method == AdaLoRA(rank=4, alpha=8.0)
    values = [leaf for path, leaf in flatten(state.trainable).items() if path[-1] == "e"]
    assert sum(int((leaf != 0).sum()) for leaf in values) == sum(ranks)
    found = base.adapted_logits(tokens, spec, state)
    assert_same(found, theirs(module, tokens), base.logits(tokens))


SHIRA_INDICES = "base_model.model.model.layers.1.self_attn.q_proj.shira_indices"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda indices: indices + 1,
            r"layers\.1\.self_attn\.q_proj has shira_indices with",
        ),
        (lambda indices: indices.astype(np.float32) + 0.5, "must hold integers"),
    ],
    ids=["outside", "fractions"],
)
def test_entries_outside_of_the_kernel_are_rejected(change, message, base, tmp_path):
    base = base("llama")
    save_with_peft(base, tmp_path, "ShiraConfig", {"r": 2, "target_modules": ["q_proj"]})
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {SHIRA_INDICES: change(tensors[SHIRA_INDICES])}, file)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, base.model, base.params)


def test_entries_are_integers_in_adapters_of_16_bits(base, tmp_path):
    base = base("llama")
    spec = AdapterSpec(method=SHiRA(rank=2), target_modules=("q_proj",), dtype="bfloat16")
    state = spec.init(jax.random.key(0), base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="x")
    (tmp_path / "peft_jax_adapter.json").unlink()
    found_spec, found = load_adapter(tmp_path, base.model, base.params)
    assert found_spec == spec
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert {leaf.dtype for leaf in flatten(found.constant).values()} == {np.dtype(np.int32)}


def test_an_adapter_of_another_head_is_rejected(base, tmp_path):
    base = base("llama")
    settings = {"r": 2, "target_modules": ["lm_head"]}
    save_with_peft(base, tmp_path, "LoraConfig", settings)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "base_model.model.lm_head.base_layer.weight"
    tensors[name] = tensors[name] * np.float32(1.5)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{name}, .*lm_head\.kernel"):
        load_adapter(tmp_path, base.model, base.params)


def test_a_peft_adapter_is_saved_again_bit_for_bit(base, tmp_path):
    base = base("llama")
    save_with_peft(base, tmp_path / "theirs", "LoraConfig", {"target_modules": ["q_proj"], "r": 2})
    spec, state = load_adapter(tmp_path / "theirs", base.model, base.params)
    assert spec == AdapterSpec(method=LoRA(rank=2, alpha=8.0), target_modules=("q_proj",))
    save_adapter(tmp_path / "ours", base.model, spec, state, base_model_name="x")
    read = safetensors.numpy.load_file
    before, after = (read(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.tobytes() == np.ascontiguousarray(after[key]).tobytes()


REJECTED = {
    "use_qalora": (
        {"use_qalora": True, "qalora_group_size": 8},
        r"use_qalora = True",
    ),
    "bias": ({"bias": "boft_only"}, r"bias = 'boft_only'"),
    "lora_bias": ({"lora_bias": True}, r"lora_bias = True"),
    "randomized pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        r"init_lora_weights = 'pissa_niter_4'.*path_initial_model_for_weight_conversion",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_peft_settings_are_rejected(name, base, tmp_path):
    settings, message = REJECTED[name]
    base = base("llama")
    save_with_peft(base, tmp_path, "LoraConfig", {"r": 2, "target_modules": ["q_proj"], **settings})
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, base.model, base.params)


def test_unknown_peft_settings_and_methods_are_rejected(base, tmp_path):
    base = base("llama")
    save_with_peft(base, tmp_path, "LoraConfig", {"r": 2, "target_modules": ["q_proj"]})
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"use_new_trick": True}, r"use_new_trick = True"),
        ({"peft_type": "CPT"}, r"peft_type = 'CPT'.*BOFT, .*LORA"),
        (
            {"task_type": "FEATURE_EXTRACTION"},
            r"task_type = 'FEATURE_EXTRACTION'",
        ),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path, base.model, base.params)
    file.write_text(json.dumps(config | {"a_later_default": None}))
    load_adapter(tmp_path, base.model, base.params)


def test_different_values_of_a_tied_embedding_and_head_are_rejected(base, tmp_path):
    base = base("llama tied")
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    save_with_peft(base, tmp_path, "LoraConfig", settings)
    with pytest.raises(ValueError, match=r"lm_head and the embedding.*tie_word_embeddings"):
        load_adapter(tmp_path, base.model, base.params)


REJECTED_OF_OTHERS = {
    "ia3 of a bias": (
        "bloom",
        "IA3Config",
        {"target_modules": ["dense"], "feedforward_modules": []},
        r"layers\.self_attention\.dense, whose bias PEFT scales too",
    ),
    "hra": (
        "llama",
        "HRAConfig",
        {"r": 2, "apply_GS": True, "target_modules": ["q_proj"]},
        r"apply_GS = True.*orthogonalized",
    ),
    "randlora without its bases": (
        "llama",
        "RandLoraConfig",
        {"r": 4, "save_projection": False, "target_modules": ["q_proj"]},
        r"save_projection = False.*must be in the file",
    ),
    "fourierft of several numbers": (
        "llama",
        "FourierFTConfig",
        {"n_frequency": 9, "n_frequency_pattern": {"q_proj": 8}, "target_modules": ["q_proj"]},
        r"n_frequency_pattern.*same number",
    ),
    "oft": (
        "llama",
        "OFTConfig",
        {"oft_block_size": 4, "coft": True, "target_modules": ["q_proj"]},
        r"coft = True",
    ),
    "oft of two terms": (
        "llama",
        "OFTConfig",
        {"oft_block_size": 4, "num_cayley_neumann_terms": 2, "target_modules": ["q_proj"]},
        r"num_cayley_neumann_terms = 2",
    ),
    "miss": (
        "llama",
        "MissConfig",
        {"r": 4, "init_weights": "bat", "target_modules": ["q_proj"]},
        r"init_weights = 'bat'.*MiSS",
    ),
    "lokr": (
        "llama",
        "LoKrConfig",
        {"r": 2, "target_modules": ["q_proj"]},
        r"lokr_w2, .*match no module",
    ),
}


@pytest.mark.parametrize("name", REJECTED_OF_OTHERS)
def test_unsupported_settings_of_other_methods_are_rejected(name, base, tmp_path):
    kind, config_class, settings, message = REJECTED_OF_OTHERS[name]
    base = base(kind)
    save_with_peft(base, tmp_path, config_class, settings)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, base.model, base.params)


def test_scaled_biases_have_no_peft_form(base, arbitrary_state, tmp_path):
    base, spec = base("bloom"), AdapterSpec(method=IA3(), target_modules=("dense",))
    state = arbitrary_state(spec, base.params)
    save_adapter(tmp_path, base.model, spec, state, base_model_name="someone/base")
    config = json.loads((tmp_path / "peft_jax_adapter.json").read_text())
    assert "bias" in config["peft"]["why"]
    assert not (tmp_path / "adapter_config.json").exists()


def test_pickles_are_rejected(base, tmp_path):
    base = base("llama")
    save_with_peft(base, tmp_path, "LoraConfig", {"r": 2, "target_modules": ["q_proj"]})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*save_pretrained"):
        load_adapter(tmp_path, base.model, base.params)


@pytest.mark.fast("llama-hybrid")
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", Hybrid(rank=2, block_size=4, unitary_modules=("down_proj",))),
        ("bloom", Unitary()),
        ("bloom", Full()),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_merged_models_load_in_transformers(kind, method, base, arbitrary_state, tokens, tmp_path):
    base = base(kind)
    spec = AdapterSpec(method=method)
    state = arbitrary_state(spec, base.params)
    export_merged(tmp_path, base.model, spec.frozen(base.params), spec, state)
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = base.adapted_logits(tokens, spec, state)
    assert_same(ours, theirs(module, tokens), base.logits(tokens))


def test_merged_models_have_the_requested_dtype(base, arbitrary_state, tmp_path):
    base = base("llama")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base.params)
    spec = AdapterSpec(method=Unitary(), modules_to_save=("lm_head",))
    state = arbitrary_state(spec, params)
    export_merged(tmp_path, base.model, params, spec, state, dtype="bfloat16")
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
