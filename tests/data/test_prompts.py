"""Prompts in training equal those in generation, for many kinds of templates.

For each template the test knows the assistant's text, and transformers renders the prompts.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import make_tokenizer

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.encode import Encoder
from peft_jax.data.examples import Conversation
from peft_jax.generation.from_text import _as_example

SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set start = messages[0].content | trim + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set start = '' %}{% endif %}"
)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{0}<|im_end|>",
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n"
        "{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        "{1}</s>",
    ),
    "gemma": (
        SYSTEM + "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ start if loop.first else '' }}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "{1}<|im_end|>",
    ),
    "alpaca": (
        SYSTEM + "{{ bos_token + start }}{% for m in messages %}{% if m.role == 'user' %}"
        "### Instruction:\n{{ m.content | trim }}\n\n{% else %}"
        "### Response:\n{{ m.content | trim }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        "{1}</s>",
    ),
    "vicuna": (
        SYSTEM + "{{ bos_token + start }}{% for m in messages %}{% if m.role == 'user' %}"
        "USER: {{ m.content | trim }}\n{% else %}ASSISTANT: {{ m.content | trim }}{{ eos_token }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " {1}</s>",
    ),
    "a prompt that ends in a space": (
        SYSTEM + "{{ start }}{% for m in messages %}{% if m.role == 'user' %}"
        "USER: {{ m.content }}\n{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        "{0}</s>",
    ),
    "mistral": (
        SYSTEM + "{{ bos_token + start }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
        "{% endif %}{% endfor %}",
        " {1}</s>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "{1}</s>",
    ),
    "writes an empty thought": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<think></think>{0}</s>",
    ),
    "marks, with the header": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|assistant|>"
        "{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}<|{{ m.role }}|>"
        "{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{0}</s>",
    ),
    "a mark in a comment": (
        "{# no {% generation %} here #}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{0}</s>",
    ),
}
"""Template, and its text of a turn in the loss: {0} is the content, {1} is it trimmed."""

TOKENIZER = make_tokenizer()
RENDERERS: dict[str, ChatRenderer] = {}
TRICKS = (
    "a",
    " a",
    "P",
    "\n",
    " ",
    ":",
    "é",
    "assistant",
    "ASSISTANT:",
    "[/INST]",
    "<|assistant|>",
)


def contents(*more: str) -> st.SearchStrategy[str]:
    parts = st.lists(st.sampled_from([*TRICKS, *more]), min_size=1, max_size=6)
    return parts.map("".join).filter(str.strip)


# Only users' texts contain a Q.
USER = contents("<|im_end|>", "</s>", "<|im_start|>assistant\n").map(lambda text: f"Q{text}Q")


@st.composite
def conversations(draw) -> list[dict[str, str]]:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(USER)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(USER)})
        messages.append({"role": "assistant", "content": draw(contents())})
    return messages


def renderer(name: str, tmp_path_factory) -> ChatRenderer:
    if name not in RENDERERS:
        path = tmp_path_factory.mktemp("templates") / "template.jinja"
        path.write_text(TEMPLATES[name][0])
        RENDERERS[name] = ChatRenderer(TOKENIZER, chat_template=str(path))
    return RENDERERS[name]


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_training_and_generation_have_the_same_prompts(tmp_path_factory, name, messages):
    template, form = TEMPLATES[name]
    encoder = Encoder(TOKENIZER, max_length=4000, renderer=renderer(name, tmp_path_factory))
    (encoded,) = encoder.encode(Conversation(messages=tuple(messages)))

    def rendered(given, **kw):
        return TOKENIZER.apply_chat_template(given, chat_template=template, tokenize=False, **kw)

    assert TOKENIZER.decode(encoded.ids) == rendered(messages)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(np.int8), [0]])))
    runs = edges.reshape(-1, 2).tolist()
    asked = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    assert len(runs) == len(asked)
    for index, (start, stop) in zip(asked, runs, strict=True):
        # All assistant's turns are in the loss, but no users' text and no header.
        content = messages[index]["content"]
        in_loss = TOKENIZER.decode(encoded.ids[start:stop])
        assert in_loss == form.format(content, content.strip())
        assert "Q" not in in_loss
        # The prompt equals that of transformers, and generation has the same tokens.
        prompt = encoder.prompt_ids(_as_example(messages[:index], encoder))
        assert encoded.ids[:start].tolist() == prompt.tolist()
        assert TOKENIZER.decode(prompt) == rendered(messages[:index], add_generation_prompt=True)
    example = encoder.as_example(Conversation(messages=tuple(messages)))
    assert encoder.prompt_ids(example).tolist() == encoded.ids[: runs[-1][0]].tolist()


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations(), data=st.data())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_only_the_chosen_turns_are_in_the_loss(tmp_path_factory, name, messages, data):
    asked = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    chosen = data.draw(st.sets(st.sampled_from(asked), min_size=1))
    assume(len(chosen) < len(asked) or len(asked) == 1)
    encoder = Encoder(TOKENIZER, max_length=4000, renderer=renderer(name, tmp_path_factory))
    whole = encoder.encode(Conversation(messages=tuple(messages)))[0]
    part = encoder.encode(Conversation(messages=tuple(messages), loss_turns=tuple(chosen)))[0]
    assert part.ids.tolist() == whole.ids.tolist()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], whole.loss_mask.astype(np.int8), [0]])))
    for index, (start, stop) in zip(asked, edges.reshape(-1, 2).tolist(), strict=True):
        assert (
            part.loss_mask[start:stop].all()
            == part.loss_mask[start:stop].any()
            == (index in chosen)
        )


ROLES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "generation", "training"),
    [
        (
            ROLES + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
            r"<\|user\|>Who ran\?</s><\|assistant\|><think>\\n",
            r"<\|user\|>Who ran\?</s><\|assistant\|>Ivy ran\.",
        ),
        # The indentation of the file is part of the text.
        (
            "{% for m in messages %}\n    {{ '<|' + m.role + '|>' + m.content }}\n{% endfor %}\n"
            "{% if add_generation_prompt %}\n        {{ '<|assistant|>' }}\n{% endif %}",
            r"Who ran\?\\n        <\|assistant\|>\\n'",
            r"Who ran\?\\n    <\|assistant\|>Ivy ran\.",
        ),
        # There is no generation prompt, so the header would be in the loss.
        (ROLES, r"writes '<\|assistant\|>' before .* has '<\|user\|>Who ran\?</s>'", "<|assist"),
        # The mark starts after the prompt.
        (
            "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ '\n' }}"
            "{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            r"after the end of the generation prompt: generation has '.*<\|assistant\|>'",
            r"training has '.*<\|assistant\|>\\n'",
        ),
    ],
)
def test_a_different_generation_prompt_raises_with_both_texts(
    tmp_path, template, generation, training
):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    renderer = ChatRenderer(TOKENIZER, chat_template=str(path))
    messages = (
        {"role": "user", "content": "Who ran?"},
        {"role": "assistant", "content": "Ivy ran."},
    )
    with pytest.raises(BadRowError, match=generation) as caught:
        renderer.render(Conversation(messages=messages))
    assert caught.value.reason == "generation prompt"
    assert caught.match(training.replace("<|assist", r"<\|assist"))
    # Generation is possible nevertheless.
    asked = TOKENIZER.apply_chat_template(
        list(messages[:1]), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert renderer.prompt(messages[:1]).prompt == asked


def test_a_tool_call_is_in_the_loss_without_a_header(tmp_path):
    path = tmp_path / "template.jinja"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    body = ROLES.replace("{{ m.content }}", "{{ m.content }}" + calls)
    path.write_text(body + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = (
        {"role": "user", "content": "The time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    example = ChatRenderer(TOKENIZER, chat_template=str(path)).render(
        Conversation(messages=messages)
    )
    assert example.completion == '{"name": "clock", "arguments": {}}</s>'
    path.write_text(body)
    with pytest.raises(BadRowError, match="add_generation_prompt"):
        ChatRenderer(TOKENIZER, chat_template=str(path)).render(Conversation(messages=messages))


def test_a_first_assistant_turn_is_in_the_loss_without_its_header(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(ROLES + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    messages = (
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    )
    example = ChatRenderer(TOKENIZER, chat_template=str(path)).render(
        Conversation(messages=messages)
    )
    in_loss = [piece.text for piece in example.pieces if piece.in_loss]
    assert in_loss == ["assistant</s>", "A</s>"]
