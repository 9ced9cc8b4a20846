"""Evaluates models: `peft-jax eval --workdir=RUN --tasks=glue,gsm8k`.

`python -m eval` does the same in a checkout. The package is installed as `peft_jax.eval`. It needs
the extra "eval": `pip install "peft_jax[eval]"`.

- [`command`][eval.command]: The command line.
- [`model`][eval.model]: `HarnessModel`, our models for lm-evaluation-harness.
- [`tasks`][eval.tasks]: Tasks, with data from the hub or from local files.
- [`humaneval`][eval.humaneval]: HumanEval, pass@k.
- [`sandbox`][eval.sandbox]: The sandbox that runs generated code.
- [`study`][eval.study]: The study that compares the methods.
- [`mt_bench`][eval.mt_bench]: MT-Bench, with a judge.
"""
