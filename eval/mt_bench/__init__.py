"""Evaluates MT-Bench: 80 two-turn questions, whose answers a judge rates (arXiv 2306.05685).

- [`benchmark_files`][eval.mt_bench.benchmark_files]: FastChat's questions, judge
  prompts and reference answers.
- [`rating`][eval.mt_bench.rating]: Extraction of the rating from a judgment.
- [`judges`][eval.mt_bench.judges]: OpenAI-compatible endpoints and local models.
- [`requests`][eval.mt_bench.requests]: Requests to the judge, and their estimated cost.
- [`judge_budget`][eval.mt_bench.judge_budget]: `Budget`, the limit of the judge's cost.
- [`task`][eval.mt_bench.task]: `MTBenchSettings`, and the evaluation.
"""
