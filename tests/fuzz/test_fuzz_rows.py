"""Fuzzes rows of data, for each recipe in each format."""

import csv
import io
import json

import pytest
from fuzzing import COUNTS, JUNK, fuzz, outcome
from hypothesis import strategies as st

from peft_jax.data import DataSettings, build_data

ROWS = {
    "alpaca": {"instruction": "Name a bird.", "input": "", "output": "A wren."},
    "gsm8k": {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"},
    "chat": {
        "messages": [
            {"role": "user", "content": "Name a bird."},
            {"role": "assistant", "content": "A wren."},
        ]
    },
    "text": {"text": "A wren sang."},
    "sst2": {"sentence": "a fine film", "label": 1},
    "rte": {"sentence1": "A wren sang.", "sentence2": "A bird sang.", "label": "entailment"},
}

MESSAGE = st.one_of(
    JUNK,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", ""]) | JUNK},
        optional={"content": st.text(max_size=9) | JUNK, "tool_calls": JUNK, "weight": JUNK},
    ),
)
SURROGATE = st.sampled_from(["\ud800", "a\udfffb"])
FIELDS = st.one_of(JUNK, SURROGATE, st.lists(MESSAGE, max_size=4))


def encoded(rows, kind):
    """Encodes rows as a file; values that the format lacks become text."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows).encode()
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    stream = io.StringIO()
    delimiter = "\t" if kind == "tsv" else ","
    writer = csv.DictWriter(stream, names, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        if isinstance(row, dict):
            writer.writerow({k: str(v) for k, v in row.items()})
    return stream.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def cases(draw):
    recipe = draw(st.sampled_from(sorted(ROWS)))
    good = ROWS[recipe]
    bad = draw(
        st.one_of(
            st.sampled_from(sorted(good)).flatmap(
                lambda name: FIELDS.map(lambda value: {**good, name: value})
            ),
            st.sampled_from(sorted(good)).map(
                lambda name: {k: v for k, v in good.items() if k != name}
            ),
            JUNK,
            st.dictionaries(st.text(min_size=1, max_size=5), FIELDS, max_size=2),
        )
    )
    kinds = ["jsonl", "json"] if recipe == "chat" else ["jsonl", "json", "csv", "tsv"]
    return recipe, draw(st.sampled_from(kinds)), bad, draw(st.integers(0, 4))


def load(path, recipe, tokenizer, on_bad_row, seen):
    settings = DataSettings(
        recipe=recipe, path=str(path), on_bad_row=on_bad_row, hold_out=0, packing=False
    )
    train, _ = build_data(settings, tokenizer, batch_size=2, max_length=64, seed=0)
    try:
        next(train)
        seen.append(train.totals)
        return train.totals
    finally:
        train.close()


READ = {
    "alpaca": ("instruction", "input", "output"),
    "gsm8k": ("question",),
    "text": ("text",),
    "sst2": ("sentence",),
    "rte": ("sentence1", "sentence2"),
}
"""Columns of each recipe whose text appears unchanged in an example."""


def read_directly(path):
    """Reads rows with Python's own modules; lines that are not rows give None."""
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    if path.suffix == ".json":
        return json.loads(text)
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    if path.suffix == ".csv":
        records = [record for record in csv.reader(io.StringIO(text, newline="")) if record]
    else:
        records = [line.rstrip("\r").split("\t") for line in lines]
    names = [name.strip() for name in records[0]]
    return [
        dict(zip(names, record, strict=True)) if len(record) == len(names) else None
        for record in records[1:]
    ]


def check_accepted(path, recipe, tokenizer, rows):
    """Checks that the examples of an accepted file contain the text of its rows."""
    good = path.parent / "good.jsonl"
    good.write_text(json.dumps(ROWS[recipe]))
    settings = DataSettings(recipe=recipe, path=str(good), eval_path=str(path), packing=False)
    train, held_out = build_data(settings, tokenizer, batch_size=2, max_length=64, seed=0)
    train.close()
    if len(held_out.examples) < len(rows):
        # Rows that are too long are skipped and counted.
        assert set(held_out.totals.left_out) == {"too long"}
        return
    for row, example in zip(rows, held_out.examples, strict=True):
        text = "".join(piece.text for piece in example.pieces)
        if recipe == "chat":
            values = [message.get("content") for message in row["messages"]]
        else:
            values = [row.get(name) for name in READ[recipe]]
        for value in values:
            assert value is None or isinstance(value, str), f"{value!r} of {row} is accepted"
            assert value is None or value.strip() in text, f"{value!r} of {row} is lost"
        if recipe == "sst2":
            assert str(row["label"]) == str(example.label), f"{row} is read as {example.label}"


@pytest.mark.parametrize("count", COUNTS)
def test_a_bad_row_is_named_and_can_be_skipped(tokenizer, tmp_path, count):
    def check(case):
        recipe, kind, bad, at = case
        rows = [dict(ROWS[recipe]) for _ in range(4)]
        rows.insert(at, bad)
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(encoded(rows, kind))
        seen = []
        _, strict = outcome(lambda: load(path, recipe, tokenizer, "error", seen), names=("rows.",))
        totals, message = outcome(
            lambda: load(path, recipe, tokenizer, "skip", seen), names=("rows.",)
        )
        if message:
            return
        found = read_directly(path)
        lost = sum(totals.left_out.values())
        assert totals.rows == totals.checked == totals.used + lost == len(found), case
        if strict:
            assert lost, f"{strict!r} is skipped but not counted"
        else:
            check_accepted(path, recipe, tokenizer, found)

    fuzz(check, cases(), count=count)


@pytest.mark.parametrize("count", COUNTS)
def test_a_malformed_file_is_rejected_by_name(tokenizer, tmp_path, count):
    good = {kind: encoded([ROWS["alpaca"]] * 3, kind) for kind in ("jsonl", "json", "csv", "tsv")}

    def check(case):
        kind, content = case
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(content)
        outcome(lambda: load(path, "alpaca", tokenizer, "error", []), names=("rows.",))

    def broken(kind):
        whole = good.get(kind, b"PAR1" + bytes(20))
        return st.one_of(
            st.binary(max_size=60),
            st.integers(0, len(whole) - 1).map(lambda at: whole[:at]),
            st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)).map(
                lambda pair: whole[: pair[0]] + bytes([pair[1]]) + whole[pair[0] + 1 :]
            ),
        ).map(lambda content: (kind, content))

    kinds = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "json.gz")
    fuzz(check, st.one_of(*map(broken, kinds)), count=count)
