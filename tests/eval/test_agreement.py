"""Tests that our models agree with the harness's own backend, transformers on torch."""

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from eval.harness import evaluate_task, metrics_of, quiet_harness
from eval.run import _manager
from eval.tasks.build import TaskSettings, build_task

TASKS = {
    "cola": 24,
    "gsm8k": 4,
    "xnli_de": 8,
    "flores_eng_Latn-deu_Latn": 4,
}
MORE = {
    "cola": 300,
    "sst2": 200,
    "rte": 100,
    "gsm8k": 24,
    "xnli_fr": 60,
    "xnli_zh": 60,
    "flores_eng_Latn-fra_Latn": 16,
    "flores_zho_Hans-eng_Latn": 16,
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return _manager(["glue", "gsm8k", "xnli"])


def requests_of(samples):
    """Yields the arguments and response of every request of every row."""
    for sample in samples:
        yield from zip(sample["arguments"], sample["resps"], strict=True)


def compare(task_name, limit, ours, theirs, shared_data, manager):
    """Compares the answers and metrics of both models."""
    found = []
    for model in (ours, theirs):
        with quiet_harness():
            settings = TaskSettings(data=shared_data, max_new_tokens=24)
            task = build_task(task_name, settings, manager)
        results = evaluate_task(model, task, limit=limit)
        found.append((results["samples"][task_name], metrics_of(task_name, task, results)))
    (our_samples, our_metrics), (their_samples, their_metrics) = found
    count = 0
    for one, other in zip(requests_of(our_samples), requests_of(their_samples), strict=True):
        assert one[0] == other[0], "both models must get the same requests"
        for (our_answer,), (their_answer,) in zip([one[1]], [other[1]], strict=True):
            if isinstance(their_answer, str):
                # Transformers drops a leading space.
                assert our_answer.strip() == their_answer.strip()
            else:
                np.testing.assert_allclose(our_answer[0], their_answer[0], atol=1e-3)
                assert our_answer[1] == their_answer[1]
            count += 1
    assert count >= limit
    assert [(m.name, m.variant) for m in our_metrics] == [
        (m.name, m.variant) for m in their_metrics
    ]
    for our_metric, their_metric in zip(our_metrics, their_metrics, strict=True):
        assert (our_metric.name, our_metric.variant) == (their_metric.name, their_metric.variant)
        assert our_metric.value == pytest.approx(their_metric.value, abs=1e-9)
        assert our_metric.standard_error == pytest.approx(their_metric.standard_error, abs=1e-9)
    return our_metrics


@pytest.mark.fast("gsm8k")
@pytest.mark.parametrize("task", TASKS)
def test_same_answers_and_metrics(task, make_model, torch_model, shared_data, manager):
    compare(task, TASKS[task], make_model(), torch_model, shared_data, manager)


@pytest.mark.slow
@pytest.mark.parametrize("task", MORE)
def test_same_answers_and_metrics_over_more_rows(
    task, make_model, torch_model, shared_data, manager
):
    compare(task, MORE[task], make_model(), torch_model, shared_data, manager)
