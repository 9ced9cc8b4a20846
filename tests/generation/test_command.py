"""Tests generation from a run's folders and from the command line."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.generation import GenerationSettings, generate_text, load_for_generation
from peft_jax.generation.command import main
from peft_jax.hub import load_model, save_adapter, save_model

PROMPTS = ["the cat", "who?", "a", "is"]


@pytest.fixture(scope="module")
def checkpoint(speaker, tokenizer, tmp_path_factory):
    """Returns a checkpoint folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder, *speaker)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(speaker, checkpoint, tmp_path_factory):
    """Returns an adapter folder, and the parameters with the adapter bound."""
    model, params = speaker
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj", "down_proj"))
    state = spec.init(jax.random.key(0), params)
    state = jax.tree.map(lambda leaf: leaf + 0.3, state)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(folder, model, spec, state, str(checkpoint))
    return folder, spec.bind(params, state)


def answers(*flags, capsys):
    """Returns the texts that the command prints as JSON."""
    code = main([*flags, *(f"--prompt={prompt}" for prompt in PROMPTS), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "tokens/s" in captured.err
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    return [line["text"] for line in lines]


def test_command_generates_with_an_adapter(speaker, tokenizer, checkpoint, adapted, capsys):
    model, params = speaker
    folder, bound = adapted
    settings = GenerationSettings(max_new_tokens=20)
    expected = generate_text(model, bound, tokenizer, PROMPTS, settings).texts
    base = generate_text(model, params, tokenizer, PROMPTS, settings).texts
    assert expected != base
    flags = ["--max_new_tokens=20"]
    assert answers(f"--adapter={folder}", *flags, capsys=capsys) == expected
    assert answers(f"--adapter={folder}", "--merge", *flags, capsys=capsys) == expected
    assert answers(f"--model={checkpoint}", *flags, capsys=capsys) == base


def test_flags_set_sampling_stop_strings_and_chat(speaker, tokenizer, checkpoint, capsys):
    model, params = speaker
    settings = GenerationSettings(
        max_new_tokens=17, temperature=0.9, top_k=20, top_p=0.9, seed=3, stop_strings=("e", "a")
    )
    chats = [
        [{"role": "system", "content": "be"}, {"role": "user", "content": prompt}]
        for prompt in PROMPTS
    ]
    expected = generate_text(model, params, tokenizer, chats, settings).texts
    flags = (
        "--max_new_tokens=17 --temperature=0.9 --top_k=20 --top_p=0.9 --seed=3 --stop=e --stop=a"
    )
    found = answers(
        f"--model={checkpoint}",
        "--chat",
        "--system=be",
        *flags.split(),
        "--stop=e",
        "--stop=a",
        capsys=capsys,
    )
    assert found == expected


def test_lines_of_standard_input_are_prompts(checkpoint, capsys, monkeypatch):
    flags = [f"--model={checkpoint}", "--max_new_tokens=20"]
    expected = answers(*flags, capsys=capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS) + "\n\n"))
    assert main(flags) == 0
    blocks = [f"--- {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert capsys.readouterr().out == "\n".join(blocks) + "\n"


def test_invalid_flags_are_rejected(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    model = f"--model={checkpoint}"
    for flags, message in [
        ([model], "--prompt"),
        (["--prompt=a"], "neither a model nor an adapter"),
        ([model, "--prompt=a", "--temperature=-1"], "temperature "),
        ([model, "--prompt=a", "--dtype=int8"], "dtype is 'int8'"),
        ([f"--adapter={tmp_path}", "--prompt=a"], "adapter_config.json"),
        ([model, f"--prompt={'a ' * 128}"], "context is 128"),
    ]:
        assert main(flags) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out


def test_adapter_without_a_base_model_name_is_rejected(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        load_for_generation(adapter=tmp_path)


@pytest.fixture
def quantized(speaker, checkpoint, tmp_path):
    """Returns an adapter folder for an int8 base model, and the bound parameters."""
    model, _ = speaker
    params = load_model(checkpoint, quantization="int8")[1]
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj",))
    state = jax.tree.map(lambda leaf: leaf + 0.3, spec.init(jax.random.key(0), params))
    save_adapter(tmp_path, model, spec, state, str(checkpoint), quantization="int8")
    return tmp_path, spec.bind(params, state)


def test_base_is_quantized_as_in_training(quantized, checkpoint):
    folder, trained = quantized
    loaded = load_for_generation(adapter=folder)
    assert loaded.quantization == "int8"
    assert jax.tree.structure(loaded.params) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)
    assert load_for_generation(checkpoint).quantization == "none"


def test_quantization_is_reported_and_can_be_overridden(quantized, capsys, caplog):
    folder, _ = quantized
    flags = [f"--adapter={folder}", "--prompt=the", "--max_new_tokens=2"]
    assert main(flags) == 0
    assert "in int8" in capsys.readouterr().err
    assert not caplog.records
    assert main([*flags, "--quantization=none"]) == 0
    assert "int8" not in capsys.readouterr().err
    (record,) = caplog.records
    assert "trained on" in record.getMessage()


def test_chat_template_is_read_from_a_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    loaded = load_for_generation(checkpoint, chat_template=file)
    messages = [{"role": "user", "content": "who?"}]
    assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "<who?>"
    flags = [f"--model={checkpoint}", "--prompt=who?", "--chat", "--max_new_tokens=2"]
    assert main([*flags, f"--chat_template={file}"]) == 0
    capsys.readouterr()
    assert main([*flags, f"--chat_template={tmp_path / 'none.jinja'}"]) == 2
    assert "none.jinja" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "</s>"}'])
def test_invalid_generation_config_is_rejected_in_one_line(content, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(content)
    assert main([f"--model={tmp_path / 'copy'}", "--prompt=a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "generation_config.json" in line
