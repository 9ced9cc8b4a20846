"""Evaluation: `peft-jax eval --workdir=RUN --tasks=glue,gsm8k`, or here `python -m eval`.

It is installed as `peft_jax.eval`, and needs the extra "eval": `pip install "peft_jax[eval]"`.

- [`command`][eval.command]: `python -m eval`.
- [`model`][eval.model]: `HarnessModel`, our models for the lm-evaluation-harness.
- [`tasks`][eval.tasks]: what can be evaluated, with data from the hub or from local files.
- [`humaneval`][eval.humaneval]: HumanEval, pass@k.
- [`sandbox`][eval.sandbox]: where generated code is run.
- [`study`][eval.study]: the study that compares the methods.
- [`mt_bench`][eval.mt_bench]: MT-Bench, with a judge.
"""
