"""Tests malformed files, of an earlier command or of the user."""

import json

import pytest

from eval.command import main
from eval.mt_bench.benchmark_files import read_benchmark
from eval.responses import ResponseStore
from eval.results import Metric, TaskResult
from eval.run import OutputFolder, _build
from eval.settings import EvalSettings
from peft_jax.runtime.errors import RefusedError

RESULT = TaskResult(
    task="cola", metrics=(Metric(name="acc", value=0.5),), rows=3, rows_in_all=9, seconds=1.0
)
WHOLE = json.dumps({"tasks": [RESULT.to_mapping()], "averages": []})


def changed(**changes):
    return json.dumps({"tasks": [{**RESULT.to_mapping(), **changes}]})


@pytest.mark.parametrize(
    "text",
    [
        *(WHOLE[:count] for count in (0, 1, 20, len(WHOLE) - 1)),
        "null",
        "[]",
        "{}",
        '{"tasks": null}',
        '{"tasks": {"a": 1}}',
        '{"tasks": ["cola"]}',
        '{"tasks": [{}]}',
        '{"tasks": [{"task": "cola"}]}',
        changed(rows="3"),
        changed(rows=True),
        changed(metrics={"acc": 1}),
        changed(metrics=[{"name": "acc"}]),
        changed(metrics=[{"name": "acc", "value": None}]),
        changed(metrics=[{"name": 1, "value": 1.0}]),
        changed(metrics=[{"name": "acc", "value": float("nan")}]),
        changed(seconds=float("inf")),
        changed(details=[]),
        changed(unknown=1),
        "[" * 100_000,
        '{"tasks":' * 100_000,
        "\ud800",
    ],
)
def test_malformed_results_are_rejected_by_name(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RefusedError, match=r"results.json is not an evaluation's results: ."):
        OutputFolder(tmp_path).read()


def test_complete_results_are_read(tmp_path):
    (tmp_path / "results.json").write_text(WHOLE)
    assert OutputFolder(tmp_path).read() == {"cola": RESULT}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_malformed_identity_is_rejected_by_name(tmp_path, text):
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(RefusedError, match=r"identity.json is not"):
        OutputFolder(tmp_path).claim({"model": "m"})


KINDS = {
    "generate": ("text", [None, 1, ["text"], {}]),
    "judge": ("text", [1, [], {}]),
    "rolling": (-1.5, ["1", True, [1]]),
    "loglikelihood": (
        [-1.5, True],
        [-1.5, [], [True, True], [-1.5, 1], [-1.5, True, 1], ["1", True]],
    ),
    "run tested": (
        {"verdict": "passed", "detail": "", "output": "", "seconds": 1.0},
        [
            "passed",
            [],
            {},
            {"verdict": "passed"},
            {"verdict": "passed", "detail": "", "output": "", "seconds": "1"},
            {"verdict": "passed", "detail": "", "output": "", "seconds": 1.0, "more": 1},
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_responses_of_the_wrong_form_are_rejected_by_name(tmp_path, kind):
    file = tmp_path / "responses.jsonl"
    right, wrong = KINDS[kind]
    ResponseStore(file).add(right, kind, "prompt")
    assert ResponseStore(file).get(kind, "prompt") == right
    key = json.loads(file.read_text())[0]
    for response in wrong:
        if response is None:
            continue
        file.write_text(json.dumps([key, response]) + "\n")
        with pytest.raises(RefusedError, match=rf"responses.jsonl has .* '{kind}' request"):
            ResponseStore(file).get(kind, "prompt")


@pytest.mark.parametrize(
    "line", [b"5", b"null", b"{}", b'["a"]', b"[1, 2]", b"[1, 2, 3]", b"{", b"\xff", b"[" * 100_000]
)
def test_a_malformed_line_is_rejected_and_the_file_is_kept(tmp_path, line):
    file = tmp_path / "responses.jsonl"
    store = ResponseStore(file)
    store.add("one", "generate", "1")
    before = file.read_bytes()
    text = before + line + b"\n" + before
    file.write_bytes(text)
    with pytest.raises(RefusedError, match=r"responses.jsonl:2 is not a response"):
        ResponseStore(file)
    assert file.read_bytes() == text


def test_an_incomplete_last_line_is_dropped(tmp_path):
    file = tmp_path / "responses.jsonl"
    ResponseStore(file).add("one", "generate", "1")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:-5])
    assert len(ResponseStore(file)) == 1
    assert file.read_bytes() == whole


# FastChat's files.


def write_benchmark(folder, **files):
    prompts = [
        {"name": name, "system_prompt": "s", "prompt_template": "{question} {answer}"}
        for name in (
            *("single-v1", "single-v1-multi-turn"),
            *("single-math-v1", "single-math-v1-multi-turn"),
        )
    ]
    contents = {
        "question.jsonl": '{"question_id": 1, "category": "writing", "turns": ["one", "two"]}',
        "reference_answer_gpt-4.jsonl": "",
        "judge_prompts.jsonl": "\n".join(map(json.dumps, prompts)),
    }
    for name, text in {**contents, **files}.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name).write_bytes(data)
    return folder


