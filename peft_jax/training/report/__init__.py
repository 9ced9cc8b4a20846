"""What a run leaves behind for its reader: metrics, a summary, plots and a page.

- [`metrics`][peft_jax.training.report.metrics]: lines of JSON, TensorBoard, Weights & Biases.
- [`summary`][peft_jax.training.report.summary]: the result in numbers, `summary.json`.
- [`plots`][peft_jax.training.report.plots]: pictures, drawn from the metrics.
- [`page`][peft_jax.training.report.page]: `report.md`.
"""
