"""Only the assistant's text is in the loss, for every chat template.

The tests have a regular expression per template, which matches the assistant's text in the text
that transformers renders. The code under test does not know the templates.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.encode import Encoder
from peft_jax.data.examples import Conversation
from peft_jax.data.recipes import get_recipe

TURNS = {
    "alpaca": r"### Response:\n(.*?<\|end_of_text\|>)",
    "chatml": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    "gemma-it": r"<start_of_turn>model\n(.*?<end_of_turn>)",
    "llama-2-chat": r"\[/INST\]( .*? <\|end_of_text\|>)",
    "llama-3-instruct": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    "mistral-instruct": r"\[/INST\]( .*?<\|end_of_text\|>)",
    "phi-3": r"<\|assistant\|>\n(.*?<\|end\|>)",
    "qwen2.5-instruct": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    "vicuna": r"ASSISTANT:( .*?<\|end_of_text\|>)",
    "zephyr": r"<\|assistant\|>\n(.*?<\|end_of_text\|>)",
}
"""Regular expression of the assistant's text by template, with Llama 3's end token."""

MARKS_JOINED = ("chatml", "gemma-it", "phi-3", "qwen2.5-instruct")
"""Templates whose end mark is not a token here, so that it may share one with a line end."""

USER = {"role": "user", "content": "What is 2 + 2?"}
CONVERSATIONS = {
    "one turn": [USER, {"role": "assistant", "content": "It is 4."}],
    "three turns": [
        USER,
        {"role": "assistant", "content": "It is 4.\n\nIs it not?"},
        {"role": "user", "content": "assistant: It is 4. Yes"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Yes"},
        {"role": "assistant", "content": "I said:\n- yes\n- 你好 \U0001f600"},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "4"},
        USER,
        {"role": "assistant", "content": "4"},
    ],
    "ends with a question": [USER, {"role": "assistant", "content": "It is 4."}, USER],
}


@pytest.fixture
def template_path(shared_data, tmp_path):
    """Returns a function from a template's name to its path, without indentation."""

    def path_of(name: str) -> str:
        text = (shared_data / "tokenizers" / "chat_templates" / f"{name}.jinja").read_text()
        if name != "qwen2.5-instruct":
            text = text.replace("    ", "").replace("\n", "")
        path = tmp_path / f"{name}.jinja"
        path.write_text(text)
        return str(path)

    return path_of


