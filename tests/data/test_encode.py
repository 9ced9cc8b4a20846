"""Encoding puts answers in the loss, and gives prompts the tokens that generation has."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import make_tokenizer

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.encode import Encoder
from peft_jax.data.examples import Example, Piece, prompt_and_completion

KINDS = {
    "begin and end": make_tokenizer(),
    "no begin": make_tokenizer(bos=False),
    "no end": make_tokenizer(eos=False),
    "trimmed offsets": make_tokenizer(trim_offsets=True),
}
TEXT = st.text(st.sampled_from("ab P\n:é你"), min_size=1, max_size=12)


def text_in_loss(encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.ids[encoded.loss_mask])


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=60, deadline=None)
def test_the_answer_is_in_the_loss_and_the_prompt_has_its_own_tokens(kind, prompt, completion):
    tokenizer = KINDS[kind]
    encoder = Encoder(tokenizer, max_length=200)
    example = prompt_and_completion(prompt, completion)
    (encoded,) = encoder.encode(example)
    end = tokenizer.eos_token or ""
    assert text_in_loss(encoded, tokenizer) == completion + end
    begin = tokenizer.bos_token or ""
    assert tokenizer.decode(encoded.ids) == begin + prompt + completion + end
    # The tokens before the answer are those of the prompt alone.
    first = int(np.argmax(encoded.loss_mask))
    assert encoded.ids[:first].tolist() == tokenizer(prompt)["input_ids"]
    assert encoder.prompt_ids(example).tolist() == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("name", ["llama3", "tinystories"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Sentiment:", " positive"),
        ("Sentiment: ", "positive"),
        ("Response:", "\nThe cat sat."),
        ("Response:\n", "\n The cat sat."),
        ("one two 12", "345 six"),
        ("The end.\n", "So it was."),
    ],
)
def test_real_tokenizers_keep_the_border_of_prompt_and_answer(request, name, prompt, completion):
    tokenizer = request.getfixturevalue(name)
    encoder = Encoder(tokenizer, max_length=200)
    example = prompt_and_completion(prompt, completion)
    (encoded,) = encoder.encode(example)
    first = int(np.argmax(encoded.loss_mask))
    assert encoded.ids[:first].tolist() == tokenizer(prompt)["input_ids"]
    assert encoded.loss_mask[first:].all()
    assert encoded.ids[-1] == tokenizer.eos_token_id
    whole = tokenizer.decode(encoded.ids, skip_special_tokens=True)
    # This SentencePiece tokenizer's decoder removes the first of two spaces after its begin token.
    assert whole.strip() == prompt + completion


def test_text_is_tokenized_as_a_whole_if_no_token_crosses_the_border(llama3):
    encoder = Encoder(llama3, max_length=200)
    (encoded,) = encoder.encode(prompt_and_completion("Review: fine.\nSentiment:", " positive"))
    whole = llama3("Review: fine.\nSentiment: positive")["input_ids"]
    assert encoded.ids.tolist() == [*whole, llama3.eos_token_id]


def test_existing_begin_and_end_tokens_are_not_repeated(tokenizer):
    (encoded,) = Encoder(tokenizer, max_length=50).encode(prompt_and_completion("<s>a", " b"))
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    (encoded,) = Encoder(tokenizer, max_length=50).encode(prompt_and_completion("a", " b</s>"))
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_the_padding_token_defaults_to_the_end_token_or_0(tokenizer):
    assert tokenizer.pad_token_id is None
    assert Encoder(tokenizer, max_length=9).pad_id == tokenizer.eos_token_id
    assert Encoder(KINDS["no end"], max_length=9).pad_id == 0


def test_without_completion_only_all_tokens_are_in_the_loss(tokenizer):
    encoder = Encoder(tokenizer, max_length=50, completion_only=False)
    (encoded,) = encoder.encode(prompt_and_completion("ab", " cd"))
    assert encoded.loss_mask.all()


@pytest.mark.parametrize("excess", [-1, 0, 1, 5])
def test_sequences_that_are_too_long_are_rejected_truncated_or_split(tokenizer, excess):
    example = prompt_and_completion("ab:", " cdefgh")
    size = len(tokenizer("ab: cdefgh")["input_ids"]) + 1
    # One token more than positions fits, since the last one is only predicted.
    fits = size - 1 - excess
    encoders = {
        policy: Encoder(tokenizer, max_length=fits, too_long=policy)
        for policy in ("skip", "error", "truncate", "split")
    }
    (whole,) = Encoder(tokenizer, max_length=99).encode(example)
    if excess <= 0:
        for encoder in encoders.values():
            (encoded,) = encoder.encode(example)
            assert encoded.ids.tolist() == whole.ids.tolist()
        return
    for policy in ("skip", "error"):
        with pytest.raises(BadRowError, match=rf"too long: {size} tokens, .* {fits + 1} fit"):
            encoders[policy].encode(example)
    if excess == 5:
        (cut,) = encoders["truncate"].encode(example)
        assert cut.ids.tolist() == whole.ids[: fits + 1].tolist()
    parts = encoders["split"].encode(example)
    predicted = np.concatenate([part.ids[1:][part.loss_mask[1:]] for part in parts])
    assert predicted.tolist() == whole.ids[whole.loss_mask].tolist()


def test_a_truncated_row_without_an_answer_is_rejected(tokenizer):
    encoder = Encoder(tokenizer, max_length=3, too_long="truncate")
    with pytest.raises(BadRowError, match="too long: "):
        encoder.encode(prompt_and_completion("abcdef:", " g"))


@given(st.text(st.sampled_from("ab c\n"), min_size=1, max_size=60), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_split_text_predicts_every_token_once(text, max_length):
    tokenizer = KINDS["begin and end"]
    encoder = Encoder(tokenizer, max_length=max_length, completion_only=False, too_long="split")
    parts = encoder.encode(prompt_and_completion("", text))
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert np.concatenate([part.ids[1:] for part in parts]).tolist() == whole[1:]
    assert np.concatenate([part.ids[:-1] for part in parts]).tolist() == whole[:-1]
    assert all(1 <= part.positions <= max_length for part in parts)


@pytest.mark.parametrize("name", ["llama3", "tinystories", "tokenizer"])
def test_choices_have_the_tokens_of_answers(request, name):
    tokenizer = request.getfixturevalue(name)
    encoder = Encoder(tokenizer, max_length=99)
    choices = (" yes", " maybe", " no")
    for label, choice in enumerate(choices):
        example = prompt_and_completion("Is it so?", choice, choices=choices, label=label)
        (encoded,) = encoder.encode(example)
        answer = encoded.ids[encoded.loss_mask][:-1]  # Without the end token.
        assert encoder.choice_ids(example)[label].tolist() == answer.tolist()


def test_lost_characters_are_found(tinystories, llama3):
    example = prompt_and_completion("1 + 2 =", " 3 #### 3 café")
    assert Encoder(tinystories, max_length=99).lost_characters(example) == {"+", "=", "#", "é"}
    assert Encoder(llama3, max_length=99).lost_characters(example) == set()


def test_several_pieces_can_be_in_the_loss(tokenizer):
    pieces = [("q:", False), (" a", True), ("\nq:", False), (" b", True), ("\n", False)]
    example = Example(pieces=tuple(Piece(text=text, in_loss=in_loss) for text, in_loss in pieces))
    (encoded,) = Encoder(tokenizer, max_length=99).encode(example)
    assert text_in_loss(encoded, tokenizer) == " a b</s>"
    assert example.prompt == "q: a\nq:"
    assert example.completion == " b"


def test_an_example_without_tokens_in_the_loss_is_rejected(tokenizer):
    with pytest.raises(BadRowError, match="empty"):
        Encoder(KINDS["no end"], max_length=9, completion_only=True).encode(
            Example(pieces=(Piece(text="a", in_loss=False),))
        )
    with pytest.raises(ValueError, match="max_length is 0"):
        Encoder(tokenizer, max_length=0)
