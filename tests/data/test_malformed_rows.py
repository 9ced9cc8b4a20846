"""Arbitrary rows are either used or counted as bad, and raise nothing else."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_jax.data import RECIPES, DataSettings, build_data

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GOOD = {
    "chat": {"prompt": "Who ran?", "completion": "Ivy."},
    "alpaca": {"instruction": "Who ran?", "output": "Ivy."},
    "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "text": {"text": "Ivy ran."},
    "stsb": {"sentence1": "one", "sentence2": "two", "label": 2.5},
    "xnli": {"premise": "one", "hypothesis": "two", "label": "neutral"},
    "sst2": {"sentence": "good", "label": 1},
    "flores": {"source": "one", "target": "un"},
}
"""A usable row for each way in which recipes read rows."""

COLUMNS = sorted({name for r in RECIPES.values() for names in r.fields.values() for name in names})
KEYS = st.sampled_from([*COLUMNS, "role", "content", "from", "value", "translation", "weight", ""])
TEXTS = st.sampled_from(
    ["", " ", "user", "assistant", "system", "\ud800", "\x00", "{", "\n", "é", "-1", "9" * 5000]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
LINES = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=5).map(json.dumps),
    VALUES.map(json.dumps),
    st.sampled_from(["{", "nope", "[" * 100_000, '{"text": ' + "9" * 5000 + "}"]),
)


def check(folder, tokenizer, recipe: str, lines: list[str], ending: str, options: dict) -> None:
    """Checks that totals account for a good row and all others."""
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    rows = [json.dumps(GOOD[recipe]), *lines]
    path = folder / f"rows.{ending}"
    text = "\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]"
    path.write_text(text, encoding="utf-8")
    settings = DataSettings(
        recipe=recipe,
        path=str(path),
        hold_out=0,
        prefetch=0,
        on_bad_row="skip",
        chat_template=str(template) if recipe == "chat" else "",
        **options,
    )
    train, _ = build_data(settings, tokenizer, batch_size=1, max_length=60, seed=0)
    totals = train.totals
    assert totals.rows == len(rows)
    assert totals.used >= 1
    assert totals.used + sum(totals.left_out.values()) == totals.rows
    assert sum(train.bad_rows.counts.values()) == totals.rows - totals.used
    steps = train.count_steps(1.0)
    assert steps >= 1
    next(train)
    train.close()


def examples(number: int):
    """Runs a test on `number` generated lists of lines, the same in every run."""

    def decorate(test):
        quiet = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
        arguments = {
            "lines": st.lists(LINES, max_size=6),
            "too_long": st.sampled_from([None, "truncate", "split"]),
        }
        return settings(
            max_examples=number, deadline=None, derandomize=True, suppress_health_check=quiet
        )(given(**arguments)(test))

    return decorate


@pytest.mark.fast("alpaca", "chat", "flores", "gsm8k")
@pytest.mark.parametrize("recipe", GOOD)
@examples(11)
def test_malformed_rows_are_used_or_counted(tmp_path, tokenizer, recipe, lines, too_long):
    check(tmp_path, tokenizer, recipe, lines, "jsonl", {"too_long": too_long})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", GOOD)
@examples(130)
def test_a_thousand_malformed_rows_are_used_or_counted(
    tmp_path, tokenizer, recipe, lines, too_long
):
    check(tmp_path, tokenizer, recipe, lines, "jsonl", {"too_long": too_long})


@examples(12)
def test_malformed_items_of_a_json_array_are_used_or_counted(tmp_path, tokenizer, lines, too_long):
    whole = [line for line in lines if line not in ("{", "[" * 100_000)]
    check(tmp_path, tokenizer, "alpaca", whole, "json", {"too_long": too_long})
