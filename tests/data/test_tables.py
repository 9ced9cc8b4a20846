"""Rows of files agree with the readers of the standard library and pandas."""

import csv
import gzip
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.data_files import Layout, find_splits, open_file, open_lines, split_of
from peft_jax.data.record_table import (
    find_csv_records,
    find_json_items,
    find_lines,
    find_paragraphs,
)
from peft_jax.data.settings import DataSettings
from peft_jax.data.tables import AlignedTable, JoinedTable, MemoryTable

ROWS = [
    {"question": "one, two", "answer": 'say "three"'},
    {"question": "naïve – 你好", "answer": "line\nbreak"},
    {"question": "tab\there", "answer": "x"},
]
LAYOUT = Layout(known=("question", "answer"), headerless=(("question", "answer"),))


def read(path: Path, **settings) -> list[dict]:
    table = open_file(path, DataSettings(recipe="gsm8k", **settings), LAYOUT)
    return [dict(table[index]) for index in range(len(table))]


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(rows: list[dict], **options) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["question", "answer"], **options)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv"])
def test_text_formats_give_the_same_rows(tmp_path, ending, line_end, mark, packed):
    if ending == "csv":
        text = csv_text(ROWS, lineterminator=line_end)
    else:
        text = jsonl(ROWS).replace("\n", line_end)
    raw = mark + text.encode()
    path = tmp_path / (f"a.{ending}.gz" if packed else f"a.{ending}")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read(path) == ROWS


def test_a_json_array_gives_the_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=2))
    assert read(path) == ROWS


@pytest.mark.parametrize("index", [False, True])
def test_parquet_and_csv_files_of_pandas_give_the_rows(tmp_path, index):
    frame = pd.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=index)
    assert read(tmp_path / "a.parquet") == ROWS
    assert [{k: row[k] for k in ROWS[0]} for row in read(tmp_path / "a.csv")] == ROWS


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_an_error_names_a_file_that_is_not_parquet_or_arrow(tmp_path, ending):
    damaged = tmp_path / f"a.{ending}"
    damaged.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=rf"a\.{ending} cannot be read as {ending}"):
        read(damaged)


def test_an_error_names_a_parquet_file_with_damaged_rows(tmp_path):
    # The footer is intact, so the file opens, but its first pages are damaged.
    damaged = tmp_path / "a.parquet"
    pd.DataFrame(ROWS).to_parquet(damaged)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        read(damaged)


def test_tsv_quotes_are_literal_unless_quoting_is_set(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('question\tanswer\n"Well," he said.\tyes\n"quoted"\tno\n')
    assert [row["question"] for row in read(path)] == ['"Well," he said.', '"quoted"']
    path.write_text('question\tanswer\n"a ""b"""\tyes\n')
    assert read(path, quoting=True) == [{"question": 'a "b"', "answer": "yes"}]


def test_the_header_is_detected(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("first\tsecond\nthird\tfourth\n")
    assert read(path) == [
        {"question": "first", "answer": "second"},
        {"question": "third", "answer": "fourth"},
    ]
    assert read(path, header=True) == [{"first": "third", "second": "fourth"}]
    assert read(path, column_names=("a", "b"))[0] == {"a": "first", "b": "second"}
    assert read(path, column_names=("a", "b"), header=True) == [{"a": "third", "b": "fourth"}]
    path.write_text("a\tb\tc\n")
    with pytest.raises(ValueError, match=r"a\.tsv .*data\.column_names"):
        read(path, header=False)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"question": 1', "broken JSON", "column 15"),
        ("[1, 2]", "wrong type", "list"),
        ('{"question": "caf\xe9"}', "not UTF-8", "0xe9"),
    ],
)
def test_a_bad_line_raises_and_the_others_are_read(tmp_path, line, reason, detail):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0]) + "\n"
    path.write_bytes((good + "\n" + line + "\n" + good).encode("latin-1"))
    table = open_file(path, DataSettings(recipe="gsm8k"), LAYOUT)
    assert len(table) == 3
    assert table.where(1) == f"{path}:3"
    with pytest.raises(BadRowError, match=detail) as caught:
        table[1]
    assert caught.value.reason == reason
    assert table[0] == table[2] == ROWS[0]


def test_csv_line_numbers_count_line_ends_within_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a\nb",c\nd\n"e,f\n')
    table = open_file(path, DataSettings(recipe="gsm8k"), LAYOUT)
    assert [table.where(index) for index in range(3)] == [f"{path}:{n}" for n in (2, 4, 5)]
    assert table[0] == {"question": "a\nb", "answer": "c"}
    with pytest.raises(BadRowError, match="wrong number of columns: has 1"):
        table[1]
    with pytest.raises(BadRowError, match="broken CSV: unexpected end of data"):
        table[2]


