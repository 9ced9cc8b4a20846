"""Compares methods on tasks under one protocol, and writes pages of the results.

An arm is a method with its settings. A trial is a learning rate and a scale of the attention. A
cell is one run: an arm on a task, with a trial and a seed.

- [`settings`][eval.study.settings]: `StudySettings`, the arms, tasks and seeds.
- [`trials`][eval.study.trials]: `Grid`, the search for the best trial.
- [`adapter_sizes`][eval.study.adapter_sizes]: Checks that arms have one size.
- [`bench`][eval.study.bench]: `Bench`, a task's model, data and programs, which all cells share.
- [`trial_optimizer`][eval.study.trial_optimizer]: Learning rates as a part of the state.
- [`measuring`][eval.study.measuring]: Losses and calibration of rows.
- [`cell`][eval.study.cell]: `train_cell`, which trains and measures one cell.
- [`facts`][eval.study.facts]: What a reader must know of a task's data and base model.
- [`run`][eval.study.run]: `run_study`, which runs the missing cells, in any order.
- [`store`][eval.study.store]: `Store`, the cells on disk.
- [`source`][eval.study.source]: Fingerprints of a task's model and data.
- [`statistics`][eval.study.statistics]: Differences, their intervals and tests.
- [`analysis`][eval.study.analysis]: Collects cells, and compares arms.
- [`convergence`][eval.study.convergence]: Steps to another arm's loss.
- [`page`][eval.study.page], [`claims`][eval.study.claims]: The pages of the results.
- [`recheck`][eval.study.recheck]: Recomputes the statistics with scipy.
"""
