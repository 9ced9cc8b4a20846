"""Columns: recipes read the right ones, Arrow's nulls are ignored, unread ones are reported."""

import dataclasses
import json
import logging

import datasets
import pytest

from peft_jax.data import BadRowError, DataSettings, build_data, get_recipe
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.recipes.columns import unread_columns
from peft_jax.data.sources import open_sources
from peft_jax.data.tables import MemoryTable

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ m | tojson }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Every object has keys that others do not have, at every depth.
TOOL_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [call("clock", zone="UTC")]},
            {"role": "tool", "content": "noon", "name": "clock"},
            {"role": "assistant", "content": "It is noon."},
        ],
        "tools": [tool("clock", zone={"type": "string", "enum": ["UTC", "CET"]})],
    },
    {
        "messages": [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("add", left=1, of={"deep": {"er": "x"}})],
            },
        ],
        "tools": [tool("add", left={"type": "number"}), tool("clock", zone={"type": "string"})],
    },
    {"messages": MESSAGES},
]


def saved(rows, path, kind: str) -> str:
    """Saves the rows as a file or folder of some kind, and returns its path."""
    data = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        path = path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        path = path / "rows.parquet"
        data.to_parquet(str(path))
    elif kind == "arrow":
        data.save_to_disk(str(path / "saved"))
        path = next((path / "saved").glob("*.arrow"))
    else:
        path = path / "saved"
        datasets.DatasetDict({"train": data}).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "saved", "hub"])
def test_the_same_rows_give_the_same_text_in_every_format(tmp_path, tokenizer, monkeypatch, kind):
    if kind == "hub":
        data = datasets.DatasetDict({"train": datasets.Dataset.from_list(TOOL_ROWS)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: data)
        path = "someone/set"
    else:
        path = saved(TOOL_ROWS, tmp_path, kind)
    settings = DataSettings(recipe="chat", path=path, hold_out=0)
    recipe = get_recipe("chat").configured(settings)
    table = open_sources(settings, recipe).train
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    renderer = ChatRenderer(tokenizer, chat_template=str(template))
    for index, row in enumerate(TOOL_ROWS):
        text = "".join(piece.text for piece in renderer.render(recipe.example(table[index])).pieces)
        assert text == tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=TEMPLATE,
            tokenize=False,
        )


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be Ivy.", "conversations": TURNS},
        {"system": "Be Ivy.", "messages": [{"role": "system", "content": "Be Ivy."}, *MESSAGES]},
        {"messages": None, "conversations": TURNS, "system": "Be Ivy."},
        {"messages": None, "prompt": "Hi", "completion": "Yo", "system": "Be Ivy."},
    ],
)
def test_the_system_column_and_the_first_non_null_column_are_read(row):
    conversation = get_recipe("chat").example(row)
    assert conversation.messages == ({"role": "system", "content": "Be Ivy."}, *MESSAGES)
    assert conversation.loss_turns == (2,)


def test_two_system_texts_are_a_bad_row():
    row = {"system": "A", "messages": [{"role": "system", "content": "B"}, *MESSAGES]}
    with pytest.raises(BadRowError, match="two system texts"):
        get_recipe("chat").example(row)


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_a_turn_of_weight_0_is_not_in_the_loss(weight):
    turns = [*MESSAGES, *MESSAGES]
    turns[1] = {**turns[1], "weight": weight}
    turns[3] = {**turns[3], "weight": 1}
    conversation = get_recipe("chat").example({"messages": turns})
    assert conversation.messages == (*MESSAGES, *MESSAGES)
    assert conversation.loss_turns == (3,)
    turns[3] = turns[1]
    with pytest.raises(BadRowError, match="empty: "):
        get_recipe("chat").example({"messages": turns})


@pytest.mark.parametrize("weight", [0.5, 2, "1", [1]])
def test_a_weight_other_than_0_or_1_is_a_bad_row(weight):
    turns = [MESSAGES[0], {**MESSAGES[1], "weight": weight}]
    with pytest.raises(BadRowError, match=r"message 2 has weight "):
        get_recipe("chat").example({"messages": turns})


def test_only_the_completion_of_prompt_and_completion_is_in_the_loss(tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE.replace("{{ m | tojson }}", ""))
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "OLD"},
        {"role": "user", "content": "Bye"},
    ]
    for completion in ("NEW", [{"role": "assistant", "content": "NEW"}]):
        conversation = get_recipe("chat").example({"prompt": prompt, "completion": completion})
        # The same with an inserted system turn.
        for system in ("", "Be Ivy."):
            renderer = ChatRenderer(tokenizer, chat_template=str(path), system_prompt=system)
            pieces = renderer.render(conversation).pieces
            assert [piece.text for piece in pieces if piece.in_loss] == ["NEW</s>"]


