"""Bad rows of every kind are named, found before the first step, counted and skipped."""

import csv
import gzip
import itertools
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from peft_jax.data import DataSettings, build_data
from peft_jax.data.bad_rows import BadRowError, as_bad_row

GOOD = {"text": "a good row"}
BAD = "@@"
"""Placeholder in the files for the bad bytes."""


def write(folder, ending: str, bad: bytes, good: dict, number: int = 3):
    """Writes a file whose second row has `bad` in place of the JSON string of a value."""
    field = next(iter(good))
    rows = [{**good, field: BAD} if index == 1 else good for index in range(number)]
    path = folder / f"rows.{ending}"
    quoted = json.dumps(BAD).encode()
    if ending.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode().replace(quoted, bad)
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    elif ending == "json":
        path.write_bytes(json.dumps(rows, indent=1).encode().replace(quoted, bad))
    elif ending in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(good), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        path.write_bytes(path.read_bytes().replace(BAD.encode(), bad))
    else:
        path.write_bytes(
            b"".join((bad if row[field] == BAD else b"a good row") + b"\n" for row in rows)
        )
    return path


def build(path, tokenizer, **changes):
    settings = {"recipe": "text", "hold_out": 0, "prefetch": 0, **changes}
    return build_data(
        DataSettings(path=str(path), **settings), tokenizer, batch_size=1, max_length=200, seed=0
    )


def check(path, tokenizer, where: str, reason: str, **changes) -> None:
    """Checks that one bad row of three raises before the first step, or is skipped and counted."""
    with pytest.raises(ValueError, match="training rows: 1 of 3 cannot be used") as caught:
        build(path, tokenizer, **changes)
    assert f"{path}{where}: {reason}" in str(caught.value)
    assert len(str(caught.value)) < 1000
    train, _ = build(path, tokenizer, on_bad_row="skip", **changes)
    assert (train.totals.used, sum(train.totals.left_out.values())) == (2, 1)
    for _ in range(4):
        next(train)
    # Without a check, the stream finds it.
    late, _ = build(path, tokenizer, check_rows=0, **changes)
    with pytest.raises(ValueError, match="training rows: ") as caught:
        list(itertools.islice(late, 4))
    assert f"{path}{where}: {reason}" in str(caught.value)


