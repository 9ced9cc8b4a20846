"""Control tokens in message text are tokenized as characters, and only there.

`sanitize_control_tokens` of transformers is the independent reference for prompts.
"""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import make_tokenizer

from peft_jax.data import DataSettings, build_data
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.control_tokens import ControlTokens
from peft_jax.data.encode import Encoder
from peft_jax.data.examples import Conversation, prompt_and_completion
from peft_jax.generation.from_text import _as_example

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
PLAIN = TEMPLATE.replace("<think>", "")
TOKENIZER = make_tokenizer()
TOKENIZER.add_tokens([AddedToken("<think>", special=False), AddedToken("word", special=False)])
TOKENIZER.chat_template = PLAIN
CONTROL = {
    TOKENIZER.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
}
TEXT = st.lists(
    st.sampled_from(
        ["a", " b", "\n", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<|im_", "|>"]
    ),
    min_size=1,
    max_size=6,
).map(lambda parts: "Q" + "".join(parts))


def split_encoder(**kw) -> Encoder:
    return Encoder(TOKENIZER, max_length=2000, split_special_tokens=True, **kw)


@given(texts=st.lists(TEXT, min_size=1, max_size=3), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_prompts_equal_the_sanitized_ones_of_transformers(texts, data):
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": "I say"})
    encoder = split_encoder()
    (encoded,) = encoder.encode(Conversation(messages=tuple(messages)))
    # Only the template's control tokens remain, two per turn.
    control = [number for number in encoded.ids.tolist() if number in CONTROL]
    assert len(control) == 2 * len(messages)
    assert TOKENIZER.decode(encoded.ids) == TOKENIZER.apply_chat_template(messages, tokenize=False)
    for index in range(1, len(messages), 2):
        prompt = encoder.prompt_ids(_as_example(messages[:index], encoder))
        assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()
        expected = TOKENIZER.apply_chat_template(
            messages[:index],
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
        )
        assert prompt.tolist() == expected


def test_without_the_setting_message_text_has_control_tokens():
    messages = ({"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"})
    (encoded,) = Encoder(TOKENIZER, max_length=200).encode(Conversation(messages=messages))
    assert sum(number in CONTROL for number in encoded.ids.tolist()) == 5


def test_assistant_text_keeps_control_tokens_and_tools_do_not():
    tools = ({"type": "function", "function": {"name": "</s>", "parameters": {"<|im_end|>": 1}}},)
    messages = (
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "a</s>b"},
    )
    conversation = Conversation(messages=messages, tools=tools)
    (encoded,) = split_encoder().encode(conversation)
    assert encoded.ids.tolist().count(TOKENIZER.eos_token_id) == 1
    text = TOKENIZER.apply_chat_template(list(messages), tools=list(tools), tokenize=False)
    assert TOKENIZER.decode(encoded.ids) == text
    assert sum(number in CONTROL for number in encoded.ids.tolist()) == 7


def test_added_tokens_are_control_tokens_if_a_template_has_them(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    think, word = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<think>", "word"))
    messages = [{"role": "user", "content": "<think> word"}]
    for template, thoughts in ((TEMPLATE, 1), (PLAIN, 1)):
        path.write_text(template)
        renderer = ChatRenderer(TOKENIZER, chat_template=str(path), split_special_tokens=True)
        encoder = split_encoder(renderer=renderer)
        ids = encoder.prompt_ids(renderer.prompt(messages)).tolist()
        # In the first, it is the template's own; in the second, an ordinary word of the user.
        assert ids.count(think) == thoughts
        assert ids.count(word) == 1
        assert ids == TOKENIZER.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
        )


def test_text_without_a_template_splits_control_tokens_of_the_prompt(tmp_path):
    example = prompt_and_completion("a</s> <|im_end|>b:", " c</s>")
    encoder = split_encoder()
    (encoded,) = encoder.encode(example)
    assert TOKENIZER.decode(encoded.ids) == "<s>a</s> <|im_end|>b: c</s>"
    control = [number for number in encoded.ids.tolist() if number in CONTROL]
    assert control == [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]
    prompt = encoder.prompt_ids(example)
    assert prompt.tolist() == encoded.ids[: len(prompt)].tolist()
    assert (
        encoder.prompt_ids(_as_example("a</s> <|im_end|>b:", encoder)).tolist() == prompt.tolist()
    )
    # The second begin token is the user's text.
    assert encoder.prompt_ids(_as_example("<s>a", encoder)).tolist().count(0) == 1


@pytest.mark.parametrize(
    "made",
    [
        "{{ m.content | tojson(ensure_ascii=true) }}",
        "{{ m.content[1:] }}",
        "{{ m.content[:-1] }}",
        "{{ m.content | trim }}",
    ],
)
def test_marks_that_a_template_cuts_or_escapes_are_found(tmp_path, made):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}" + made + "{% endfor %}")
    renderer = ChatRenderer(TOKENIZER, chat_template=str(path), split_special_tokens=True)
    example = renderer.prompt([{"role": "user", "content": "<|im_end|>"}])
    assert example.prompt.strip('"') == "<|im_end|>"
    assert not set(split_encoder(renderer=renderer).prompt_ids(example).tolist()) & CONTROL


def test_private_characters_are_a_bad_row():
    messages = ({"role": "user", "content": "\U000f0000"}, {"role": "assistant", "content": "b"})
    with pytest.raises(BadRowError, match=r"U\+F0000"):
        split_encoder().encode(Conversation(messages=messages))


def test_unmark_shifts_spans():
    control = ControlTokens(TOKENIZER, ())
    marked = control.mark("a</s>b") + "|" + control.mark("<s>") + "</s>c"
    text, spans, plain = control.unmark(marked, [(1, 7), (len(marked) - 1, len(marked))])
    assert text == "a</s>b|<s></s>c"
    assert [text[a:b] for a, b in spans] == ["</s>", "c"]
    assert [text[a:b] for a, b in plain] == ["</s>", "<s>"]


def test_data_split_special_tokens_splits_control_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a<|im_end|>", "completion": "b"}
    path.write_text(json.dumps(row) + "\n")
    counts = []
    for split in (False, True):
        train, _ = build_data(
            DataSettings(recipe="chat", path=str(path), split_special_tokens=split, prefetch=0),
            TOKENIZER,
            batch_size=1,
            max_length=100,
            seed=0,
        )
        batch = next(train)
        train.close()
        tokens = batch.tokens[0][batch.segment_ids[0] > 0].tolist()
        counts.append(tokens.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")))
    assert counts[0] == counts[1] + 1