def template(text):
    return json.dumps({"name": "single-v1", "system_prompt": "s", "prompt_template": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("question.jsonl", b"\xff\xfe"),
        ("question.jsonl", "[" * 100_000),
        ("question.jsonl", '{"question_id": true, "category": "a", "turns": ["one", "two"]}'),
        ("question.jsonl", '{"question_id": 1, "category": [], "turns": ["one", "two"]}'),
        ("question.jsonl", '{"question_id": 1, "category": "a", "turns": {"0": 1, "1": 2}}'),
        ("reference_answer_gpt-4.jsonl", '{"question_id": Infinity, "choices": [{"turns": []}]}'),
        ("reference_answer_gpt-4.jsonl", '{"question_id": 1, "choices": {"turns": []}}'),
        ("reference_answer_gpt-4.jsonl", '{"question_id": 1, "choices": [{"turns": 5}]}'),
        ("judge_prompts.jsonl", template("{unknown}")),
        ("judge_prompts.jsonl", template("{")),
        ("judge_prompts.jsonl", template("{0}")),
        ("judge_prompts.jsonl", template("{question.real}")),
        ("judge_prompts.jsonl", template("{ref_answer_1}")),
        ("judge_prompts.jsonl", '{"name": [], "system_prompt": "s"}'),
    ],
)
def test_malformed_files_of_fastchat_are_rejected_by_name(tmp_path, name, text):
    read_benchmark(write_benchmark(tmp_path))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_benchmark(write_benchmark(tmp_path, **{name: text}))


# Commands.


@pytest.mark.parametrize(
    "options", ["[" * 100_000, "{", "1", '{"temperature": NaN}', '{"temperature": Infinity}']
)
def test_options_that_are_not_json_are_rejected_in_one_line(options, capsys):
    assert main(["--model=m", "--tasks=mt_bench", f"--judge_options={options}"]) == 2
    assert capsys.readouterr().err.startswith("eval: --judge_options")


@pytest.mark.parametrize("order", [("glue", "xnli"), ("xnli", "glue")])
def test_a_suite_without_data_is_rejected_with_its_own_reason(tmp_path, order):
    (tmp_path / "empty").mkdir()
    settings = EvalSettings(tasks=order, model="m", data=tmp_path / "empty")
    with pytest.raises(ValueError, match=f"no data for {order[0]}") as caught:
        _build(settings, {}, OutputFolder(tmp_path / "out"), None, False)
    task, other = {"glue": ("cola", "xnli"), "xnli": ("xnli_", "cola")}[order[0]]
    assert task in str(caught.value)
    assert other not in str(caught.value).partition(": ")[2]
