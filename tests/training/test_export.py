"""Tests the exported folders of a run."""

import json

import jax
import numpy as np
import pytest

from peft_jax.core import flatten
from peft_jax.generation import load_for_generation
from peft_jax.hub import load_adapter, load_model
from peft_jax.hub.adapter_base import base_digest, recorded_quantization
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.training.loop import run

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.slow
def test_full_fine_tuning_only_writes_the_model(tiny, checkpoint, tmp_path, listener):
    settings = {"method.name": "full", "method.target_modules": "all-linear", "train.steps": 2}
    workdir = tmp_path / "run"
    summary = run(tiny(**settings), workdir, reporter=listener)
    assert not (workdir / "adapter").exists()
    _, params = load_model(workdir / "model")
    base = flatten(load_model(checkpoint)[1])
    assert any(np.any(leaf != base[path]) for path, leaf in flatten(params).items())
    assert summary["exported"] == ["model"]
    assert json.loads((workdir / "summary.json").read_text())["exported"] == ["model"]
    assert f"model:   {workdir / 'model'} (full model in float32; load this)" in listener.text
    assert "adapter:" not in listener.text
    page = (workdir / "report" / "README.md").read_text()
    assert 'load_model("model")' in page
    assert "load_adapter" not in page
    # A finished run without an adapter folder is complete.
    assert run(tiny(**settings), workdir, reporter=listener) == json.loads(json.dumps(summary))
    assert "missing" not in listener.text


def test_merged_model_is_written_with_the_adapter(tiny, tmp_path, listener):
    workdir = tmp_path / "run"
    summary = run(
        tiny(**{"export.merged": True, "model.quantization": "int8", "train.steps": 2}),
        workdir,
        reporter=listener,
    )
    assert summary["exported"] == ["model", "adapter"]
    assert "load this" in listener.text
    page = (workdir / "report" / "README.md").read_text()
    assert 'load_model("model")' in page
    assert 'quantization="int8")' in page
    # Both compute the trained function, and the adapter names its base model.
    assert recorded_quantization(workdir / "adapter") == "int8"
    merged = load_for_generation(adapter=workdir / "adapter", merge=True).params
    jax.tree.map(np.testing.assert_array_equal, merged, load_model(workdir / "model")[1])


def test_chat_template_is_exported_with_the_tokenizer(tiny, checkpoint, data, tmp_path, caplog):
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a"}]
    rows.write_text((json.dumps({"messages": messages}) + "\n") * 8)
    workdir = tmp_path / "run"
    run(
        tiny(
            **{
                "data.recipe": "chat",
                "data.prompt_template": None,
                "data.completion_template": None,
                "data.path": str(rows),
                "data.chat_template": str(template),
                "export.merged": True,
                "train.max_length": 48,
                "train.steps": 2,
            }
        ),
        workdir,
    )
    for name in ("adapter", "model"):
        assert load_tokenizer(workdir / name).chat_template == TEMPLATE
    config = json.loads((workdir / "adapter" / "peft_jax_adapter.json").read_text())
    assert config["base_digest"] == base_digest(checkpoint)
    model, params = load_model(checkpoint)
    load_adapter(workdir / "adapter", model, params)
    assert not [r for r in caplog.records if r.name.startswith("peft_jax.hub")]


def test_missing_chat_template_is_named(tiny, tmp_path):
    from peft_jax.runtime.errors import RefusedError

    with pytest.raises(RefusedError, match=r"none\.jinja"):
        run(tiny(**{"data.chat_template": str(tmp_path / "none.jinja")}), tmp_path / "run")
