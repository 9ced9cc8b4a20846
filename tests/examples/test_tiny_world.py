"""Tests that the tiny world is reproducible and its answers follow from the stories."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples import tiny_world

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "tiny_world"
QUESTIONS = ROOT / "assets" / "tiny_world_questions"

needs_assets = pytest.mark.skipif(
    not (MODEL / "model.safetensors").is_file(),
    reason="assets/tiny_world is missing; configs/pretrain_tiny.py creates it",
)
MEGABYTE = 2**20


def read_story(story: str) -> dict[tuple[str, str], str]:
    """Returns the facts at the end of a story, by subject and name or thing.

    It only reads the sentences, without the generator's state.
    """
    known: dict[tuple[str, str], str] = {}
    animals = "|".join(tiny_world.ANIMALS)
    places = {phrase: place for place, phrase in tiny_world.PLACES.items()}
    titles = "|".join(animal.capitalize() for animal in tiny_world.ANIMALS)
    for sentence in re.split(r"(?<=[.!?\"]) ", story):
        for name, animal in re.findall(rf"(\w+) ({animals})\b", sentence, re.IGNORECASE):
            if name in tiny_world.NAMES:
                known["animal", name] = animal.lower()
        said = re.sub(rf" ({titles})\b", "", sentence)
        if found := re.search(rf"(\w+) was an? \w+ ({animals}) who", said):
            known["animal", found[1]] = found[2]
        if found := re.search(rf"there was an? \w+ ({animals}) called (\w+)", said):
            known["animal", found[2]] = found[1]
        for place, phrase in tiny_world.PLACES.items():
            if found := re.search(rf"(\w+) (?:\w+ )*(?:lived|still) {phrase}", said):
                known["where", found[1]] = place
            if found := re.search(rf"{phrase} there was .* called (\w+)", said, re.IGNORECASE):
                known["where", found[1]] = place
            if found := re.search(rf"(\w+) (?:went|walked|ran) to the {place}\b", said):
                known["where", found[1]] = place
        if found := re.search(r"(\w+) was an? \w+ \w+ who lived (.+)\.", said):
            known["where", found[1]] = places[found[2]]
        if found := re.search(r"(\w+) (?:found|saw) an? (\w+) (\w+)", said):
            known["what", found[1]], known["colour", found[3]] = found[3], found[2]
        if found := re.search(r"(\w+) gave the \w+ (\w+) to (\w+)( and got the \w+ (\w+))?", said):
            known["what", found[3]] = found[2]
            known["what", found[1]] = found[5] or ""
        if found := re.search(r"(\w+) (?:picked up|gathered|counted) (\w+) \w+\.", said):
            known["count", found[1]] = found[2]
        if found := re.fullmatch(rf"(\w+) was ({'|'.join(tiny_world.FEELINGS)})\.", said):
            known["feeling", found[1]] = found[2]
    return known


def expected_answer(question: str, known: dict[tuple[str, str], str]) -> str:
    """Returns the answer that follows from the facts."""
    words = question.rstrip("?").split()
    holders = {thing: name for (kind, name), thing in known.items() if kind == "what"}
    counts = {
        name: tiny_world.NUMBERS.index(number)
        for (kind, name), number in known.items()
        if kind == "count"
    }
    match words:
        case ["Where", "was", name, *_]:
            return f"{name} was {tiny_world.PLACES[known['where', name]]}."
        case ["What", "animal", "was", name]:
            animal = known["animal", name]
            return f"{name} was {'an' if animal == 'owl' else 'a'} {animal}."
        case ["Who", "had", "the", thing, *_]:
            return f"{holders[thing]} had the {thing}."
        case ["What", "did", name, *_]:
            return f"{name} had the {known['what', name]}."
        case ["What", "colour", "was", "the", thing]:
            return f"The {thing} was {known['colour', thing]}."
        case ["How", "many", things, "did", name, "have"]:
            return f"{name} had {known['count', name]} {things}."
        case ["How", "did", name, "feel"]:
            return f"{name} felt {known['feeling', name]}."
        case ["Who", "had", "more", things]:
            more, less = sorted(counts, key=counts.__getitem__, reverse=True)
            return f"{more} had more {things} than {less}."
    raise AssertionError(question)


def test_answers_follow_from_the_stories():
    subjects = set()
    for row in tiny_world.rows(tiny_world.question_row, count=2000, seed="a test"):
        asked, said = row["messages"]
        story, _, question = asked["content"].rpartition("\n")
        assert said["content"] == expected_answer(question, read_story(story)), asked["content"]
        subjects.add(row["subject"])
    assert subjects == {"where", "animal", "who", "what", "colour", "count", "feeling", "more"}


def test_rows_depend_only_on_seed_and_index():
    few = list(tiny_world.rows(tiny_world.any_text, count=20, seed="a"))
    many = list(tiny_world.rows(tiny_world.any_text, count=40, seed="a"))
    others = list(tiny_world.rows(tiny_world.any_text, count=20, seed="b"))
    assert few == many[:20]
    assert not set(few) & set(others)


@needs_assets
@pytest.mark.parametrize("split", ["train", "validation"])
def test_questions_in_the_repository_are_reproducible(split: str):
    lines = (QUESTIONS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    made = tiny_world.rows(tiny_world.question_row, count=len(lines), seed=split)
    assert [json.loads(line) for line in lines] == list(made)


@needs_assets
def test_no_held_out_story_is_trained_on():
    train, held_out = (
        {
            json.loads(line)["messages"][0]["content"].rpartition("\n")[0]
            for line in (QUESTIONS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        }
        for split in ("train", "validation")
    )
    assert len(held_out) >= 200
    assert not train & held_out


@needs_assets
def test_tokenizer_has_every_word_and_answers_continue_prompts():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    row = next(iter(tiny_world.rows(tiny_world.question_row, count=1, seed="another test")))
    text = row["messages"][0]["content"]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    # Every word of a story is a token, so that generated text can be read token by token.
    story = text.rpartition("\n")[0]
    assert len(tokenizer(story, add_special_tokens=False).input_ids) <= len(
        re.findall(r"\w+|[^\w ]", story)
    )
    prompt = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert whole == f"{prompt} {row['messages'][1]['content']}{tokenizer.eos_token}"


@pytest.mark.slow
@needs_assets
def test_tokenizer_training_is_reproducible(tmp_path: Path):
    texts = map(str, tiny_world.rows(tiny_world.any_text, count=20_000, seed="train"))
    tiny_world.train_tokenizer(texts).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


@needs_assets
def test_assets_are_small():
    sizes = [path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file()]
    assert sum(sizes) < 8 * MEGABYTE
