"""MT-Bench: 80 questions of two turns, each answer rated by a judge (arXiv 2306.05685).

- [`files`][eval.mt_bench.files]: FastChat's questions, prompts and reference answers.
- [`rating`][eval.mt_bench.rating]: the rating in a judge's words.
- [`judges`][eval.mt_bench.judges]: an endpoint that speaks OpenAI's protocol, or a local model.
- [`requests`][eval.mt_bench.requests]: what the judge is asked, and what it will cost.
- [`budget`][eval.mt_bench.budget]: `Budget`, what the judge has cost.
- [`task`][eval.mt_bench.task]: `MTBenchSettings`, and the evaluation.
"""
