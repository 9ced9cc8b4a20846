"""Tests starting a run from an adapter of another run or of Hugging Face PEFT."""

import shutil

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from peft_jax.training import RefusedError, loop, run


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory):
    """Returns a finished run and its summary."""
    workdir = tmp_path_factory.mktemp("ended") / "run"
    return workdir, run(tiny(**{"train.steps": 3}), workdir)


@pytest.fixture(scope="module")
def of_peft(checkpoint, tmp_path_factory):
    """Returns an adapter of PEFT with the rank of the tiny run and arrays that are not zero."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    settings = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), settings).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def started(monkeypatch):
    """Records the starts of runs, which then do nothing."""
    starts = []

    def go(self, start):
        starts.append(start)
        return {}

    monkeypatch.setattr(loop.TrainingLoop, "go", go)
    return starts


def test_new_run_starts_from_another_runs_adapter(tiny, ended, tmp_path, listener):
    before, summary = ended
    adapter = tmp_path / "adapter"
    shutil.copytree(before / "adapter", adapter)
    config = tiny(**{"train.steps": 2, "seed": 7, "adapter.path": str(adapter)})
    after = run(config, tmp_path / "run", reporter=listener)
    assert "starting from the adapter in" in listener.text
    np.testing.assert_allclose(after["loss_before"], summary["loss_after"], rtol=1e-6)
    # A run with a checkpoint does not need the adapter.
    shutil.rmtree(adapter)
    (tmp_path / "run" / "summary.json").unlink()
    again = run(config, tmp_path / "run", reporter=listener)
    assert again["loss_after"] == after["loss_after"]


def test_run_starts_from_a_peft_adapter(tiny, of_peft, started, tmp_path):
    run(tiny(**{"adapter.path": str(of_peft), "method.dropout": 0.1}), tmp_path / "run")
    (start,) = started
    found = start.adapter.trainable["layers"]["self_attn"]["q_proj"]["kernel"]
    stored = load_file(of_peft / "adapter_model.safetensors")
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        np.testing.assert_array_equal(found["a"][layer], stored[f"{name}A.weight"].T)
        np.testing.assert_array_equal(found["b"][layer], stored[f"{name}B.weight"].T)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method.rank": 4}, r"method\.rank is 4, .* is 8"),
        ({"method.name": "boft", "method.block_size": 4}, "method.name is 'boft'"),
        (
            {"method.target_modules": "q_proj"},
            r"the adapter adapts layers\.mlp\.down_proj\.kernel",
        ),
        ({"method.rank_pattern": {"q_proj": 4}}, r"at layers\.self_attn\.q_proj method\.rank is 4"),
        ({"method.layers_to_transform": (1,)}, r"the layers of layers\.mlp\.down_proj are not"),
        ({"adapter.path": "/no/such/folder"}, "adapter.path: there is no folder /no/such/folder"),
    ],
)
def test_different_adapter_is_rejected_before_training(
    tiny, of_peft, started, tmp_path, changes, said
):
    config = tiny(**{"adapter.path": str(of_peft), **changes})
    with pytest.raises(RefusedError, match=said):
        run(config, tmp_path / "run")
    assert not started
    assert not (tmp_path / "run" / "config.json").exists()


def test_several_devices_start_from_an_adapter(tiny, of_peft, started, tmp_path):
    changes = {"parallel.devices": 4, "parallel.fsdp": 2, "adapter.path": str(of_peft)}
    run(tiny(**changes), tmp_path / "run")
    assert jax.tree.leaves(started[0].adapter.trainable)


def test_revision_without_a_path_is_rejected(tiny):
    with pytest.raises(ValueError, match=r"adapter\.revision .*'v1'"):
        tiny(**{"adapter.revision": "v1"})
