"""Evaluates HumanEval: functions completed from their docstrings and tested (arXiv 2107.03374).

- [`problems`][eval.humaneval.problems]: The 164 problems, from the hub or a local file.
- [`pass_at_k`][eval.humaneval.pass_at_k]: The unbiased estimator of pass@k.
- [`task`][eval.humaneval.task]: `HumanEvalSettings`, and the evaluation.
"""
