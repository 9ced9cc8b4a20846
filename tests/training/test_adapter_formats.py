"""Exports of a run's adapter, loaded by transformers and by Hugging Face PEFT on torch."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.commands import export
from peft_jax.hub import load_adapter, load_model
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.training.adapter_formats import export_adapter
from peft_jax.training.loop import run

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    """The work directory of a run of the hybrid."""
    workdir = tmp_path_factory.mktemp("hybrid") / "run"
    changes = {"method.name": "hybrid", "method.rank": 2, "method.gradient_init": False}
    run(tiny(**changes, **{"method.block_size": 4, "train.learning_rate": 0.05}), workdir)
    return workdir


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 60, (2, 9))


def on_torch(base, adapter, tokens):
    """Returns the logits of transformers, with PEFT's adapter if there is one."""
    module = transformers.AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        with warnings.catch_warnings():
            # PEFT only warns of unused and missing keys.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.filterwarnings("error", message=".*[Uu]nexpected.*")
            module = peft.PeftModel.from_pretrained(module, adapter)
    with torch.no_grad():
        return module.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def here(base, adapter, tokens):
    model, params = load_model(base)
    if adapter is not None:
        spec, state = load_adapter(adapter, model, params)
        params = spec.bind(params, state)
    return np.asarray(model(params, jnp.asarray(tokens, jnp.int32)))


def test_a_hybrid_of_full_rank_is_the_same_as_a_lora(hybrid, checkpoint, tokens, tmp_path, capsys):
    line = [f"--workdir={hybrid}", "--format=lora", "--rank=32", f"--output={tmp_path / 'lora'}"]
    assert export.main(line) == 0
    said = capsys.readouterr().out
    assert "layers.mlp.down_proj: relative error 0.0" in said
    assert "vLLM loads it with --enable-lora --max-lora-rank=32." in said
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 32)
    special = {
        config[name] or None for name in ("rank_pattern", "alpha_pattern", "modules_to_save")
    }
    assert special == {None}
    assert not (tmp_path / "lora" / "peft_jax_adapter.json").exists()
    wanted, base = (here(checkpoint, a, tokens) for a in (hybrid / "adapter", None))
    found = on_torch(checkpoint, tmp_path / "lora", tokens)
    scale = np.abs(wanted - base).max()
    assert scale > 1e-2
    assert np.abs(found - wanted).max() < 1e-3 * scale
    assert load_tokenizer(tmp_path / "lora").get_vocab() == load_tokenizer(checkpoint).get_vocab()


@pytest.mark.slow
def test_a_small_rank_states_its_error_and_loss(hybrid, checkpoint, tokens, tmp_path):
    exported = export_adapter(hybrid, tmp_path / "lora", format="lora", rank=3)
    assert exported.rank == 3
    assert exported.errors.keys() == {"layers.self_attn.q_proj", "layers.mlp.down_proj"}
    assert all(0.01 < error < 1 for error in exported.errors.values())
    summary = json.loads((hybrid / "summary.json").read_text())
    assert exported.loss_before == pytest.approx(summary["loss_after"], rel=1e-4)
    assert exported.loss_after != exported.loss_before
    # PEFT computes what this library does with the same file.
    ours = here(checkpoint, tmp_path / "lora", tokens)
    np.testing.assert_allclose(on_torch(checkpoint, tmp_path / "lora", tokens), ours, atol=1e-4)
    card = (tmp_path / "lora" / "README.md").read_text()
    for note in exported.notes:
        assert note in card
    for said in ("library_name: peft", "- hybrid", "| recipe | alpaca |", "| rank | 2 |", "icense"):
        assert said in card


def test_the_rank_is_found_by_the_held_out_loss(hybrid, tmp_path):
    exported = export_adapter(hybrid, tmp_path / "lora", format="lora", rank="auto")
    assert exported.rank in (8, 16, 32)
    assert exported.loss_after <= 1.005 * exported.loss_before
    if exported.rank > 8:
        less = export_adapter(hybrid, tmp_path / "less", format="lora", rank=exported.rank // 2)
        assert less.loss_after > 1.005 * exported.loss_before


def test_a_merged_model_has_a_card(hybrid, checkpoint, tokens, tmp_path):
    export_adapter(hybrid, tmp_path / "model", dtype="float32")
    wanted = here(checkpoint, hybrid / "adapter", tokens)
    found = on_torch(tmp_path / "model", None, tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    card = (tmp_path / "model" / "README.md").read_text()
    for said in ("library_name: transformers", "AutoModelForCausalLM", "loss_after", "icense"):
        assert said in card
    assert load_tokenizer(tmp_path / "model").get_vocab()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "peft"}, "PEFT has no method 'hybrid'.*--format=lora"),
        ({"format": "lora"}, "needs a rank.*--rank=auto"),
        ({"format": "lora", "rank": 0}, "rank must be"),
        ({"format": "lora", "rank": 49}, "rank is 49.*at most 32"),
        ({"format": "merged", "rank": 8}, "'merged' has no rank"),
        ({"format": "lora", "rank": 8, "dtype": "float32"}, "dtype is 'float32'"),
        ({"format": "gguf"}, r"convert_hf_to_gguf\.py"),
        ({"format": "onnx"}, "format is 'onnx', which is not known"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_written_is_rejected_by_name(hybrid, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_adapter(hybrid, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_its_run_the_loss_is_not_measured(hybrid, tmp_path):
    exported = export_adapter(hybrid / "adapter", tmp_path / "lora", format="lora", rank=2)
    assert exported.loss_before is None
    assert "adapter without its run" in exported.notes[0]
    with pytest.raises(ValueError, match="adapter without its run"):
        export_adapter(hybrid / "adapter", tmp_path / "auto", format="lora", rank="auto")
