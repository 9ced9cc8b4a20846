"""From a run's folders, and from the command line."""

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
    """A checkpoint with a tokenizer, as a run starts from."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder, *speaker)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(speaker, checkpoint, tmp_path_factory):
    """An adapter's folder, as a run leaves it; and the parameters with the adapter bound."""
    model, params = speaker
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj", "down_proj"))
    state = spec.init(jax.random.key(0), params)
    state = jax.tree.map(lambda leaf: leaf + 0.3, state)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(folder, model, spec, state, str(checkpoint))
    return folder, spec.bind(params, state)


def answers(*flags, capsys):
    """What the command prints, as JSON; it must not refuse."""
    code = main([*flags, *(f"--prompt={prompt}" for prompt in PROMPTS), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "tokens/s" in captured.err
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    return [line["text"] for line in lines]


def test_a_runs_adapter_speaks(speaker, tokenizer, checkpoint, adapted, capsys):
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


def test_sampling_stopping_and_chat_are_passed_on(speaker, tokenizer, checkpoint, capsys):
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


def test_prompts_may_come_line_by_line(checkpoint, capsys, monkeypatch):
    flags = [f"--model={checkpoint}", "--max_new_tokens=20"]
    expected = answers(*flags, capsys=capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS) + "\n\n"))
    assert main(flags) == 0
    blocks = [f"--- {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert capsys.readouterr().out == "\n".join(blocks) + "\n"


def test_what_cannot_be_done_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    model = f"--model={checkpoint}"
    for flags, message in [
        ([model], "there is no prompt"),
        (["--prompt=a"], "give a model, an adapter, or both"),
        ([model, "--prompt=a", "--temperature=-1"], "temperature must be at least 0"),
        ([model, "--prompt=a", "--dtype=int8"], "dtype is 'int8'"),
        ([f"--adapter={tmp_path}", "--prompt=a"], "holds no adapter"),
        ([model, f"--prompt={'a ' * 128}"], "leaves no room in the model's context of 128"),
    ]:
        assert main(flags) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out


def test_a_base_that_is_not_named_is_asked_for(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="does not say what base it is for: give the model"):
        load_for_generation(adapter=tmp_path)


@pytest.fixture
def quantized(speaker, checkpoint, tmp_path):
    """An adapter's folder, trained on a base in int8, and the parameters that it was trained as."""
    model, _ = speaker
    params = load_model(checkpoint, quantization="int8")[1]
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj",))
    state = jax.tree.map(lambda leaf: leaf + 0.3, spec.init(jax.random.key(0), params))
    save_adapter(tmp_path, model, spec, state, str(checkpoint), quantization="int8")
    return tmp_path, spec.bind(params, state)


def test_a_base_is_held_as_the_adapter_was_trained(quantized, checkpoint):
    folder, trained = quantized
    loaded = load_for_generation(adapter=folder)
    assert loaded.quantization == "int8"
    assert jax.tree.structure(loaded.params) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)
    assert load_for_generation(checkpoint).quantization == "none"


def test_what_a_base_is_held_as_is_said_and_may_be_overridden(quantized, capsys, caplog):
    folder, _ = quantized
    flags = [f"--adapter={folder}", "--prompt=the", "--max_new_tokens=2"]
    assert main(flags) == 0
    assert "held in int8, as the adapter was trained" in capsys.readouterr().err
    assert not caplog.records
    assert main([*flags, "--quantization=none"]) == 0
    assert "held in" not in capsys.readouterr().err
    (record,) = caplog.records
    assert "trained on" in record.getMessage()


def test_a_chat_template_is_taken_from_a_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    loaded = load_for_generation(checkpoint, chat_template=file)
    messages = [{"role": "user", "content": "who?"}]
    assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "<who?>"
    flags = [f"--model={checkpoint}", "--prompt=who?", "--chat", "--max_new_tokens=2"]
    assert main([*flags, f"--chat_template={file}"]) == 0
    capsys.readouterr()
    assert main([*flags, f"--chat_template={tmp_path / 'none.jinja'}"]) == 2
    assert "none.jinja' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "</s>"}'])
def test_a_broken_generation_config_is_refused_in_one_line(content, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(content)
    assert main([f"--model={tmp_path / 'copy'}", "--prompt=a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "generation_config.json" in line
