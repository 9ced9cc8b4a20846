"""Tests that evaluation loads a model as it was trained."""

import json

import jax
import numpy as np
import pytest

from eval.loading import find_model, load
from eval.settings import EvalSettings
from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.hub import load_model, save_adapter


@pytest.fixture
def workdir(checkpoint, tmp_path):
    """Returns a function that makes a run with an adapter of a base model in NF4."""

    def make(recorded: str | None):
        model, params = load_model(checkpoint, quantization="nf4")
        spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj",))
        state = jax.tree.map(lambda leaf: leaf + 0.1, spec.init(jax.random.key(0), params))
        folder = tmp_path / "adapter"
        save_adapter(folder, model, spec, state, str(checkpoint), quantization=recorded)
        (tmp_path / "config.json").write_text(json.dumps({"model": {"quantization": "nf4"}}))
        return tmp_path, spec.bind(params, state)

    return make


@pytest.mark.parametrize("recorded", ["nf4", None])
def test_a_quantized_base_is_quantized_as_in_training(recorded, workdir, capsys):
    folder, trained = workdir(recorded)
    settings = EvalSettings(tasks=("rte",), workdir=folder)
    files = find_model(settings)
    assert files.identity()["quantization"] == "nf4"
    loaded, _ = load(settings, files)
    assert "quantized to nf4" in capsys.readouterr().err
    assert jax.tree.structure(loaded.params) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)


def test_the_flag_overrides_the_quantization(workdir):
    folder, _ = workdir("nf4")
    settings = EvalSettings(tasks=("rte",), adapter=str(folder / "adapter"), quantization="none")
    files = find_model(settings)
    assert files.quantization == "none"
    assert "quantization" not in files.identity()
    with pytest.raises(ValueError, match="quantization is 'int3'"):
        EvalSettings(tasks=("rte",), adapter=str(folder / "adapter"), quantization="int3")


@pytest.mark.parametrize(("trained", "asked"), [(None, None), (True, None), (True, False)])
def test_control_tokens_are_tokenized_as_in_the_run(trained, asked, workdir, capsys):
    folder, _ = workdir("none")
    data = {} if trained is None else {"data": {"split_special_tokens": trained}}
    (folder / "config.json").write_text(json.dumps(data))
    settings = EvalSettings(tasks=("rte",), workdir=folder, split_special_tokens=asked)
    files = find_model(settings)
    used = bool(trained) and asked is None
    assert files.split_special_tokens is used
    assert ("split_special_tokens" in files.identity()) is used
    load(settings, files)
    assert ("--no-split_special_tokens" in capsys.readouterr().err) is used