def runs(ids: np.ndarray, loss_mask: np.ndarray, tokenizer: Any) -> list[str]:
    """Returns the texts of consecutive tokens in the loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask.astype(np.int8), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TURNS)
def test_loss_masks_cover_the_assistant_turns(template_path, llama3, template, conversation):
    path = template_path(template)
    messages = CONVERSATIONS[conversation]
    renderer = ChatRenderer(llama3, chat_template=path)
    encoder = Encoder(llama3, max_length=500, renderer=renderer)
    (encoded,) = encoder.encode(Conversation(messages=tuple(messages)))
    # The tokens equal those of transformers, without a second begin token.
    text = llama3.apply_chat_template(
        messages, chat_template=Path(path).read_text(), tokenize=False
    )
    whole = llama3(text, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == whole
    assert llama3.decode(encoded.ids) == text
    expected = re.findall(TURNS[template], text, flags=re.DOTALL)
    assert len(expected) == sum(message["role"] == "assistant" for message in messages)
    found = runs(encoded.ids, encoded.loss_mask, llama3)
    if template in MARKS_JOINED:
        found = [turn.removesuffix("\n") for turn in found]
    assert found == expected


@pytest.mark.parametrize("template", TURNS)
def test_the_prompt_equals_that_of_generation(template_path, llama3, template):
    path = template_path(template)
    encoder = Encoder(llama3, max_length=500, renderer=ChatRenderer(llama3, chat_template=path))
    messages = CONVERSATIONS["three turns"]
    example = encoder.as_example(Conversation(messages=tuple(messages)))
    prompt = llama3.apply_chat_template(
        messages[:-1],
        chat_template=Path(path).read_text(),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encoder.prompt_ids(example).tolist() == prompt
    assert example.answer == messages[-1]["content"]
    (encoded,) = encoder.encode(example)
    assert encoded.ids[: len(prompt)].tolist() == prompt


def test_generation_marks_in_the_template_are_used(llama3):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<A>{% generation %}"
        "{{ m.content if loop.last else 'earlier' }}<|eot_id|>{% endgeneration %}"
        "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A>{% endif %}"
    )
    llama3_template = llama3.chat_template
    try:
        llama3.chat_template = template
        encoder = Encoder(llama3, max_length=99)
        messages = CONVERSATIONS["three turns"][:4]
        (encoded,) = encoder.encode(Conversation(messages=tuple(messages)))
    finally:
        llama3.chat_template = llama3_template
    # The template shortens earlier turns, so only its marks can locate them.
    assert runs(encoded.ids, encoded.loss_mask, llama3) == ["earlier<|eot_id|>", "Yes<|eot_id|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '...' }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            "generation prompt: generation has 'user: What is",
        ),
        (
            "{% for m in messages %}{{ m.role }}: "
            "{{ m.content if loop.last or m.role == 'user' else '...' }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            r"turn 2 cannot be located.*'.*It is 4.*'.*assistant: \.\.\.",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            "turn 2 from 'It is 4",
        ),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ],
)
def test_unsupported_templates_make_bad_rows(tokenizer, tmp_path, template, message):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    renderer = ChatRenderer(tokenizer, chat_template=str(path))
    with pytest.raises(BadRowError, match=message):
        renderer.render(Conversation(messages=tuple(CONVERSATIONS["three turns"])))


def test_without_an_end_of_turn_token_the_line_end_is_in_the_loss(tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = ChatRenderer(tokenizer, chat_template=str(path))
    encoder = Encoder(tokenizer, max_length=300, renderer=renderer)
    (encoded,) = encoder.encode(Conversation(messages=tuple(CONVERSATIONS["three turns"][:4])))
    # Only the line end ends a turn.
    found = runs(encoded.ids, encoded.loss_mask, tokenizer)
    assert found == [" It is 4.\n\nIs it not?\n", " Yes\n"]


def test_an_end_token_after_the_last_turn_is_in_the_loss(tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}"
    )
    renderer = ChatRenderer(tokenizer, chat_template=str(path))
    encoder = Encoder(tokenizer, max_length=300, renderer=renderer)
    (encoded,) = encoder.encode(Conversation(messages=tuple(CONVERSATIONS["three turns"][:4])))
    found = runs(encoded.ids, encoded.loss_mask, tokenizer)
    assert found == ["It is 4.\n\nIs it not?<|im_end|>", "Yes<|im_end|></s>"]


def test_system_prompt_applies_to_conversations_without_one(llama3):
    renderer = ChatRenderer(llama3, system_prompt="Be kind.")
    assert (
        "Be kind."
        in renderer.render(Conversation(messages=tuple(CONVERSATIONS["one turn"]))).prompt
    )
    with_one = renderer.render(Conversation(messages=tuple(CONVERSATIONS["system"])))
    assert "Be kind." not in with_one.prompt
    assert "Be brief." in with_one.prompt


def test_a_missing_template_raises(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"data\.chat_template"):
        ChatRenderer(tokenizer)
    with pytest.raises(ValueError, match=r"absent\.jinja"):
        ChatRenderer(tokenizer, chat_template=str(tmp_path / "absent.jinja"))


SHARE_GPT = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {"conversations": SHARE_GPT},
        {"prompt": "Hi", "completion": "Hello"},
        {
            "prompt": [{"role": "user", "content": "Hi", "name": None}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        },
    ],
)
def test_all_column_formats_give_the_same_conversation(row):
    conversation = get_recipe("chat").example(row)
    assert [dict(message) for message in conversation.messages] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"message": []}, "missing field", "did you mean 'message'"),
        ({"prompt": "Hi"}, "missing field", "not both"),
        ({"messages": "Hi"}, "wrong type", "not a str"),
        ({"messages": []}, "empty", "no messages"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "empty", "assistant"),
        ({"messages": [{"role": "asistant", "content": "Hi"}]}, "unknown role", "'assistant'"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown role", "has role"),
        ({"messages": [{"role": "user", "content": 3}]}, "wrong type", "a int as content"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty", r"message 1 \(user\)"),
    ],
)
def test_rows_without_a_valid_conversation_are_bad(row, reason, detail):
    with pytest.raises(BadRowError, match=detail) as caught:
        get_recipe("chat").example(row)
    assert caught.value.reason == reason


def test_choices_in_a_chat_continue_the_prompt(template_path, llama3):
    renderer = ChatRenderer(llama3, chat_template=template_path("llama-2-chat"))
    example = renderer.render(
        Conversation(
            messages=(USER, {"role": "assistant", "content": "yes"}),
            choices=(" no", " yes"),
            label=1,
        )
    )
    assert example.choices == (" no", " yes")
    assert example.completion == " yes <|end_of_text|>"
