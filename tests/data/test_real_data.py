"""Real files give the published numbers of rows, examples and tokens in the loss."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from peft_jax.data import DataSettings, build_data, get_recipe
from peft_jax.data.recipes.flores import LANGUAGE_NAMES
from peft_jax.data.sources import open_sources


def open_settings(**kw):
    settings = DataSettings(**kw)
    recipe = get_recipe(settings.recipe).configured(settings)
    return open_sources(settings, recipe), recipe


def raw_tsv(path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize(
    ("recipe", "folder", "sizes", "label_column", "header", "names"),
    [
        ("cola", "CoLA", (8551, 1043), 1, False, {"0": "no", "1": "yes"}),
        ("sst2", "SST-2", (67349, 872), 1, True, {"0": "negative", "1": "positive"}),
        ("rte", "RTE", (2490, 277), 3, True, {"not_entailment": "no", "entailment": "yes"}),
    ],
)
def test_glue_files_give_the_published_rows_and_scores(
    published_data, recipe, folder, sizes, label_column, header, names
):
    path = published_data / "glue" / folder
    sources, made = open_settings(recipe=recipe, path=str(path))
    assert (len(sources.train), len(sources.held_out)) == sizes
    raw = raw_tsv(path / "dev.tsv")[header:]
    examples = [made.example(sources.held_out[index]) for index in range(sizes[1])]
    expected = [names[row[label_column]] for row in raw]
    assert [example.answer for example in examples] == expected
    sentence = -1 if recipe == "cola" else 0
    if recipe != "rte":
        assert all(
            row[sentence] in example.prompt for row, example in zip(raw, examples, strict=True)
        )
    # Perfect predictions score 1, and constant ones the share of their label.
    perfect = made.metrics([example.completion for example in examples], examples)
    assert set(perfect.values()) == {1.0}
    constant = made.metrics(
        [f" {names['1' if '1' in names else 'entailment']}"] * sizes[1], examples
    )
    share = Counter(expected)[names["1" if "1" in names else "entailment"]] / sizes[1]
    assert constant["accuracy"] == pytest.approx(share)
    assert constant.get("matthews_correlation", 0.0) == 0.0


@pytest.mark.parametrize("language", ["ar", "de", "en", "es", "fr", "hi", "sw", "zh"])
def test_xnli_files_give_the_published_rows(published_data, language):
    sources, recipe = open_settings(
        recipe="xnli", path=str(published_data / "xnli"), language=language
    )
    assert (len(sources.train), len(sources.held_out)) == (2490, 5010)
    assert f"dev-{language}.tsv:1" in sources.train.where(0)
    answers = Counter(recipe.example(sources.train[index]).answer for index in range(2490))
    assert answers == {"yes": 830, "maybe": 830, "no": 830}


@pytest.mark.parametrize("target", ["deu_Latn", "zho_Hans", "arb_Arab"])
def test_flores_files_give_aligned_sentences(published_data, target):
    folder = published_data / "flores200"
    sources, recipe = open_settings(recipe="flores", path=str(folder), target_language=target)
    assert (len(sources.train), len(sources.held_out)) == (997, 1012)
    english = (folder / "devtest" / "eng_Latn.devtest").read_text().split("\n")
    other = (folder / "devtest" / f"{target}.devtest").read_text().split("\n")
    for index in (0, 500, 1011):
        example = recipe.example(sources.held_out[index])
        assert example.prompt == f"English: {english[index]}\n{LANGUAGE_NAMES[target]}:"
        assert example.completion == f" {other[index]}"
        assert recipe.score(example.completion, example) == pytest.approx(1.0)


def test_alpaca_rows_become_prompts_and_answers(published_data):
    path = published_data / "sft" / "alpaca_en_demo.json"
    rows = json.loads(path.read_text())
    sources, recipe = open_settings(recipe="alpaca", path=str(path))
    held_out = round(len(rows) * 0.05)
    assert len(sources.held_out) == held_out
    assert len(sources.train) == len(rows) - held_out
    example = recipe.example(sources.train[0])
    row = next(row for row in rows if f"\n{row['instruction']}\n" in example.prompt)
    assert example.completion == f"\n{row['output']}"


@pytest.mark.slow
def test_only_gsm8k_answers_are_in_the_loss(published_data, llama3):
    folder = published_data / "gsm8k"
    train, held_out = build_data(
        DataSettings(recipe="gsm8k", path=str(folder), eval_rows=40),
        llama3,
        batch_size=4,
        max_length=512,
        seed=1,
    )
    assert len(train) == 7473
    lines = (folder / "train.jsonl").read_text().splitlines()
    known = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    batches = [next(train) for _ in range(3)]
    assert train.padding_share < 0.03
    train.close()
    for batch in batches:
        for row in range(4):
            for number in range(1, batch.segment_ids[row].max() + 1):
                here = batch.segment_ids[row] == number
                text = llama3.decode(batch.tokens[row][here])
                question = text.removeprefix("<|begin_of_text|>Question: ").partition("\nAnswer:")[
                    0
                ]
                in_loss = here & (batch.loss_mask[row] > 0)
                answer = llama3.decode(batch.targets[row][in_loss])
                assert answer == f" {known[question]}<|end_of_text|>"
                begins = batch.tokens[row][here] == llama3.bos_token_id
                assert np.flatnonzero(begins).tolist() == [0]
    perfect = [example.completion for example in held_out.examples]
    assert held_out.recipe.metrics(perfect, held_out.examples) == {"exact_match": 1.0}


def test_gsm8k_conversations_use_the_template_of_llama_3(published_data, llama3):
    _, held_out = build_data(
        DataSettings(
            recipe="gsm8k",
            path=str(published_data / "gsm8k"),
            eval_rows=8,
            train_rows=8,
            chat=True,
            packing=False,
        ),
        llama3,
        batch_size=2,
        max_length=600,
        seed=0,
    )
    example = held_out.examples[0]
    assert example.prompt.startswith(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    )
    assert "Question:" not in example.prompt
    batch = held_out[0]
    in_loss = llama3.decode(batch.targets[0][batch.loss_mask[0] > 0])
    assert in_loss == f"{example.completion}"
    assert in_loss.endswith("<|eot_id|>")
    assert (batch.tokens[0] == llama3.bos_token_id).sum() == 1
