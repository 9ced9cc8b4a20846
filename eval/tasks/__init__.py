"""Defines the tasks that can be evaluated.

- [`names`][eval.tasks.names]: `expand`, which resolves names to tasks.
- [`build`][eval.tasks.build]: `build_task`, which builds a task of the harness with its data.
- [`local_data`][eval.tasks.local_data]: Local files, with the columns of the hub's data sets.
- [`own`][eval.tasks.own]: Tasks that the harness does not have: STS-B, and FLORES by direction.
- [`trained_prompts`][eval.tasks.trained_prompts]: Tasks with the prompts of training.
- [`measures`][eval.tasks.measures]: Corpus metrics, with standard errors.
"""
