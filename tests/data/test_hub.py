"""Data sets saved by `datasets`, and from the hub, whose loader is replaced."""

import datasets
import pytest

from peft_jax.data import DataSettings, get_recipe
from peft_jax.data.sources import open_sources

QUESTIONS = [{"question": f"{number}?", "answer": f"#### {number}"} for number in range(40)]


def rows_of(table) -> list[dict]:
    return [dict(table[index]) for index in range(len(table))]


@pytest.fixture
def hub(monkeypatch):
    """Replaces the hub; returns the list of requests and the available data sets."""
    requests, sets = [], {}

    def load_dataset(path, name=None, *, split=None, revision=None):
        requests.append((path, name, split, revision))
        if (path, name) not in sets:
            raise FileNotFoundError(f"no {path} {name}")
        found = {key: datasets.Dataset.from_list(rows) for key, rows in sets[path, name].items()}
        if split is None:
            return datasets.DatasetDict(found)
        key, _, count = split.removesuffix("]").partition("[:")
        return found[key].select(range(int(count)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests, sets


def open_settings(**kw):
    settings = DataSettings(**kw)
    return open_sources(settings, get_recipe(settings.recipe).configured(settings))


def test_an_empty_path_loads_the_recipe_s_own_data_set(hub):
    requests, sets = hub
    sets["openai/gsm8k", "main"] = {"train": QUESTIONS, "test": QUESTIONS[:3]}
    sources = open_settings(recipe="gsm8k", revision="abc")
    assert requests == [("openai/gsm8k", "main", None, "abc")]
    assert rows_of(sources.train) == QUESTIONS
    assert rows_of(sources.held_out) == QUESTIONS[:3]
    assert sources.train.where(1) == "openai/gsm8k train, row 2"


@pytest.mark.parametrize(
    ("recipe", "path", "subset"),
    [
        *(
            (task, "nyu-mll/glue", task)
            for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
        ),
        ("alpaca", "tatsu-lab/alpaca", None),
        ("xnli", "facebook/xnli", "sw"),
    ],
)
def test_recipes_load_their_own_data_sets(hub, recipe, path, subset):
    requests, sets = hub
    dev = "validation_matched" if recipe == "mnli" else "validation"
    sets[path, subset] = {"train": [{"a": 1}] * 3, dev: [{"a": 2}], "test": [{"a": 3}]}
    language = {"language": "sw"} if recipe == "xnli" else {}
    sources = open_settings(recipe=recipe, **language)
    assert requests == [(path, subset, None, None)]
    assert rows_of(sources.held_out) == [{"a": 2}]


def test_a_hub_name_loads_its_subset_and_splits(hub):
    requests, sets = hub
    sets["me/mine", "small"] = {"part": QUESTIONS, "dev": QUESTIONS[:4]}
    common = {"recipe": "gsm8k", "path": "me/mine", "subset": "small"}
    sources = open_settings(**common, train_split="part", eval_split="validation")
    assert len(sources.train) == 40
    assert len(sources.held_out) == 4
    sources = open_settings(**common, train_split="part[:7]")
    assert requests[-1] == ("me/mine", "small", "part[:7]", None)
    assert rows_of(sources.train) == QUESTIONS[:7]
    with pytest.raises(ValueError, match=r"no split train .*dev, part"):
        open_settings(**common)


def test_an_unavailable_data_set_raises(hub, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"data\.path is 'me/absent'"):
        open_settings(recipe="gsm8k", path="me/absent")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gsm8k").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean 'gsm8k'"):
        open_settings(recipe="gsm8k", path="data/gsm8")


def test_flores_joins_two_languages(hub):
    requests, sets = hub
    path = "openlanguagedata/flores_plus"

    def texts(word):
        return [{"id": index, "text": f"{word} {index}"} for index in range(3)]

    for code, word in (("eng_Latn", "yes"), ("deu_Latn", "ja")):
        sets[path, code] = {"dev": texts(word), "devtest": texts(word)[:2]}
    sources = open_settings(recipe="flores", target_language="deu_Latn")
    assert requests == [(path, "eng_Latn", None, None), (path, "deu_Latn", None, None)]
    assert rows_of(sources.train)[2] == {"source": "yes 2", "target": "ja 2"}
    assert len(sources.held_out) == 2


@pytest.mark.parametrize("split", [False, True])
def test_data_sets_saved_to_disk_are_loaded(tmp_path, split):
    rows = datasets.Dataset.from_list(QUESTIONS)
    saved = datasets.DatasetDict({"train": rows, "test": rows.select([1])}) if split else rows
    saved.save_to_disk(str(tmp_path / "saved"))
    sources = open_settings(recipe="gsm8k", path=str(tmp_path / "saved"))
    assert len(sources.held_out) == (1 if split else 2)
    assert len(sources.train) == (40 if split else 38)


def test_several_languages_load_several_subsets(hub):
    requests, sets = hub
    for language in ("fr", "sw"):
        rows = [{"premise": language, "hypothesis": str(n), "label": 1} for n in range(3)]
        sets["facebook/xnli", language] = {"train": rows, "validation": rows[:1]}
    sources = open_settings(recipe="xnli", language="fr,sw")
    assert [name for _, name, _, _ in requests] == ["fr", "sw"]
    found = rows_of(sources.train)
    assert [row["premise"] for row in found] == ["fr"] * 3 + ["sw"] * 3
    assert len(sources.held_out) == 2


def test_flores_joins_several_pairs_of_languages(hub):
    _, sets = hub
    for code in ("eng_Latn", "deu_Latn", "fra_Latn"):
        rows = [{"id": index, "text": f"{code} {index}"} for index in range(3)]
        sets["openlanguagedata/flores_plus", code] = {"dev": rows, "devtest": rows[:1]}
    sources = open_settings(recipe="flores", target_language="deu_Latn,fra_Latn")
    found = rows_of(sources.train)
    assert [row["target"] for row in found[::3]] == ["deu_Latn 0", "fra_Latn 0"]
    assert len(sources.held_out) == 2
