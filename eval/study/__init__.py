"""Compares methods on tasks under one protocol, and writes a page of the results.

An arm is a method with its settings. A cell is one run: an arm on a task, with a learning rate and
a seed.

- [`settings`][eval.study.settings]: `StudySettings`, the arms, tasks and seeds.
- [`bench`][eval.study.bench]: `Bench`, a task's model, data and programs, which all cells share.
- [`cell`][eval.study.cell]: `train_cell`, which trains and measures one cell.
- [`run`][eval.study.run]: `run_study`, which runs the missing cells, in any order.
- [`source`][eval.study.source]: Fingerprints of a task's model and data.
- [`statistics`][eval.study.statistics]: Significance of differences.
- [`page`][eval.study.page]: The page of the results.
"""
