"""The stream is complete, shuffled, resumable and disjoint from held-out rows; bad rows."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_jax.data import Batch, DataSettings, build_data

FIELDS = ("tokens", "targets", "loss_mask", "positions", "segment_ids")


def write_rows(folder: Path, number: int, name: str = "train.jsonl") -> Path:
    """Writes numbered rows of different lengths."""
    path = folder / name
    rows = [{"text": f"{index}:" + "x" * (index * 7 % 23)} for index in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(path: Path, tokenizer: Any, *, batch_size=2, max_length=48, seed=0, **kw):
    kw = {"recipe": "text", "hold_out": 0, "prefetch": 0, **kw}
    return build_data(
        DataSettings(path=str(path), **kw),
        tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )


def segments(batch: Batch, tokenizer: Any) -> list[str]:
    """Returns the text of each segment of a batch, including its last target."""
    found = []
    for row in range(batch.tokens.shape[0]):
        for number in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == number
            ids = [*batch.tokens[row][here], batch.targets[row][here][-1]]
            found.append(tokenizer.decode(ids))
    return found


def row_numbers(batches, tokenizer: Any) -> list[int]:
    texts = (text for batch in batches for text in segments(batch, tokenizer))
    return [int(text.removeprefix("<s>").split(":")[0]) for text in texts]


def assert_same(one: Batch, other: Batch) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("packing", [False, True])
def test_batches_have_the_documented_shapes_and_dtypes(tmp_path, tokenizer, packing):
    train, _ = build(write_rows(tmp_path, 20), tokenizer, batch_size=4, packing=packing)
    for batch in itertools.islice(train, 5):
        for field in FIELDS:
            array = getattr(batch, field)
            assert array.shape == (4, 48)
            assert array.dtype == (np.float32 if field == "loss_mask" else np.int32)
        follows = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        follows &= batch.segment_ids[:, 1:] > 0
        np.testing.assert_array_equal(batch.tokens[:, 1:][follows], batch.targets[:, :-1][follows])
        np.testing.assert_array_equal(batch.loss_mask, batch.segment_ids > 0)


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_contains_every_row_once_in_a_new_order(tmp_path, tokenizer, packing):
    # With batches of one row and windows of an epoch, rows are ordered by epoch.
    train, _ = build(write_rows(tmp_path, 17), tokenizer, batch_size=1, packing=packing)
    seen: list[int] = []
    while len(seen) < 3 * 17:
        seen += row_numbers([next(train)], tokenizer)
    epochs = [seen[start : start + 17] for start in (0, 17, 34)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffling_rows_are_in_order(tmp_path, tokenizer):
    train, _ = build(write_rows(tmp_path, 9), tokenizer, batch_size=3, packing=False, shuffle=False)
    found = row_numbers(itertools.islice(train, 6), tokenizer)
    assert found == [*range(9), *range(9)]


def test_the_seed_determines_the_order(tmp_path, tokenizer):
    path = write_rows(tmp_path, 30)
    first = [next(build(path, tokenizer, seed=seed)[0]) for seed in (3, 3, 4)]
    assert_same(first[0], first[1])
    assert (first[0].tokens != first[2].tokens).any()


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 29)


@pytest.mark.fast("True-2", "False-0")
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
@given(done=st.integers(0, 20), extra=st.integers(0, 3), window=st.sampled_from([1, 7, 1024]))
@settings(max_examples=8, deadline=None)
def test_a_stream_resumes_from_its_state_bit_for_bit(
    rows_path, tokenizer, packing, prefetch, done, extra, window
):
    options = {"packing": packing, "prefetch": prefetch, "packing_window": window}
    straight, _ = build(rows_path, tokenizer, **options)
    for _ in range(done):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    resumed, _ = build(rows_path, tokenizer, **options)
    for _ in range(extra):  # A state may be set on a started stream.
        next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for _ in range(4):
        assert_same(next(straight), next(resumed))
        assert straight.get_state() == resumed.get_state()
    straight.close()
    resumed.close()


def test_split_texts_can_be_resumed_in_their_middle(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n".join("abcdefghij" * number for number in range(1, 9)))
    straight, _ = build(path, tokenizer, batch_size=1, max_length=16, packing=False)
    batches = [next(straight) for _ in range(40)]
    for start in range(0, 30, 4):
        other, _ = build(path, tokenizer, batch_size=1, max_length=16, packing=False)
        for _ in range(start):
            next(other)
        resumed, _ = build(path, tokenizer, batch_size=1, max_length=16, packing=False)
        resumed.set_state(other.get_state())
        assert_same(batches[start], next(resumed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 4}, "batch_size was 2 and is 4"),
        ({"max_length": 40}, "max_length was 48 and is 40"),
        ({"packing": False}, "packing was True and is False"),
        ({"train_rows": 5}, "rows was 29 and is 5"),
    ],
)
def test_a_state_of_other_data_is_rejected(rows_path, tokenizer, changes, message):
    state = build(rows_path, tokenizer)[0].get_state()
    with pytest.raises(ValueError, match=message):
        build(rows_path, tokenizer, **changes)[0].set_state(state)


def test_padding_share_agrees_with_the_batches(rows_path, tokenizer):
    train, held_out = build(rows_path, tokenizer, batch_size=2, eval_path="", hold_out=9)
    batches = [next(train) for _ in range(5)]
    empty = np.mean([batch.segment_ids == 0 for batch in batches])
    assert train.padding_share == pytest.approx(empty)
    empty = np.mean([batch.segment_ids == 0 for batch in held_out])
    assert held_out.padding_share == pytest.approx(empty)
    plain, _ = build(rows_path, tokenizer, packing=False)
    for _ in range(5):
        next(plain)
    assert plain.padding_share > 2 * train.padding_share


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("hold_out", [1, 7, 0.3, None])
def test_held_out_rows_are_never_trained_on(rows_path, tokenizer, hold_out, packing):
    numbers = []
    for batch_size in (1, 2, 5):
        train, held_out = build(
            rows_path,
            tokenizer,
            batch_size=batch_size,
            hold_out=hold_out,
            packing=packing,
            seed=batch_size,
        )
        taken = {1: 1, 7: 7, 0.3: 9, None: 1}[hold_out]
        assert len(train) == 29 - taken
        out = row_numbers(held_out, tokenizer)
        assert len(out) == len(held_out.examples) == taken
        seen: set[int] = set()
        for _ in range(-(-90 // batch_size) if not packing else 30 // batch_size):
            seen |= set(row_numbers([next(train)], tokenizer))
        assert seen == set(range(29)) - set(out)
        numbers.append(sorted(out))
    assert numbers[0] == numbers[1] == numbers[2]


def test_the_last_held_out_batch_is_padded(rows_path, tokenizer):
    _, held_out = build(rows_path, tokenizer, batch_size=4, packing=False, hold_out=6)
    assert len(held_out) == 2
    last = held_out[1]
    assert last.tokens.shape == (4, 48)
    assert not last.segment_ids[2:].any()
    assert not last.loss_mask[2:].any()
    assert last.loss_mask[:2].any(axis=1).all()
    assert_same(held_out[-1], last)
    assert len(held_out[:1]) == 1
    with pytest.raises(IndexError):
        held_out[2]


def test_train_rows_and_eval_rows_limit_the_rows(rows_path, tokenizer):
    train, held_out = build(rows_path, tokenizer, hold_out=8, train_rows=5, eval_rows=3)
    seen: set[int] = set()
    for _ in range(30):
        seen |= set(row_numbers([next(train)], tokenizer))
    assert len(seen) == len(train) == 5
    assert len(held_out.examples) == 3
    assert not seen & set(row_numbers(held_out, tokenizer))


def test_eval_rows_come_from_a_split_or_another_path(tmp_path, tokenizer):
    write_rows(tmp_path, 10, "train.jsonl")
    write_rows(tmp_path, 4, "dev.jsonl")
    write_rows(tmp_path, 3, "test.jsonl")
    both = {"hold_out": None}
    assert len(build(tmp_path, tokenizer, **both)[1].examples) == 4
    assert len(build(tmp_path, tokenizer, eval_split="test", **both)[1].examples) == 3
    train, held_out = build(tmp_path, tokenizer, train_split="dev", **both)
    assert len(train) == 4
    assert len(held_out.examples) == 3
    elsewhere = str(tmp_path / "test.jsonl")
    train, held_out = build(tmp_path / "train.jsonl", tokenizer, eval_path=elsewhere, **both)
    assert (len(train), len(held_out.examples)) == (10, 3)
    train, held_out = build(tmp_path, tokenizer, hold_out=5)
    assert (len(train), len(held_out.examples)) == (5, 5)
    assert len(build(tmp_path, tokenizer, hold_out=0)[1].examples) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "trian"}, "did you mean 'train'"),
        ({"eval_split": "vlaidation"}, "did you mean 'validation'"),
        ({"eval_split": "train"}, "data.eval_split is 'train'"),
        ({"hold_out": 10}, "data.hold_out is 10"),
    ],
)
def test_missing_splits_raise(tmp_path, tokenizer, changes, message):
    write_rows(tmp_path, 10, "train.jsonl")
    write_rows(tmp_path, 4, "dev.jsonl")
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tokenizer, **{"hold_out": None, **changes})


def test_evaluating_on_the_training_rows_is_rejected(rows_path, tokenizer):
    other = rows_path.parent / "." / rows_path.name
    with pytest.raises(ValueError, match=r"data\.eval_path is"):
        build(rows_path, tokenizer, eval_path=str(other), hold_out=None)


def test_an_error_for_a_missing_file_names_near_matches(tmp_path, tokenizer):
    write_rows(tmp_path, 3, "train.jsonl")
    with pytest.raises(
        FileNotFoundError, match=r"no 'trian\.jsonl' in .*did you mean 'train\.jsonl'"
    ):
        build(tmp_path / "trian.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no 'absent' in .*known: train\.jsonl"):
        build(tmp_path / "absent" / "deeper" / "train.jsonl", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no data file for recipe 'text'"):
        build(tmp_path / "empty", tokenizer)


BAD_LINES = [
    '{"text": "one"}',
    '{"text": "two"',
    '{"txet": "three"}',
    '{"text": ""}',
    '{"text": 5}',
    '{"text": "six"}',
    '{"text": "two again"',
]


def test_bad_rows_stop_before_training(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        build(path, tokenizer)
    message = str(caught.value)
    assert message.startswith(
        "training rows: 5 of 7 cannot be used (2 broken JSON, 1 missing field"
    )
    assert f"{path}:2: broken JSON: Expecting ',' delimiter at column 15" in message
    assert f"{path}:3: missing field: no column 'text' or 'content' or 'story'" in message
    assert f"{path}:4: empty: field 'text' is empty" in message
    assert f"{path}:5: wrong type: field 'text' is a int" in message
    assert "data.on_bad_row=skip" in message


def test_bad_rows_are_skipped_by_setting(tmp_path, tokenizer, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    train, _ = build(path, tokenizer, on_bad_row="skip")
    texts: set[str] = set()
    for _ in range(5):
        texts |= set(segments(next(train), tokenizer))
    assert texts == {"<s>one</s>", "<s>six</s>"}
    assert train.bad_rows.counts == {
        "broken JSON": 2,
        "missing field": 1,
        "empty": 1,
        "wrong type": 1,
    }
    assert caplog.text.count(f"{path}:3: missing field") == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_unchecked_bad_rows_stop_the_stream_when_reached(tmp_path, tokenizer, prefetch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*['{"text": "good"}'] * 5, "bad"]))
    train, _ = build(path, tokenizer, check_rows=0, shuffle=False, packing=False, prefetch=prefetch)
    for _ in range(2):
        next(train)
    with pytest.raises(ValueError, match=r"a\.jsonl:6: broken JSON"):
        next(train)


@pytest.mark.parametrize("check_rows", [0, None])
def test_data_with_only_bad_rows_is_an_error(tmp_path, tokenizer, check_rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES[1:5]))
    with pytest.raises(ValueError, match="training rows: 4 of 4 cannot be used"):
        next(build(path, tokenizer, on_bad_row="skip", check_rows=check_rows)[0])


def test_too_long_decides_the_treatment_of_long_rows(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"{n}?", "answer": "y" * n + " #### 1"} for n in (1, 100, 2, 200)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    common = {"recipe": "gsm8k", "max_length": 40}
    train, _ = build(path, tokenizer, **common)
    for _ in range(4):
        next(train)
    assert train.bad_rows.counts == {"too long": 2}
    too_long = r"too long: \d+ tokens, .* 41 fit\n(.*\n)?.*truncate"
    with pytest.raises(ValueError, match=too_long):
        build(path, tokenizer, too_long="error", **common)
    train, _ = build(path, tokenizer, too_long="error", check_rows=0, **common)
    with pytest.raises(ValueError, match=too_long):
        next(train)
    train, _ = build(path, tokenizer, too_long="truncate", **common)
    for _ in range(4):
        next(train)
    assert not len(train.bad_rows)
    with pytest.raises(ValueError, match="training rows: 4 of 4 cannot be used"):
        next(build(path, tokenizer, recipe="gsm8k", max_length=3)[0])
    with pytest.raises(ValueError, match=r"held-out rows: .*too long"):
        build(path, tokenizer, recipe="gsm8k", max_length=3, hold_out=2)


def test_only_the_answer_is_in_the_loss(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    train, _ = build(path, tokenizer, recipe="gsm8k", max_length=120)
    batch = next(train)
    found = []
    for row in range(2):
        for number in range(1, batch.segment_ids[row].max() + 1):
            here = (batch.segment_ids[row] == number) & (batch.loss_mask[row] > 0)
            found.append(tokenizer.decode(batch.targets[row][here]))
    assert len(found) > 2
    assert set(found) <= {f" {row['answer']}</s>" for row in rows}
    both, _ = build(path, tokenizer, recipe="gsm8k", max_length=120, completion_only=False)
    batch = next(both)
    np.testing.assert_array_equal(batch.loss_mask, batch.segment_ids > 0)


def test_prompt_and_answer_are_rendered_by_a_chat_template(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(6)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = {"recipe": "alpaca", "chat": True, "chat_template": str(template)}
    _, held_out = build(path, tokenizer, hold_out=2, max_length=200, **options)
    for example in held_out.examples:
        number = example.answer
        assert example.prompt == (
            f"<|im_start|>user\nSay {number}.<|im_end|>\n<|im_start|>assistant\n"
        )
        assert example.completion == f"{number}<|im_end|>"
    # The tokenizer has no template of its own.
    with pytest.raises(ValueError, match="no chat template"):
        build(path, tokenizer, recipe="alpaca", chat=True)


def test_lost_characters_log_a_warning(tmp_path, tinystories, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2 #### 2"}\n')
    build(path, tinystories, recipe="gsm8k")
    assert "The tokenizer has no token for some characters" in caplog.text
    assert "#" in caplog.text.partition("write: ")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "gsm8"}, "did you mean 'gsm8k'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_invalid_arguments_raise(rows_path, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        build(rows_path, tokenizer, **changes)


def test_an_empty_path_without_a_hub_data_set_raises(tokenizer):
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        build_data(DataSettings(recipe="text"), tokenizer, batch_size=1, max_length=8, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_bad_row": "skipp"}, "did you mean 'skip'"),
        ({"too_long": "cut"}, r"data\.too_long is 'cut'"),
        ({"text_unit": "lines"}, "did you mean 'line'"),
        ({"hold_out": -1}, "data.hold_out is -1"),
        ({"hold_out": 1.5}, "data.hold_out is 1.5"),
        ({"packing_window": 0}, "data.packing_window is 0"),
        ({"train_rows": 0}, "data.train_rows is 0"),
        ({"eval_path": "x", "hold_out": 0.1}, "data.eval_path is 'x'.*data.hold_out is 0.1"),
    ],
)
def test_invalid_settings_raise(changes, message, monkeypatch):
    # Tests check types first, but users' runs do not.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        DataSettings(recipe="text", **changes)


def test_lists_are_accepted_for_tuples(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    made = DataSettings(recipe="text", columns={"text": "body"}, label_words=["a", "b"])
    assert made.label_words == ("a", "b")
    assert dataclasses.replace(made, recipe="gsm8k").columns == {"text": "body"}
