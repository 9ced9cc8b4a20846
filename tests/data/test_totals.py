"""Totals count all rows, name their source, and warn of lost rows."""

import itertools
import json
import re

import pytest

from peft_jax.data import DataSettings, build_data


def write(path, number: int, long: int = 0, first: int = 0):
    """Writes rows of about ten tokens, of which the last `long` have about a hundred."""
    rows = [
        {"instruction": f"{first + index}?", "output": "x" * (100 if index >= number - long else 5)}
        for index in range(number)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def build(path, tokenizer, *, seed=0, **changes):
    settings = {"recipe": "alpaca", "prompt_template": "{instruction}", "prefetch": 0, **changes}
    return build_data(
        DataSettings(path=str(path), **settings), tokenizer, batch_size=2, max_length=24, seed=seed
    )


def test_totals_account_for_every_row(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", 100, long=4)
    path.write_text(path.read_text() + "\n{\n" + json.dumps({"instruction": "?", "output": ""}))
    train, held_out = build(path, tokenizer, hold_out=10, train_rows=80, on_bad_row="skip")
    totals = train.totals
    assert totals.to_mapping() | {"left_out": None} == {
        "source": str(path),
        "split": None,
        "rows_in_source": 102,
        "held_out": 10,
        "set_aside": 12,
        "rows": 80,
        "checked": 80,
        "used": 80 - sum(totals.left_out.values()),
        "left_out": None,
        "truncated": 0,
    }
    assert set(totals.left_out) <= {"too long", "broken JSON", "empty"}
    text = totals.describe()
    assert text.startswith(
        f"training rows: 80 of the 102 in {path} (10 held out, 12 set aside); {totals.used} used, "
    )
    assert held_out.totals.rows == 10
    assert held_out.totals.origin.name == str(path)
    assert totals.used + sum(totals.left_out.values()) == 80


def test_truncated_rows_are_counted(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", 50, long=3)
    train, _ = build(path, tokenizer, hold_out=0, too_long="truncate")
    assert (train.totals.used, train.totals.truncated) == (50, 3)
    assert train.totals.describe().endswith("50 used, 3 truncated")
    assert not train.warnings


@pytest.mark.parametrize(("too_long", "lost"), [("skip", "too long"), ("truncate", "truncated")])
def test_losing_more_than_a_tenth_of_rows_warns_with_a_suggestion(
    tmp_path, tokenizer, too_long, lost
):
    path = write(tmp_path / "rows.jsonl", 50, long=6)
    train, _ = build(path, tokenizer, hold_out=0, too_long=too_long)
    [warning] = train.warnings
    assert warning.startswith(f"training rows: 6 of 50 (12%) are lost: 6 {lost}; ")
    # Following the suggestion helps.
    fitting = int(re.search(r"train\.max_length is 24; (\d+)", warning)[1])
    settings = DataSettings(recipe="alpaca", path=str(path), prompt_template="{instruction}")
    again, _ = build_data(settings, tokenizer, batch_size=2, max_length=fitting, seed=0)
    assert not again.warnings
    assert again.totals.used == again.totals.rows
    assert not build(write(path, 50, long=5), tokenizer, hold_out=0)[0].warnings


def test_losing_bad_rows_warns(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", 10)
    path.write_text(path.read_text() + "\n{" * 3)
    train, _ = build(path, tokenizer, hold_out=0, on_bad_row="skip")
    [warning] = train.warnings
    assert "3 of 13 (23%) are lost: 3 broken JSON; " in warning


def test_checked_rows_are_spread_over_the_data_and_reported(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", 300, long=150)
    train, _ = build(path, tokenizer, hold_out=0, check_rows=20)
    assert train.totals.checked == 20
    assert train.totals.left_out == {"too long": 10}
    assert f"300 in {path}; of 20 checked, 10 used, 10 left out" in train.totals.describe()
    assert "10 of 20 (50%) are lost" in train.warnings[0]
    none, _ = build(path, tokenizer, hold_out=0, check_rows=0)
    assert none.totals.describe().endswith("none was checked")


def test_rows_reached_by_training_are_added(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", 20, long=5)
    train, _ = build(path, tokenizer, hold_out=0, check_rows=4, packing=False)
    for _ in range(20):
        next(train)
    assert (train.totals.checked, train.totals.used) == (20, 15)


def test_a_long_check_reports_its_duration(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", 40)
    settings = DataSettings(recipe="alpaca", path=str(path), hold_out=0, check_rows=3)
    messages = []
    options = {"batch_size": 2, "max_length": 200, "seed": 0, "say": messages.append}
    build_data(settings, tokenizer, **options)
    assert not messages
    clock = itertools.count()
    monkeypatch.setattr("peft_jax.data.train_data.time.monotonic", lambda: float(next(clock)))
    build_data(settings, tokenizer, **options)
    # Thirty rows are read, at one second each.
    [message] = messages
    assert message.startswith("encoding 3 of 40 training rows before the first step takes about 3")
    assert "data.check_rows" in message


def test_bad_rows_that_are_only_read_do_not_change_the_shares(tmp_path, tokenizer):
    # Ten times as many rows are read as encoded, so more bad rows are found than checked.
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": "?", "output": "y"}) for _ in range(200)]
    for index in range(1, 200, 10):
        lines[index] = "{"
    path.write_text("\n".join(lines))
    train, _ = build(path, tokenizer, hold_out=0, check_rows=20, on_bad_row="skip")
    assert train.bad_rows.counts == {"broken JSON": 20}
    assert train.totals.checked == 20
    assert sum(train.totals.left_out.values()) <= 4


def test_files_and_splits_are_named(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", 10)
    write(tmp_path / "dev.jsonl", 4)
    train, held_out = build(tmp_path, tokenizer)
    assert str(train.totals.origin) == f"{tmp_path / 'train.jsonl'} (split train)"
    assert str(held_out.totals.origin) == f"{tmp_path / 'dev.jsonl'} (split validation)"
    assert not train.warnings
    train, held_out = build(tmp_path, tokenizer, train_split="dev")
    assert str(train.totals.origin) == f"{tmp_path / 'dev.jsonl'} (split validation)"
    assert not train.warnings


def test_training_on_a_validation_split_warns(tmp_path, tokenizer):
    # Some published sets, such as FLORES, have no training rows.
    for code in ("eng_Latn", "fra_Latn"):
        (tmp_path / f"{code}.dev").write_text("one\ntwo\nthree")
        (tmp_path / f"{code}.devtest").write_text("four\nfive")
    train, _ = build(tmp_path, tokenizer, recipe="flores", prompt_template="{source}")
    [warning] = train.warnings
    assert warning.startswith("there is no split named train")
    assert "(split validation)" in warning
    chosen, _ = build(
        tmp_path, tokenizer, recipe="flores", prompt_template="{source}", train_split="dev"
    )
    assert not chosen.warnings


def test_train_rows_by_seed_chooses_rows_by_the_seed(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", 200)

    def rows(seed, **changes):
        train, held_out = build(
            path, tokenizer, seed=seed, hold_out=20, train_rows=50, packing=False, **changes
        )
        found = set()
        for batch in (next(train) for _ in range(25)):
            found |= {
                tokenizer.decode(tokens).removeprefix("<s>").split("?")[0]
                for tokens in batch.tokens
            }
        return found, {example.prompt for example in held_out.examples}

    same = [rows(seed) for seed in (0, 1)]
    assert same[0] == same[1]
    other = [rows(seed, train_rows_by_seed=True) for seed in (0, 1, 2, 1)]
    trained = [train for train, _ in other]
    assert trained[1] == trained[3]
    assert all(len(train) == 50 for train in trained)
    # Two draws share about 50 · 50 / 180 rows.
    assert all(len(trained[one] & trained[two]) < 30 for one, two in ((0, 1), (0, 2), (1, 2)))
    assert all(held == same[0][1] for _, held in other)
    with pytest.raises(ValueError, match=r"data\.train_rows is None"):
        DataSettings(recipe="gsm8k", train_rows_by_seed=True)
