"""Runs in several languages join the rows, and hold out the same rows in each."""

import collections
import contextlib
import json

import pytest

from peft_jax.data import DataSettings, build_data
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.recipes import get_recipe
from peft_jax.data.sources import open_sources


def sources(path, recipe, **changes):
    settings = DataSettings(recipe=recipe, path=str(path), **changes)
    configured = get_recipe(recipe).configured(settings)
    return open_sources(settings, configured), configured


def prompts(table, recipe) -> list[str]:
    return [recipe.example(table[index]).prompt for index in range(len(table))]


@pytest.fixture
def xnli(tmp_path):
    """Writes the same sixty numbered rows in each of four languages."""
    for language in ("en", "fr", "sw", "zh"):
        rows = [f"{language} {number}\t{number}\tneutral" for number in range(60)]
        (tmp_path / f"train-{language}.tsv").write_text("\n".join(rows))
        (tmp_path / f"dev-{language}.tsv").write_text("\n".join(rows[:5]))
    (tmp_path / "test-en.tsv").write_text("en 0\t0\tneutral")
    return tmp_path


def read_xnli(table, recipe) -> list[tuple[str, int]]:
    texts = (prompt.split("\n")[0].removeprefix("Premise: ") for prompt in prompts(table, recipe))
    return [(text.split()[0], int(text.split()[1])) for text in texts]


def test_xnli_joins_the_files_of_several_languages(xnli):
    found, recipe = sources(xnli, "xnli", language="fr,sw")
    rows = read_xnli(found.train, recipe)
    assert rows == [(language, n) for language in ("fr", "sw") for n in range(60)]
    assert read_xnli(found.held_out, recipe) == [("fr", n) for n in range(5)] + [
        ("sw", n) for n in range(5)
    ]
    assert found.train_origin.name == f"train-fr.tsv, train-sw.tsv in {xnli}"
    assert found.train.where(61) == f"{xnli / 'train-sw.tsv'}:2"


@pytest.mark.parametrize(("hold_out", "each"), [(10, 5), (0.1, 6)])
def test_held_out_rows_are_the_same_in_every_language(xnli, hold_out, each):
    found, recipe = sources(xnli, "xnli", language="fr, sw", hold_out=hold_out)
    held, trained = (
        collections.defaultdict(set),
        collections.defaultdict(set),
    )
    for table, into in ((found.held_out, held), (found.train, trained)):
        for language, number in read_xnli(table, recipe):
            into[language].add(number)
    assert held["fr"] == held["sw"]
    assert len(held["fr"]) == each
    assert trained["fr"] == trained["sw"] == set(range(60)) - held["fr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "fr,de"}, r"data\.language is 'de'.*fr, sw"),
        ({"language": "fr,xx"}, "data.language is 'xx'"),
        (
            {"language": "en,fr", "eval_split": "test"},
            "data.language 'fr' has no split 'test'",
        ),
    ],
)
def test_missing_languages_raise(xnli, changes, message):
    with pytest.raises(ValueError, match=message):
        sources(xnli, "xnli", **changes)


def test_rows_are_selected_by_their_language_column(tmp_path):
    # The published files hold all languages, with a column "language".
    lines = ["language\tgold_label\tsentence1\tsentence2"]
    lines += [f"{code}\tneutral\t{code} {n}\t{n}" for code in ("ar", "en", "fr") for n in range(4)]
    lines.insert(3, "a line of one column")
    (tmp_path / "xnli.dev.tsv").write_text("\n".join(lines))
    for path in (tmp_path, tmp_path / "xnli.dev.tsv"):
        for language in ("fr", "ar,fr"):
            found, recipe = sources(path, "xnli", language=language, hold_out=0)
            rows = []
            for index in range(len(found.train)):
                # The broken line is kept, to be counted.
                with contextlib.suppress(BadRowError):
                    rows.append(recipe.example(found.train[index]).sentences[0])
            assert rows == [f"{code} {n}" for code in language.split(",") for n in range(4)]
        with pytest.raises(ValueError, match=r"language is 'sw'.*ar, en, fr"):
            sources(path, "xnli", language="sw")


def test_a_file_without_a_language_in_its_name_is_not_read_twice(xnli):
    with pytest.raises(ValueError, match=r"train-fr\.tsv|data\.language"):
        sources(xnli / "train-fr.tsv", "xnli", language="fr,sw")


@pytest.mark.parametrize("name", ["language", "source_language", "target_language"])
@pytest.mark.parametrize("value", ["fr,fr", "fr,", ""])
def test_language_settings_must_be_distinct_names(name, value):
    with pytest.raises(ValueError, match=rf"data\.{name} is '{value}'"):
        DataSettings(recipe="xnli", **{name: value})


CODES = ("eng_Latn", "fra_Latn", "swh_Latn")


def test_flores_joins_pairs_of_files(tmp_path):
    for code in CODES:
        rows = [f"{code} {number}" for number in range(40)]
        (tmp_path / f"{code}.dev").write_text("\n".join(rows))
        (tmp_path / f"{code}.devtest").write_text("\n".join(rows[:3]))
    found, recipe = sources(tmp_path, "flores", target_language="fra_Latn,swh_Latn")
    assert len(found.train) == 80
    assert len(found.held_out) == 6
    assert found.train_origin.name == f"{', '.join(f'{code}.dev' for code in CODES)} in {tmp_path}"
    assert prompts(found.train, recipe)[1] == "English: eng_Latn 1\nFrench:"
    last = recipe.example(found.train[79])
    assert (last.prompt, last.completion) == ("English: eng_Latn 39\nSwahili:", " swh_Latn 39")
    both, recipe = sources(
        tmp_path,
        "flores",
        source_language="eng_Latn,swh_Latn",
        target_language="eng_Latn,fra_Latn",
        hold_out=6,
    )
    heads = {
        tuple(line.split(":")[0] for line in p.split("\n")) for p in prompts(both.train, recipe)
    }
    assert heads == {("English", "French"), ("Swahili", "English"), ("Swahili", "French")}
    numbers = collections.Counter(
        prompt.split("\n")[0].split()[-1] for prompt in prompts(both.held_out, recipe)
    )
    assert set(numbers.values()) == {3}
    with pytest.raises(ValueError, match="are both 'fra_Latn'"):
        sources(tmp_path, "flores", source_language="fra_Latn")


def test_flores_reads_pairs_from_columns(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{f"sentence_{code}": f"{code} {n}" for code in CODES} for n in range(4)]
    rows[1]["sentence_swh_Latn"] = ""
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = DataSettings(
        recipe="flores",
        path=str(path),
        target_language="fra_Latn,swh_Latn",
        hold_out=0,
        on_bad_row="skip",
    )
    train, _ = build_data(settings, tokenizer, batch_size=2, max_length=200, seed=0)
    assert (train.totals.rows, train.totals.used) == (8, 7)
    assert train.bad_rows.describe(8).endswith("rows.jsonl:2: empty: field 'target' is empty")
    train.close()
