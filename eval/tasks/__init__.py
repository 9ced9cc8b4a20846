"""What can be evaluated, by name.

- [`names`][eval.tasks.names]: `expand`, which tasks a name stands for.
- [`build`][eval.tasks.build]: `build_task`, a task of the harness, with its data.
- [`local_data`][eval.tasks.local_data]: a user's files in the columns of the hub's sets.
- [`own`][eval.tasks.own]: the tasks that the harness does not have: STS-B, and FLORES by direction.
- [`trained_prompts`][eval.tasks.trained_prompts]: tasks with the prompts that training uses.
- [`measures`][eval.tasks.measures]: measures over a whole set, with standard errors.
"""
