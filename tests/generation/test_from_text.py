"""Tests generation from texts: tokenized prompts, decoded texts and stop strings."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_jax.data.examples import prompt_and_completion
from peft_jax.generation import GenerationSettings, end_tokens, generate, generate_text
from peft_jax.generation.ends import Continuation

SPACE = "▁"
ASKED = ["the cat", "a", "who is there? the", ""]
SETTINGS = GenerationSettings(max_new_tokens=20, eos_ids=())


def as_tokens(tokenizer, *words):
    return np.array(tokenizer.convert_tokens_to_ids(list(words)), np.int32)


@pytest.fixture(scope="module")
def free(speaker, tokenizer):
    """Returns continuations without end tokens and stop strings."""
    return generate_text(*speaker, tokenizer, ASKED, SETTINGS)


def test_texts_agree_with_the_generated_tokens(speaker, tokenizer, free):
    prompts = [tokenizer(text)["input_ids"] for text in ASKED]
    expected = generate(*speaker, prompts, SETTINGS)
    for prompt, theirs, ours in zip(prompts, expected.completions, free.completions, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        whole = tokenizer.decode([*prompt, *ours.tokens], skip_special_tokens=True)
        assert whole == tokenizer.decode(prompt, skip_special_tokens=True) + ours.text
    assert free.texts == [completion.text for completion in free.completions]
    assert free.stats.new_tokens == 80


def test_text_ends_before_the_stop_string(speaker, tokenizer, free):
    stops = (free.texts[0][4:7], free.texts[2][9:11])
    settings = dataclasses.replace(SETTINGS, stop_strings=stops)
    found = generate_text(*speaker, tokenizer, ASKED, settings)
    reasons = {completion.finish_reason for completion in found.completions}
    assert "stop_string" in reasons
    for before, after in zip(free.completions, found.completions, strict=True):
        places = [place for stop in stops if (place := before.text.find(stop)) >= 0]
        if not places:
            assert after.text == before.text
            assert after.finish_reason == "max_new_tokens"
            continue
        assert after.finish_reason == "stop_string"
        assert after.text == before.text[: min(places)]
        count = len(after.tokens)
        np.testing.assert_array_equal(after.tokens, before.tokens[:count])


def test_special_tokens_can_be_stop_strings(tokenizer):
    continuation = Continuation(tokenizer, tokenizer("the")["input_ids"])
    tokens = as_tokens(tokenizer, "a", "<|im_end|>", "b")
    assert continuation.find(("<|im_end|>",), tokens) == 2
    assert continuation.find(("b",), tokens) == 3
    assert continuation.find(("c",), tokens) is None
    assert continuation.text(tokens[:2]) == "a"


@pytest.mark.parametrize(
    ("prompt", "words", "text"),
    [
        ("the", [SPACE, "a"], " a"),
        ("the", ["a", SPACE], "a "),
        ("", [SPACE + "the"], "the"),
        ("a cat is " * 5, [SPACE + "the", "."], " the."),
    ],
)
def test_continuation_keeps_its_leading_space(tokenizer, prompt, words, text):
    continuation = Continuation(tokenizer, tokenizer(prompt)["input_ids"])
    tokens = as_tokens(tokenizer, *words)
    assert continuation.text(tokens) == text


def test_characters_of_several_tokens_are_decoded(shared_data):
    llama3 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama3")
    for text in (" naïve 雪崩 🎉🎉 done", "\n\n  x = [1, 2]", " 你好"):
        whole = llama3("He said" + text, add_special_tokens=False)["input_ids"]
        for cut in range(1, len(whole)):
            continuation = Continuation(llama3, whole[:cut])
            tokens = np.asarray(whole[cut:], np.int32)
            head, tail = llama3.decode(whole[:cut]), continuation.text(tokens)
            if "\N{REPLACEMENT CHARACTER}" not in head:
                assert head + tail == "He said" + text
            assert continuation.find((text[-2:],), tokens) in (len(tokens), None)


def test_prompts_of_every_kind_are_tokenized_as_in_training(speaker, tokenizer):
    chat = [{"role": "user", "content": "who?"}]
    example = prompt_and_completion("the cat", " is the", answer="is the")
    found = generate_text(*speaker, tokenizer, [chat, example, "the cat"], SETTINGS)
    ids = tokenizer("<s>u:who?<|im_end|>a:", add_special_tokens=False)["input_ids"]
    assert [ids.count(1), ids.count(3)] == [1, 1]
    cat = tokenizer("the cat")["input_ids"]
    expected = generate(*speaker, [ids, cat, cat], SETTINGS)
    for theirs, ours in zip(expected.completions, found.completions, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_text_instead_of_a_list_is_rejected(speaker, tokenizer):
    with pytest.raises(ValueError, match="prompts must be a list"):
        generate_text(*speaker, tokenizer, "the cat")


def test_end_tokens_are_collected_from_all_files(speaker, tokenizer, tmp_path):
    model, _ = speaker
    assert end_tokens(model) == (2,)
    config = model.hf_config | {"eos_token_id": [5, 99]}
    model = dataclasses.replace(model, hf_json=json.dumps(config))
    assert end_tokens(model) == (5,)
    assert end_tokens(model, tokenizer=tokenizer) == (2, 5)
    assert end_tokens(model, folder=tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert end_tokens(model, tokenizer=tokenizer, folder=tmp_path) == (2, 3, 5, 7)


def test_end_token_of_the_tokenizer_ends_a_text(speaker, tokenizer, free):
    eos = int(free.completions[0].tokens[7])
    word = tokenizer.convert_ids_to_tokens(eos)
    ending = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token=word
    )
    settings = GenerationSettings(max_new_tokens=20)
    found = generate_text(*speaker, ending, ASKED, settings).completions[0]
    assert found.finish_reason == "eos"
    first = free.completions[0].tokens.tolist().index(eos)
    np.testing.assert_array_equal(found.tokens, free.completions[0].tokens[: first + 1])
    assert found.text == tokenizer.decode([1, *found.tokens[:-1]], skip_special_tokens=True)