ALPACA = {"instruction": "And then?", "input": "", "output": "She ran."}
HISTORY = [["Who is Ivy?", "A hare."], ["Where?", "There."]]


def test_alpaca_system_and_history_precede_the_prompt():
    recipe = get_recipe("alpaca")
    example = recipe.example({**ALPACA, "system": "Be brief.", "history": HISTORY})
    assert example.prompt == (
        "Be brief.\n\n### Instruction:\nWho is Ivy?\n\n### Response:\nA hare.\n\n"
        "### Instruction:\nWhere?\n\n### Response:\nThere.\n\n"
        "### Instruction:\nAnd then?\n\n### Response:"
    )
    assert (example.completion, example.answer) == ("\nShe ran.", "She ran.")
    for nothing in ({}, {"history": []}, {"history": None, "system": None}, {"system": " "}):
        assert recipe.example({**ALPACA, **nothing}) == recipe.example(ALPACA)
    asked = DataSettings(recipe="alpaca", prompt_template="[{system}] {instruction} >")
    example = recipe.configured(asked).example({**ALPACA, "system": "S", "history": HISTORY[:1]})
    assert example.prompt == "[S] Who is Ivy? >\nA hare.\n\n[S] And then? >"


def test_alpaca_system_and_history_are_turns_in_a_chat():
    recipe = get_recipe("alpaca").configured(DataSettings(recipe="alpaca", chat=True))
    conversation = recipe.example({**ALPACA, "system": "Be brief.", "history": HISTORY})
    assert [(one["role"], one["content"]) for one in conversation.messages] == [
        ("system", "Be brief."),
        ("user", "Who is Ivy?"),
        ("assistant", "A hare."),
        ("user", "Where?"),
        ("assistant", "There."),
        ("user", "And then?"),
        ("assistant", "She ran."),
    ]
    assert conversation.loss_turns == (6,)


@pytest.mark.parametrize(
    "history", ["Who?", [["Who?"]], [{"a": "b"}], [["a", 1]], 3, [["a", None]]]
)
def test_an_invalid_history_is_a_bad_row(history):
    with pytest.raises(BadRowError, match=r"'history' is "):
        get_recipe("alpaca").example({**ALPACA, "history": history})


def test_the_first_non_null_column_is_read():
    row = {**ALPACA, "input": None, "context": "Ivy is a hare."}
    assert "Ivy is a hare." in get_recipe("alpaca").example(row).prompt


@pytest.mark.parametrize(
    ("recipe", "row", "unread"),
    [
        ("chat", {"messages": MESSAGES, "source": "x", "score": 0}, ["source", "score"]),
        ("chat", {"messages": MESSAGES, "prompt": "Hi", "empty": "", "null": None}, ["prompt"]),
        ("alpaca", {**ALPACA, "input": "a", "context": "b"}, ["context"]),
        ("alpaca", {**ALPACA, "history": HISTORY, "system": "S"}, []),
        ("sst2", {"sentence": "a", "label": 1, "idx": 3}, ["idx"]),
        ("flores", {"translation": {"eng_Latn": "a", "fra_Latn": "b"}, "id": 1}, ["id"]),
        ("cola", {"source": "a", "label": "1", "mark": "*", "sentence": "b"}, []),
    ],
)
def test_unread_columns_are_found(recipe, row, unread):
    made = get_recipe(recipe).configured(DataSettings(recipe=recipe))
    rows = MemoryTable([{"broken": 1}, row, row], "rows")
    assert unread_columns(made, rows) == unread


def test_unread_columns_are_logged_once(tokenizer, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{**ALPACA, "category": "x", "id": number} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(recipe="alpaca", path=str(path), prefetch=0)
    with caplog.at_level(logging.WARNING, "absl"):
        for changes in ({}, {"columns": {"input": "category"}}):
            train, _ = build_data(
                dataclasses.replace(settings, **changes),
                tokenizer,
                batch_size=1,
                max_length=99,
                seed=0,
            )
            next(train)
            train.close()
    named = [record.getMessage() for record in caplog.records if "does not read" in record.message]
    assert len(named) == 2
    assert f"does not read columns 'category', 'id' of {path}" in named[0]
    assert "does not read column 'id' of" in named[1]