DEEP = b"[" * 100_000 + b"]" * 100_000
KINDS = {
    "surrogate": (rb'"a \ud800 b"', "not Unicode: character 3 is the lone surrogate U+D800"),
    "digits": (b"7" * 5000, "broken JSON: Exceeds the limit"),
    "nesting": (DEEP, "nested too deeply"),
    "null": (b"null", "wrong type: field 'text' is a NoneType"),
    "nested null": (b"[null]", "wrong type: field 'text' is a list"),
    "bytes": (b'"\xff"', "not UTF-8"),
    "broken": (b"nope", "broken JSON"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json"])
def test_bad_values_in_json_are_bad_rows(tmp_path, tokenizer, ending, kind):
    bad, reason = KINDS[kind]
    path = write(tmp_path, ending, bad, GOOD)
    check(path, tokenizer, ":5" if ending == "json" else ":2", reason)


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt"])
def test_bytes_that_are_not_utf_8_are_a_bad_row(tmp_path, tokenizer, ending):
    path = write(tmp_path, ending, b"\xff\xfe", GOOD)
    check(path, tokenizer, ":2" if ending == "txt" else ":3", "not UTF-8")


def test_a_label_of_five_thousand_digits_is_a_bad_row(tmp_path, tokenizer):
    path = write(tmp_path, "csv", b"7" * 5000, {"label": "1", "sentence": "good"})
    check(path, tokenizer, ":3", "ValueError: Exceeds the limit", recipe="sst2")


def test_an_unclosed_quotation_mark_raises_with_its_number_of_lines(tmp_path, tokenizer):
    path = write(tmp_path, "csv", b'"open', GOOD, number=50)
    train, _ = build(path, tokenizer, on_bad_row="skip")
    [shown] = train.bad_rows.describe(2).splitlines()[1:]
    assert f"{path}:3: broken CSV" in shown
    assert "the record has 49 lines" in shown


@pytest.mark.parametrize("ending", ["parquet", "arrow", "saved"])
@pytest.mark.parametrize("kind", ["bytes", "null"])
def test_bad_values_in_arrow_files_are_bad_rows(tmp_path, tokenizer, ending, kind):
    values = [b"a good row", b"\xff\xfe" if kind == "bytes" else None, b"a good row"]
    array = pa.array(values, pa.binary())
    # Arrow does not validate the bytes of text.
    text = pa.Array.from_buffers(pa.string(), 3, array.buffers())
    table = pa.table({"text": text})
    path, where = tmp_path / f"rows.{ending}", ", row 2"
    if ending == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif ending == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(path)
        where = " train, row 2"
    reason = "not Unicode" if kind == "bytes" else "wrong type: field 'text' is a NoneType"
    check(path, tokenizer, where, reason)


TEMPLATES = {
    "chat template: TypeError": "{{ messages[0]['content'] + 1 }}",
    "chat template: ZeroDivisionError": "{{ 1 / 0 }}",
    "chat template: refused": "{{ raise_exception('refused') }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_any_error_of_a_template_is_a_bad_row(tmp_path, tokenizer, kind):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if '@@' in m.content %}"
        + TEMPLATES[kind]
        + "{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for recipe, good in (
        ("chat", {"prompt": "Who ran?", "completion": "Ivy ran."}),
        ("alpaca", {"instruction": "Who ran?", "output": "Ivy ran."}),
    ):
        path = write(tmp_path, "jsonl", b'"@@"', good)
        options = {"recipe": recipe, "chat": True, "chat_template": str(template)}
        check(path, tokenizer, ":2", kind, **options)


@pytest.mark.parametrize("turn", ["null", "[null]", '{"role": null}', '{"role": "user"}', "3"])
def test_nulls_in_conversations_are_bad_rows(tmp_path, tokenizer, turn):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    good = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ivy ran."}]
    path = write(tmp_path, "jsonl", f"[{turn}]".encode(), {"messages": good})
    check(path, tokenizer, ":2", "", recipe="chat", chat_template=str(template))


def test_held_out_rows_are_checked_too(tmp_path, tokenizer):
    path = write(tmp_path, "jsonl", rb'"\ud800"', GOOD)
    path.rename(tmp_path / "dev.jsonl")
    write(tmp_path, "jsonl", b'"fine"', GOOD).rename(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"held-out rows: 1 of 3 .*\n.*dev\.jsonl:2: not Unicode"):
        build(tmp_path, tokenizer, hold_out=None)
    _, held_out = build(tmp_path, tokenizer, hold_out=None, on_bad_row="skip")
    assert (held_out.totals.used, held_out.totals.left_out) == (2, {"not Unicode": 1})


NO_BIRDS = (
    "{% for m in messages %}{% if 'bird' in m.content %}{{ m.nothing.at_all }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROW, BIRD = (
    json.dumps({"prompt": prompt, "completion": "A wren."}) + "\n"
    for prompt in ("Name it.", "Name a bird.")
)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("files", "changes", "advised"),
    [
        ({"rows": BIRD * 3}, {"hold_out": 0}, ""),
        ({"rows": BIRD * 3}, {"hold_out": 1}, "set data.hold_out=0."),
        ({"train": ROW * 3, "dev": BIRD * 3}, {}, "set data.hold_out=0.05."),
        (
            {"train": ROW * 3, "dev": BIRD * 3},
            {"eval_split": "validation"},
            "data.hold_out=0.05 and leave data.eval_split empty.",
        ),
    ],
)
def test_advice_omits_settings_that_cannot_help(
    tmp_path, tokenizer, on_bad_row, files, changes, advised
):
    template = tmp_path / "chat.jinja"
    template.write_text(NO_BIRDS)
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text(rows)
    settings = {"recipe": "chat", "chat_template": str(template), "on_bad_row": on_bad_row}
    with pytest.raises(ValueError, match=r"(\d) of \1 cannot be used") as caught:
        build(tmp_path, tokenizer, **{**settings, "hold_out": None, **changes})
    advice = str(caught.value).splitlines()[-1]
    assert advice.startswith("No row is left. The chat template rejects all rows: ")
    assert "on_bad_row" not in advice
    assert advice.endswith(advised)
    assert ("data.hold_out" in advice) is bool(advised)
    if "train" in files:
        train, held_out = build(tmp_path, tokenizer, **{**settings, "hold_out": 0.34})
        assert (train.totals.used, held_out.totals.used) == (2, 1)


def test_advice_fits_the_faults(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    long = json.dumps({"text": "word " * 100}) + "\n"
    for rows, on_bad_row, advised in (
        (long, "skip", (False, True)),
        ("[]\n", "error", (True, False)),
        (long + "[]\n", "error", (True, True)),
    ):
        path.write_text(json.dumps(GOOD) + "\n" + rows)
        with pytest.raises(ValueError, match="cannot be used") as caught:
            build(path, tokenizer, on_bad_row=on_bad_row, too_long="error")
        advice = str(caught.value).splitlines()[-1]
        assert ("data.on_bad_row=skip" in advice, "data.too_long to skip" in advice) == advised


def test_rows_for_encoders_are_checked_too(tmp_path, tokenizer):
    path = write(tmp_path, "jsonl", rb'"\ud800"', {"sentence": "good", "label": 1})
    settings = DataSettings(recipe="sst2", path=str(path), hold_out=0, on_bad_row="skip")
    train, _ = build_data(settings, tokenizer, batch_size=1, max_length=20, seed=0, labeled=True)
    assert train.bad_rows.counts == {"not Unicode": 1}
    train.close()


def test_errors_that_are_not_the_row_s_fault_pass_unchanged():
    with pytest.raises(OSError, match="disk"), as_bad_row():
        raise OSError("disk")
    with pytest.raises(KeyboardInterrupt), as_bad_row():
        raise KeyboardInterrupt

    def endless(depth: int) -> int:
        return endless(depth + 1)

    with pytest.raises(BadRowError, match="nested too deeply"), as_bad_row():
        endless(0)


def test_messages_are_short_and_printable(tmp_path, tokenizer):
    path = write(tmp_path, "csv", b"\x1b[2J" + b"x" * 10_000, {"label": "1", "sentence": "good"})
    with pytest.raises(ValueError, match="cannot be used") as caught:
        build(path, tokenizer, recipe="sst2")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000
