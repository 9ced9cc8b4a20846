"""Text to tokens: the answer is learned, and prompts are what generation is given."""

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


def learned(encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.ids[encoded.learn])


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=60, deadline=None)
def test_the_answer_is_learned_and_the_prompt_is_what_generation_is_given(kind, prompt, completion):
    tokenizer = KINDS[kind]
    encoder = Encoder(tokenizer, max_length=200)
    example = prompt_and_completion(prompt, completion)
    (encoded,) = encoder.encode(example)
    end = tokenizer.eos_token or ""
    assert learned(encoded, tokenizer) == completion + end
    begin = tokenizer.bos_token or ""
    assert tokenizer.decode(encoded.ids) == begin + prompt + completion + end
    # The tokens before the answer are those of the prompt alone, as the tokenizer makes them.
    first = int(np.argmax(encoded.learn))
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
def test_real_tokenizers_keep_the_border(request, name, prompt, completion):
    tokenizer = request.getfixturevalue(name)
    encoder = Encoder(tokenizer, max_length=200)
    example = prompt_and_completion(prompt, completion)
    (encoded,) = encoder.encode(example)
    first = int(np.argmax(encoded.learn))
    assert encoded.ids[:first].tolist() == tokenizer(prompt)["input_ids"]
    assert encoded.learn[first:].all()
    assert encoded.ids[-1] == tokenizer.eos_token_id
    whole = tokenizer.decode(encoded.ids, skip_special_tokens=True)
    # This SentencePiece tokenizer's decoder removes the first of two spaces after its begin token.
    assert whole.strip() == prompt + completion


def test_tokens_are_the_whole_text_s_where_no_token_crosses_the_border(llama3):
    encoder = Encoder(llama3, max_length=200)
    (encoded,) = encoder.encode(prompt_and_completion("Review: fine.\nSentiment:", " positive"))
    whole = llama3("Review: fine.\nSentiment: positive")["input_ids"]
    assert encoded.ids.tolist() == [*whole, llama3.eos_token_id]


def test_a_beginning_that_is_there_already_is_not_put_twice(tokenizer):
    (encoded,) = Encoder(tokenizer, max_length=50).encode(prompt_and_completion("<s>a", " b"))
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    (encoded,) = Encoder(tokenizer, max_length=50).encode(prompt_and_completion("a", " b</s>"))
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_padding_token(tokenizer):
    assert tokenizer.pad_token_id is None
    assert Encoder(tokenizer, max_length=9).pad_id == tokenizer.eos_token_id
    assert Encoder(KINDS["no end"], max_length=9).pad_id == 0


def test_all_is_learned_where_the_recipe_says_so(tokenizer):
    encoder = Encoder(tokenizer, max_length=50, completion_only=False)
    (encoded,) = encoder.encode(prompt_and_completion("ab", " cd"))
    assert encoded.learn.all()


@pytest.mark.parametrize("excess", [-1, 0, 1, 5])
def test_too_long(tokenizer, excess):
    example = prompt_and_completion("ab:", " cdefgh")
    size = len(tokenizer("ab: cdefgh")["input_ids"]) + 1
    # One token more than there are positions fits, because the last is only predicted.
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
        with pytest.raises(BadRowError, match=f"too long: {size} tokens, and at most {fits + 1}"):
            encoders[policy].encode(example)
    if excess == 5:
        (cut,) = encoders["truncate"].encode(example)
        assert cut.ids.tolist() == whole.ids[: fits + 1].tolist()
    parts = encoders["split"].encode(example)
    predicted = np.concatenate([part.ids[1:][part.learn[1:]] for part in parts])
    assert predicted.tolist() == whole.ids[whole.learn].tolist()


def test_a_truncated_row_without_answer_is_refused(tokenizer):
    encoder = Encoder(tokenizer, max_length=3, too_long="truncate")
    with pytest.raises(BadRowError, match="hold no answer"):
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
def test_choices_follow_the_prompt_as_answers_do(request, name):
    tokenizer = request.getfixturevalue(name)
    encoder = Encoder(tokenizer, max_length=99)
    choices = (" yes", " maybe", " no")
    for label, choice in enumerate(choices):
        example = prompt_and_completion("Is it so?", choice, choices=choices, label=label)
        (encoded,) = encoder.encode(example)
        answer = encoded.ids[encoded.learn][:-1]  # without the end token
        assert encoder.choice_ids(example)[label].tolist() == answer.tolist()


def test_lost_characters_are_found(tinystories, llama3):
    example = prompt_and_completion("1 + 2 =", " 3 #### 3 café")
    assert Encoder(tinystories, max_length=99).lost_characters(example) == {"+", "=", "#", "é"}
    assert Encoder(llama3, max_length=99).lost_characters(example) == set()


def test_several_learned_pieces(tokenizer):
    pieces = [("q:", False), (" a", True), ("\nq:", False), (" b", True), ("\n", False)]
    example = Example(pieces=tuple(Piece(text=text, learn=learn) for text, learn in pieces))
    (encoded,) = Encoder(tokenizer, max_length=99).encode(example)
    assert learned(encoded, tokenizer) == " a b</s>"
    assert example.prompt == "q: a\nq:"
    assert example.completion == " b"


def test_nothing_to_learn(tokenizer):
    with pytest.raises(BadRowError, match="empty"):
        Encoder(KINDS["no end"], max_length=9, completion_only=True).encode(
            Example(pieces=(Piece(text="a", learn=False),))
        )
    with pytest.raises(ValueError, match="max_length is 0"):
        Encoder(tokenizer, max_length=0)
