"""HumanEval: functions written from their docstrings, run against tests (arXiv 2107.03374).

- [`problems`][eval.humaneval.problems]: the 164 problems, from the hub or a local file.
- [`pass_at_k`][eval.humaneval.pass_at_k]: the unbiased estimator.
- [`task`][eval.humaneval.task]: `HumanEvalSettings`, and the evaluation.
"""
