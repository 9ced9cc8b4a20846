"""Templates render as in transformers, and are stopped if they fail or do not end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_jax.data import DataSettings, build_data
from peft_jax.data import render as render_module
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.examples import Conversation
from peft_jax.data.render import RenderRequest, TemplateError, render
from peft_jax.data.templates import ChatTemplate, without_nulls

MESSAGES = [
    {"role": "user", "content": "Hi\ud800 \U0001f600"},
    {"role": "assistant", "content": "Yo"},
]
ROLES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


@pytest.fixture
def make_template(tmp_path, tokenizer):
    def make(source: str) -> ChatTemplate:
        path = tmp_path / "template.jinja"
        path.write_text(source)
        return ChatTemplate(tokenizer, path=str(path))

    return make


@pytest.fixture(scope="module")
def impatient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render_module, "_SECONDS", 0.2)
        patch.setattr(render_module, "_current", None)
        yield


@pytest.mark.parametrize("options", [{}, {"generation_prompt": True}, {"continued": True}])
@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_texts_equal_those_of_transformers(tokenizer, make_template, options, tools):
    source = "{{ bos_token }}{{ tools | tojson }}" + ROLES
    (found,) = make_template(source).render([RenderRequest(messages=MESSAGES, **options)], tools)
    assert found.text == tokenizer.apply_chat_template(
        MESSAGES,
        tools=list(tools) or None,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=options.get("generation_prompt", False),
        continue_final_message=options.get("continued", False),
    )


def test_named_templates_are_chosen_as_by_transformers(tokenizer):
    named = {"default": "D" + ROLES, "tool_use": "T{{ tools | tojson }}" + ROLES}
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = named
        template = ChatTemplate(tokenizer)
        for tools in ((), (TOOL,)):
            (found,) = template.render([RenderRequest(messages=MESSAGES)], tools)
            assert found.text == tokenizer.apply_chat_template(
                MESSAGES, tools=list(tools) or None, tokenize=False
            )
        example = ChatRenderer(tokenizer).render(
            Conversation(messages=tuple(MESSAGES), tools=(TOOL,))
        )
        assert example.prompt.startswith('T[{"type": "function"')
        tokenizer.chat_template = {"tool_use": named["tool_use"]}
        with pytest.raises(BadRowError, match="multiple chat templates with no default"):
            ChatTemplate(tokenizer).render([RenderRequest(messages=MESSAGES)])
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% include 'other' %}", "{% include %}"),
        ("{% import 'other' as o %}", "{% import %}"),
        ("{% from 'other' import o %}", "{% from %}"),
        ("{%- extends 'other' %}", "{% extends %}"),
        ("{{ messages", "TemplateSyntaxError: unexpected end of template"),
        ("{% if x %}", "TemplateSyntaxError: Unexpected end of template"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it does not end",
        ),
        ("{{ 10 ** (10 ** 10) }}", "does not end within 0.2 s"),
        ("{{ 'a' * 10 ** 11 }}", "takes more than 1024 MiB"),
    ],
)
def test_unusable_templates_raise_with_their_path(
    make_template, impatient, tmp_path, source, message
):
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot be used") as caught:
        make_template(source)
    assert message in str(caught.value)
    assert str(tmp_path / "template.jinja") in str(caught.value).splitlines()[0]
    assert time.monotonic() - began < 100


def test_an_endless_template_ends_where_the_profiler_signal_is_ignored():
    """A process inherits that its parent ignores a signal, as one with libtpu does this one."""
    request = {
        "messages": [],
        "requests": [[[], False, False]],
        "tools": None,
        "source": "{{ 10 ** (10 ** 10) }}",
        "marks": False,
        "variables": {},
    }
    worker = Path(render_module.__file__).with_name("render_worker.py")
    command = [sys.executable, "-P", str(worker), "0.2", str(2**30), str(2**24)]
    ended = subprocess.run(
        ["bash", "-c", "trap '' PROF; exec \"$@\"", "bash", *command],
        input=json.dumps(request).encode() + b"\n",
        timeout=100,
    )
    assert ended.returncode == -signal.SIGPROF


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("{{ raise_exception('no  such\nrole') }}", "chat template: no such role"),
        ("{{ m.content + 3 }}", "TypeError: can only concatenate str"),
        ("{{ m.content.nothing.at_all }}", "UndefinedError: "),
        ("{% for i in range(10 ** 10) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% set x = (9 + m.content | length) ** (10 ** 10) %}", "chat template: it does not end"),
        ("{{ m.content * 20000000 }}", "writes 20,000,013"),
    ],
)
def test_template_errors_of_some_rows_make_bad_rows(make_template, impatient, fault, message):
    source = "{% for m in messages %}{% if m.content == 'x' %}" + fault + "{% endif %}{% endfor %}"
    template = make_template(source + ROLES)
    with pytest.raises(BadRowError, match=message) as caught:
        template.render([RenderRequest(messages=[{"role": "user", "content": "x"}])])
    assert caught.value.reason == "chat template"
    assert "\n" not in str(caught.value)
    # The next row is rendered normally.
    assert template.render([RenderRequest(messages=MESSAGES)])[0].text.endswith("Yo</s>")


@pytest.mark.parametrize("value", [b"bytes", 10**5000, {1, 2}], ids=["bytes", "digits", "set"])
def test_values_that_json_cannot_represent_are_a_bad_row(make_template, value):
    template = make_template(ROLES)
    with pytest.raises(BadRowError, match="wrong type: messages and tools"):
        template.render([RenderRequest(messages=[{"role": "user", "content": "x", "more": value}])])


def test_deep_nesting_is_a_bad_row():
    value: dict = {}
    for _ in range(100_000):
        value = {"of": value}
    with pytest.raises(BadRowError, match="nested too deep"):
        without_nulls(value)


def test_several_threads_can_render():
    texts: dict[int, str] = {}

    def run(number: int) -> None:
        for _ in range(20):
            found = render(
                "{{ messages[0].content }}", [RenderRequest(messages=[{"content": str(number)}])]
            )
            assert texts.setdefault(number, found[0].text) == found[0].text == str(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4


@pytest.mark.slow
def test_the_rendering_process_ignores_signals_and_ends_with_its_run():
    script = (
        "import os, signal\n"
        "from peft_jax.data.render import RenderRequest, render, _worker\n"
        "request = RenderRequest(messages=[{'content': 'a'}])\n"
        "ask = lambda: render('{{ messages[0].content }}', [request])\n"
        "ask()\n"
        "pid = _worker()._process.pid\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    os.kill(pid, number)\n"
        "assert ask()[0].text == 'a' and _worker()._process.pid == pid\n"
        "print(pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")


def test_a_killed_rendering_process_is_a_bad_row():
    render("a", [RenderRequest(messages=MESSAGES)])
    worker = render_module._worker()
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(TemplateError, match="SIGKILL"):
        render("a", [RenderRequest(messages=MESSAGES)])
    assert render("a", [RenderRequest(messages=MESSAGES)])[0].text == "a"


def test_an_unusable_template_raises_once_for_the_run(tokenizer, tmp_path, impatient):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Hi", "completion": "Yo"}\n' * 50)
    before = tokenizer.chat_template
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    try:
        for template, message in ((None, "no chat template"), (loops, "it does not end within")):
            tokenizer.chat_template = template
            began = time.monotonic()
            with pytest.raises(ValueError, match=message):
                build_data(
                    DataSettings(recipe="chat", path=str(path), on_bad_row="skip"),
                    tokenizer,
                    batch_size=1,
                    max_length=99,
                    seed=0,
                )
            assert time.monotonic() - began < 100
    finally:
        tokenizer.chat_template = before


FRAGMENTS = (
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}",
    "{% if m.role == 'assistant' %}",
    "{% else %}",
    "{% endif %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% macro f() %}",
    "{{ f() }}",
    "{% endmacro %}",
    "{% set m = messages[0] %}",
    "{% include 'x' %}",
    "{{ m.content }}",
    "{{ m.role + 1 }}",
    "{{ messages | tojson }}",
    "{{ raise_exception(m) }}",
    "{{ bos_token * 3 }}",
    "{# {% generation %} #}",
    "{% raw %}",
    "{% endraw %}",
    "{%",
    "}}",
    "<|im_start|>",
    "assistant\n",
    " ",
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_random_templates_are_used_or_rejected(tmp_path_factory, tokenizer, source, split):
    path = tmp_path_factory.getbasetemp() / "fragments.jinja"
    path.write_text(source)
    messages = (
        {"role": "user", "content": "Hi </s>"},
        {"role": "assistant", "content": "Yo"},
    )
    example = None
    try:
        renderer = ChatRenderer(tokenizer, chat_template=str(path), split_special_tokens=split)
        example = renderer.render(Conversation(messages=messages))
    except ValueError as error:
        message = str(error)
    if example is None:
        # A bad row is reported with its file and line, so its message must be one line.
        assert "\n" not in message
        return
    text = tokenizer.apply_chat_template(list(messages), chat_template=source, tokenize=False)
    assert "".join(piece.text for piece in example.pieces) == text
    assert "Hi" not in example.completion
