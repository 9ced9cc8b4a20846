"""From a run's folders, and from the command line."""

import io
import json

import jax
import pytest

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.generation import GenerationSettings, generate_text, load_for_generation
from peft_jax.generation.command import main
from peft_jax.hub import save_adapter, save_model

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
