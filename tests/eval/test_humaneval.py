"""Tests HumanEval: the estimator, real problems with known solutions, and rejections."""

import contextlib
import gzip
import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from eval.humaneval.pass_at_k import mean_and_standard_error, pass_at_k
from eval.humaneval.problems import open_problems
from eval.humaneval.task import HumanEvalSettings, make_job
from eval.responses import ResponseStore
from eval.sandbox import IsolationError, Sandbox, SandboxLimits
from eval.settings import EvalSettings
from eval.tasks.names import Wanted
from peft_jax.runtime.progress import Reporter

WANTED = Wanted("humaneval")
LIMITS = SandboxLimits(seconds=300.0)


class Writer:
    """Model that returns given completions in turn."""

    def __init__(self, answers):
        self.answers = answers
        self.store = ResponseStore()
        self.reporter = Reporter()
        self.truncated = 0
        self.asked = []

    def settings_of(self, gen_kwargs):
        return gen_kwargs

    def complete(self, requests):
        self.asked += requests
        return [self.answers[text].pop(0) for text, _ in requests]


@pytest.fixture(scope="module")
def rows(shared_data):
    path = shared_data / "humaneval" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def _isolated():
    try:
        Sandbox(LIMITS).check()
    except IsolationError as error:
        pytest.skip(f"programs cannot be isolated on this machine: {error}")


def settings(shared_data, **changes):
    return EvalSettings(tasks=("humaneval",), model="none", data=shared_data, **changes)


def evaluate(shared_data, tmp_path, model, *, limit, **code):
    code = HumanEvalSettings(allowed=True, limits=LIMITS, **code)
    job = make_job(WANTED, tmp_path, settings(shared_data, limit=limit), code)
    return job.evaluate(model)


def test_pass_at_k_is_the_fraction_of_subsets_with_a_pass():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                expected = np.mean([any(subset) for subset in subsets])
                assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    rate, n, k = 0.2, 10, 3
    estimates = [pass_at_k(n, int(c), k) for c in rng.binomial(n, rate, 20000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - rate) ** k, abs=0.005)