@pytest.mark.parametrize("field", [b"x\r\x00y", b"a\rb", b'"c" d'])
def test_a_record_that_the_csv_module_rejects_is_a_bad_row(tmp_path, field):
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\r\na,b\r\n" + field + b",c\r\nd,e\r\n")
    table = open_file(path, DataSettings(recipe="gsm8k"), LAYOUT)
    assert [table.where(index) for index in range(3)] == [f"{path}:{n}" for n in (2, 3, 4)]
    with pytest.raises(BadRowError, match="broken CSV"):
        table[1]
    assert (table[0], table[2]) == (
        {"question": "a", "answer": "b"},
        {"question": "d", "answer": "e"},
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"question": 1},\n {]', r"a\.json:2: broken JSON"),
        ("a.json", b"3", r"a\.json: broken JSON: it begins with '3'"),
        ("a.json", b'[{"a": 1},\n {"b": "]}', r"a\.json:2: broken JSON: a string"),
        ("a.json", b'[{"a": 1}]\n, 2', r"a\.json:2: broken JSON"),
        ("a.csv", b'"question\n1,2\n', r"a\.csv:1: .*broken CSV"),
        (
            "a.csv",
            b"question,answer\r\x001,2\r\n",
            r"a\.csv:1: .*broken CSV: .*carriage return",
        ),
        (
            "a.csv",
            b"question,answer\r1,2\r3,4\r",
            r"a\.csv:1: .* line feed",
        ),
        ("a.jsonl.gz", b"\x1f\x8b not gzip", "is damaged"),
        ("a.jsonll", b"", r"a\.jsonll .*did you mean '\.jsonl'"),
    ],
)
def test_an_unreadable_file_raises(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.txt.gz"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert read(tmp_path / name) == []


JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('[]{},:" \\\n\té')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_json_items_agree_with_the_json_module(items, indent, ascii_only):
    data = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode()
    records = find_json_items(data, "a.json")
    found = [json.loads(data[a:b]) for a, b in zip(records.starts, records.stops, strict=True)]
    assert found == items
    lines = [data[:start].count(b"\n") + 1 for start in records.starts]
    assert records.lines.tolist() == lines


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n")), max_size=8))
def test_lines_agree_with_split(lines):
    data = "\n".join(lines).encode()
    records = find_lines(data, keep_blank=True)
    found = [data[a:b].decode() for a, b in zip(records.starts, records.stops, strict=True)]
    expected = data.removeprefix(b"\xef\xbb\xbf").decode().split("\n") if data else []
    if expected and expected[-1] == "":
        expected.pop()  # Nothing follows the last line end.
    assert found == expected


@given(
    st.lists(
        st.lists(st.text(st.sampled_from('ab,"\n é\t'), max_size=6), min_size=2, max_size=2),
        max_size=6,
    )
)
def test_csv_records_agree_with_the_csv_module(rows):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(rows)
    data = stream.getvalue().encode()
    records = find_csv_records(data, ",")
    found = [
        next(csv.reader(io.StringIO(data[a:b].decode(), newline="")))
        for a, b in zip(records.starts, records.stops, strict=True)
    ]
    assert found == rows
    for start, line in zip(records.starts, records.lines, strict=True):
        assert line == data[:start].count(b"\n") + 1


def test_text_unit_decides_the_rows_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \nthree\n")
    units = {
        "line": ["one", "two", "three"],
        "paragraph": ["one\ntwo", "three"],
        "file": ["one\ntwo\n\n \nthree\n"],
    }
    for unit, expected in units.items():
        assert [row["text"] for row in read(path, text_unit=unit)] == expected
    assert find_paragraphs(path.read_bytes()).lines.tolist() == [1, 5]


def test_splits_of_a_folder_are_found_by_file_names(tmp_path):
    for name in (
        "train-00001-of-00002.jsonl",
        "train-00000-of-00002.jsonl",
        "dev_matched.jsonl",
        "dev_mismatched.jsonl",
        "test/part.jsonl",
        "README.md",
        ".cache/train.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(jsonl(ROWS))
    names = {split: [p.name for p in paths] for split, paths in find_splits(tmp_path).items()}
    assert names == {
        "train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        "validation_matched": ["dev_matched.jsonl"],
        "validation_mismatched": ["dev_mismatched.jsonl"],
        "test": ["part.jsonl"],
    }
    (tmp_path / "train.csv").write_text(csv_text(ROWS))
    with pytest.raises(ValueError, match="several formats for train"):
        find_splits(tmp_path)


def test_files_without_a_split_are_training_rows_if_no_file_has_one(tmp_path):
    (tmp_path / "stories.txt").write_text("a\n")
    assert list(find_splits(tmp_path)) == ["train"]
    (tmp_path / "valid.txt").write_text("b\n")
    assert list(find_splits(tmp_path)) == ["validation"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("gsm8k_train", "train"),
        ("dev-de.tsv", "validation"),
        ("val.csv", "validation"),
        ("devtest", "test"),
        ("training_set.json", "train"),
        ("constrain.json", ""),
    ],
)
def test_split_of_recognizes_the_words_for_splits(name, split):
    assert split_of(name) == split


def test_tables_can_be_joined_and_aligned(tmp_path):
    one = MemoryTable([{"text": "a"}, {"text": "b"}], "one")
    two = MemoryTable([{"text": "c"}], "two")
    joined = JoinedTable([one, two, one])
    assert [joined[index]["text"] for index in range(len(joined))] == list("abcab")
    assert [joined.where(index) for index in (1, 2, 3)] == [
        "one, row 2",
        "two, row 1",
        "one, row 1",
    ]
    (tmp_path / "x").write_text("eins\n\ndrei\n")
    (tmp_path / "y").write_text("one\ntwo\nthree")
    pairs = AlignedTable({"de": open_lines(tmp_path / "x"), "en": open_lines(tmp_path / "y")})
    assert [pairs[index] for index in range(3)] == [
        {"de": "eins", "en": "one"},
        {"de": "", "en": "two"},
        {"de": "drei", "en": "three"},
    ]
    with pytest.raises(ValueError, match="one has 2, two has 1 rows"):
        AlignedTable({"a": one, "b": two})
    strangers = MemoryTable([{"text": "a", "id": 1}], "one"), MemoryTable([{"text": "b"}], "two")
    with pytest.raises(BadRowError, match="not aligned"):
        AlignedTable(dict(zip("ab", strangers, strict=True)))[0]
