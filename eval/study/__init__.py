"""The study: methods × tasks × seeds under one protocol, and the page that shows what came of it.

- [`settings`][eval.study.settings]: `StudySettings`, what is compared on what.
- [`bench`][eval.study.bench]: `Bench`, a task's model and data, shared by all cells.
- [`cell`][eval.study.cell]: `train_cell`, one method on one task with one rate and one seed.
- [`run`][eval.study.run]: `run_study`, all cells that are missing, in any order.
- [`source`][eval.study.source]: what a task's model and data are, wherever they lie.
- [`statistics`][eval.study.statistics]: significance of differences.
- [`page`][eval.study.page]: the result, readable in two minutes.
"""