def test_pass_at_k_of_many_samples_is_exact():
    assert 0 < pass_at_k(1000, 1, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [(2, 1, 3), (2, 3, 1), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_rejects_impossible_counts(wrong):
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(*wrong)


def test_standard_error():
    values = [0.0, 0.5, 1.0, 1.0]
    mean, error = mean_and_standard_error(values)
    assert mean == np.mean(values)
    assert error == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_and_standard_error([1.0]) == (1.0, None)


def test_problems_are_read_in_order(shared_data, rows):
    problems = open_problems(shared_data)
    assert len(problems) == 164
    assert [problem.task_id for problem in problems] == [row["task_id"] for row in rows]


@pytest.mark.usefixtures("_isolated")
def test_right_and_wrong_completions_are_distinguished(shared_data, rows, tmp_path):
    answers = {}
    for number, row in enumerate(rows[:4]):
        right, wrong = row["canonical_solution"], "    return None\n"
        answers[row["prompt"]] = [right] * number + [wrong] * (3 - number)
    model = Writer(answers)
    result = evaluate(shared_data, tmp_path, model, limit=4, samples=3, pass_at=(1, 2))
    values = {metric.name: metric.value for metric in result.metrics}
    assert values["pass@1"] == pytest.approx(np.mean([0, 1 / 3, 2 / 3, 1]))
    assert values["pass@2"] == pytest.approx(np.mean([0, 2 / 3, 1, 1]))
    assert (result.rows, result.rows_in_all) == (4, 164)
    assert result.details["verdicts"] == {"passed": 6, "failed": 6}
    assert {kwargs["temperature"] for _, kwargs in model.asked} == {0.8}
    assert {kwargs["max_gen_toks"] for _, kwargs in model.asked} == {1024}
    samples = (tmp_path / "samples" / "humaneval.jsonl").read_text().splitlines()
    assert len(samples) == 12


@pytest.mark.usefixtures("_isolated")
def test_hostile_completions_fail_without_stopping_the_evaluation(shared_data, rows, tmp_path):
    hostile = [
        "    pass\nimport os; os._exit(0)\n",
        "    pass\nimport os, signal; os.kill(os.getppid(), signal.SIGKILL); os.kill(-1, 9)\n",
        "    pass\nwhile True: print('x' * 10000)\n",
        "    pass\nopen('/escaped', 'w')\n",
        "    pass\nraise ValueError('\\ud83d')\n",
    ]
    answers = {row["prompt"]: [attack] for row, attack in zip(rows[:5], hostile, strict=True)}
    answers[rows[5]["prompt"]] = [rows[5]["canonical_solution"]]
    model = Writer(answers)
    model.store = ResponseStore(tmp_path / "responses.jsonl")
    result = evaluate(shared_data, tmp_path, model, limit=6)
    assert result.metrics[0].value == pytest.approx(1 / 6)
    assert result.details["verdicts"] == {"failed": 4, "output": 1, "passed": 1}


@pytest.mark.usefixtures("_isolated")
def test_programs_are_not_run_twice(shared_data, rows, tmp_path, monkeypatch):
    model = Writer({row["prompt"]: [row["canonical_solution"]] * 2 for row in rows[:2]})
    first = evaluate(shared_data, tmp_path, model, limit=2)
    monkeypatch.setattr(Sandbox, "check", lambda self: None)
    monkeypatch.setattr(Sandbox, "run", lambda self, program: pytest.fail("it was run before"))
    again = evaluate(shared_data, tmp_path, model, limit=2)
    assert again.metrics == first.metrics
    assert first.metrics[0].value == 1.0


@pytest.mark.usefixtures("_isolated")
def test_an_interruption_stops_programs_and_keeps_outcomes(shared_data, rows, tmp_path):
    class Interrupted(Reporter):
        @contextlib.contextmanager
        def counting(self, what, total):
            with super().counting(what, total) as counter:
                counter.advance = self.interrupt
                yield counter

        def interrupt(self):
            raise KeyboardInterrupt

    endless = "    pass\nwhile True: pass\n"
    answers = {row["prompt"]: [endless] for row in rows[1:12]}
    model = Writer({rows[0]["prompt"]: [rows[0]["canonical_solution"]], **answers})
    model.reporter = Interrupted()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        evaluate(shared_data, tmp_path, model, limit=12, workers=2)
    assert time.monotonic() - started < LIMITS.seconds / 2
    assert len(model.store) == 1
    assert not [thread for thread in threading.enumerate() if "(do)" in thread.name]


@pytest.mark.slow
@pytest.mark.usefixtures("_isolated")
def test_every_canonical_solution_passes(shared_data, rows, tmp_path):
    model = Writer({row["prompt"]: [row["canonical_solution"]] for row in rows})
    result = evaluate(shared_data, tmp_path, model, limit=None)
    assert result.details["verdicts"] == {"passed": 164}


def test_nothing_is_run_without_permission(shared_data, tmp_path):
    with pytest.raises(ValueError, match="--allow_code_execution"):
        make_job(WANTED, tmp_path, settings(shared_data), HumanEvalSettings())


def test_missing_isolation_is_rejected(shared_data, tmp_path, monkeypatch):
    def reject(self):
        raise IsolationError("generated code cannot be isolated here: no namespaces")

    monkeypatch.setattr(Sandbox, "check", reject)
    with pytest.raises(ValueError, match=r"no namespaces.*--allow_unisolated_code"):
        make_job(WANTED, tmp_path, settings(shared_data), HumanEvalSettings(allowed=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pass_at": (10,)}, "pass@10 .* is 1"),
        ({"samples": 2, "temperature": 0.0}, "samples are the same"),
        ({"samples": 0}, "samples_per_problem"),
    ],
)
def test_invalid_settings_are_rejected(wrong, message):
    with pytest.raises(ValueError, match=message):
        HumanEvalSettings(**wrong)


def test_a_problem_without_a_field_is_rejected(tmp_path):
    (tmp_path / "humaneval").mkdir()
    file = tmp_path / "humaneval" / "test.jsonl"
    file.write_text('{"task_id": "HumanEval/0", "prompt": "def f():"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl:1: 'test' is None"):
        open_problems(Path(tmp_path))
