"""The number of steps of an epoch agrees with the stream."""

import json

import pytest

from peft_jax.data import DataSettings, build_data

ROWS = 23


def build(folder, tokenizer, *, batch_size=2, seed=0, bad=(), **changes):
    """Builds a stream of numbered rows, of which those in `bad` cannot be used."""
    path = folder / "train.jsonl"
    rows = [
        "{" if index in bad else json.dumps({"text": f"{index}:" + "x" * (index * 7 % 23)})
        for index in range(ROWS)
    ]
    path.write_text("\n".join(rows))
    settings = {"recipe": "text", "hold_out": 0, "prefetch": 0, "on_bad_row": "skip", **changes}
    train, _ = build_data(
        DataSettings(path=str(path), **settings),
        tokenizer,
        batch_size=batch_size,
        max_length=48,
        seed=seed,
    )
    return train


def seen(train, tokenizer, batches: int) -> list[int]:
    """Returns the numbers of the rows in the next batches."""
    found = []
    for batch in (next(train) for _ in range(batches)):
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            for number in range(1, segments.max() + 1):
                text = tokenizer.decode(tokens[segments == number])
                found.append(int(text.removeprefix("<s>").split(":")[0]))
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("epochs", [1.0, 2.0, 3.0])
def test_whole_epochs_contain_every_row_equally_often(tmp_path, tokenizer, packing, epochs):
    # With batches of one row, the last batch has no rows of the next pass.
    train = build(tmp_path, tokenizer, batch_size=1, packing=packing)
    found = seen(train, tokenizer, train.count_steps(epochs))
    assert sorted(found) == sorted([*range(ROWS)] * int(epochs))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_cannot_be_used_are_not_counted(tmp_path, tokenizer, packing):
    bad = (0, 7, 8, 22)
    # A window has 19 usable rows, as many as a pass.
    train = build(
        tmp_path, tokenizer, batch_size=1, packing=packing, bad=bad, packing_window=ROWS - len(bad)
    )
    found = seen(train, tokenizer, train.count_steps(2.0))
    assert sorted(found) == sorted([row for row in range(ROWS) if row not in bad] * 2)


@pytest.mark.parametrize("window", [4, 5, 64])
def test_windows_across_passes_are_counted_as_the_stream_packs_them(tmp_path, tokenizer, window):
    # Whole windows are counted exactly; the last one counts in proportion.
    bad = (3, 4)
    train = build(tmp_path, tokenizer, batch_size=1, bad=bad, packing_window=window)
    window = min(window, ROWS)
    usable = ROWS - len(bad)
    whole = window * 5  # elements in five windows
    assert len(seen(train, tokenizer, train.count_steps(whole / usable))) == whole


def test_steps_of_fractional_epochs(tmp_path, tokenizer):
    train = build(tmp_path, tokenizer, packing=False)
    assert [train.count_steps(epochs) for epochs in (0.01, 0.5, 1.0, 1.5, 10.0)] == [
        1,
        6,
        12,
        18,
        115,
    ]


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"packing_window": 5}])
def test_the_number_of_steps_depends_on_data_and_seed_alone(tmp_path, tokenizer, changes):
    # Every process and resumed run counts by itself, after reading different rows.
    counts = set()
    for check_rows, taken, prefetch in ((None, 0, 0), (0, 0, 2), (5, 3, 0)):
        options = {"check_rows": check_rows, "prefetch": prefetch, **changes}
        train = build(tmp_path, tokenizer, bad=(2,), **options)
        seen(train, tokenizer, taken)
        counts.add(train.count_steps(2.3))
        train.close()
    assert len(counts) == 1


@pytest.mark.parametrize("packing", [False, True])
def test_passes_invert_count_steps(tmp_path, tokenizer, packing):
    train = build(tmp_path, tokenizer, packing=packing)
    for epochs in (1.0, 4.0, 20.0):
        steps = train.count_steps(epochs)
        assert train.passes(steps) == pytest.approx(epochs, rel=0.1)
    assert train.all_checked


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1e6, 2e9])
def test_many_passes_are_extrapolated(tmp_path, tokenizer, epochs):
    train = build(tmp_path, tokenizer, packing_window=5)
    a_hundred = train.count_steps(100.0)
    assert train.count_steps(epochs) == pytest.approx(a_hundred * (epochs / 100), rel=0.01)


def test_passes_are_estimated_from_the_checked_rows(tmp_path, tokenizer):
    exact = build(tmp_path, tokenizer).passes(100)
    some = build(tmp_path, tokenizer, check_rows=12)
    assert some.passes(100) == pytest.approx(exact, rel=0.3)
    assert not some.all_checked
    assert build(tmp_path, tokenizer, check_rows=0).passes(100) is None
