"""Reports a run: metrics, a summary, plots and a page.

- [`metrics`][peft_jax.training.report.metrics]: JSON lines, TensorBoard, Weights & Biases.
- [`summary`][peft_jax.training.report.summary]: results, `summary.json`.
- [`plots`][peft_jax.training.report.plots]: plots of the metrics.
- [`page`][peft_jax.training.report.page]: the report, `report/README.md`.
"""
