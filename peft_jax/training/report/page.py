"""Writes the report of a run: results, plots, data, cost and settings."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.data.bad_rows import one_line
from peft_jax.runtime.files import write_text
from peft_jax.training.report.metrics import Record
from peft_jax.training.report.plots import draw_all

_CAPTIONS = {
    "loss": "Loss of each training step (thin), its moving average, and the loss on held-out data.",
    "lambda": "λ of each layer over steps. Red: the layer's update comes from the low-rank branch; "
    "blue: from the rotation. Above: mean and range over layers. Right: mean over steps.",
    "gradients": "Gradient norm before clipping. For each branch: the median layer, and all layers "
    "as a band.",
    "clipping": "Factor that clipping multiplies gradients by, for each group that is clipped by "
    "itself. In parentheses: the share of all steps in which it is below 1.",
    "learning_rate": "Learning rate.",
}
_MEASURES = {
    "loss": "loss, mean over the targets",
    "token_accuracy": "share of tokens that are the likeliest",
    "accuracy": "accuracy",
    "matthews_correlation": "Matthews correlation",
    "f1": "F1",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "exact_match": "exact match",
}


def write_report(
    folder: Path,
    *,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    records: Sequence[Record],
    table: str,
) -> Path:
    """Writes the report and its plots.

    Args:
      folder: Folder of the report.
      summary: Summary of the run.
      config: Every setting of the run.
      records: Metrics of the run.
      table: Table of trainable parameters.

    Returns:
      File of the report.
    """
    pictures = draw_all(records, folder)
    page = folder / "README.md"
    write_text(page, "\n\n".join(_sections(summary, config, pictures, table)) + "\n")
    return page


def _sections(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    pictures: Mapping[str, Path],
    table: str,
) -> Iterable[str]:
    model = Path(str(summary["model"])).name
    yield f"# {model} on {summary['recipe']}, with {summary['method']}"
    yield _results(summary)
    for name, caption in _CAPTIONS.items():
        if name in pictures:
            yield f"![{caption}]({pictures[name].name})\n\n{caption}"
    yield "## Data"
    yield _data(summary["data"])
    yield "## Cost"
    yield _costs(summary)
    yield "## Trainable parameters"
    yield f"```\n{table}\n```"
    yield "## Usage"
    yield _usage(summary)
    yield "## Settings"
    yield f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```"


def _results(summary: Mapping[str, Any]) -> str:
    """Returns a table of held-out metrics before and after training."""
    before, after = summary["before"], summary["after"]
    if not after:
        return "There were no held-out rows, so only the training loss was measured."
    rows = [("held-out data", "before", "after")]
    for name, value in after.items():
        if name != "targets":
            rows.append((_MEASURES.get(name, name), _number(before.get(name)), _number(value)))
    return _table(rows) + f"\n\nMeasured on {after['targets']:,} held-out targets."


def _data(data: Mapping[str, Any]) -> str:
    """Returns a table of rows used, and of rows left out by reason."""
    rows: list[tuple[str, ...]] = [("", "training", "held out")]
    sides = (data["train"], data["held_out"])
    names = {
        "source": "source",
        "split": "split",
        "rows_in_source": "rows in the source",
        "held_out": "held out",
        "set_aside": "excluded by data.train_rows or data.eval_rows",
        "rows": "rows of this run",
        "checked": "encoded so far",
        "used": "used",
    }
    rows += [(name, *(_cell(side[key]) for side in sides)) for key, name in names.items()]
    reasons = dict.fromkeys(reason for side in sides for reason in side["left_out"])
    for reason in reasons:
        counts = (_cell(side["left_out"].get(reason, 0)) for side in sides)
        rows.append((f"left out: {reason}", *counts))
    rows.append(("truncated", *(_cell(side["truncated"]) for side in sides)))
    if data["passes"] is None:
        return _table(rows)
    about = "about " if data["passes_estimated"] else ""
    return f"{_table(rows)}\n\nThe run makes {about}{data['passes']:.3g} passes over its rows."


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    # A file name may contain the separator of cells.
    return "" if value is None else one_line(str(value)).replace("|", "\\|")


def _costs(summary: Mapping[str, Any]) -> str:
    peak = summary["peak_memory_bytes"]
    rows = [
        ("", ""),
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        (
            "of all parameters",
            f"{summary['total_parameters']:,} ({summary['trainable_percent']:.3g}%)",
        ),
        ("steps", f"{summary['steps']:,} of {summary['rows_per_step']:,} rows"),
        ("steps with clipped gradients", _shares(summary.get("clipped"))),
        ("tokens", f"{summary['tokens']:,}"),
        ("tokens per second", _number(summary["tokens_per_second"])),
        ("seconds per step", _number(summary["seconds_per_step"])),
        ("seconds to the first step", _number(summary["seconds_to_first_step"])),
        ("operations per second", _tera(summary["flops_per_second"])),
        ("utilization", _percent(summary["utilization"])),
        ("peak memory of the host", _gib(peak["host"])),
        ("peak memory of a device", _gib(peak["device"])),
        ("memory of the compiled step", _gib(summary["step_memory_bytes"])),
        ("devices", f"{len(summary['devices'])}, the first {summary['devices'][0]}"),
    ]
    rows += [(f"seconds: {phase}", _number(s)) for phase, s in summary["seconds"].items()]
    return _table([row for row in rows if row[1] is not None])


def _tera(rate: float | None) -> str | None:
    return None if rate is None else f"{rate / 1e12:.3g} T"


def _shares(shares: Mapping[str, float] | None) -> str | None:
    """Returns shares by group as text.

    Example:
      >>> _shares({"low_rank": 0.25, "rotation": 0.0}), _shares({"all": 0.5}), _shares({})
      ('low_rank 25.0%, rotation 0.0%', '50.0%', None)
    """
    if not shares:
        return None
    if len(shares) == 1:
        return _percent(next(iter(shares.values())))
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _usage(summary: Mapping[str, Any]) -> str:
    """Returns how to load the exported model and adapter."""
    names = summary.get("exported") or ["adapter"]
    parts = []
    if "model" in names:
        loader = "load_model" if summary.get("labels") is None else "load_classifier"
        auto = (
            "AutoModelForCausalLM"
            if summary.get("labels") is None
            else "AutoModelForSequenceClassification"
        )
        parts.append(
            "`model/` has the full model in Hugging Face format, in"
            f" {summary.get('model_dtype', 'the dtype of the base')}. Load it as any other model:"
            "\n\n"
            "```python\n"
            f"from peft_jax.hub import {loader}\n\n"
            f'model, params = {loader}("model")   # or transformers\' {auto}.from_pretrained\n'
            "```"
        )
    if "adapter" in names:
        parts.append(
            "`adapter/` has the trained arrays as safetensors and their settings as JSON:\n\n"
            "```python\n"
            f"{_loading(summary)}"
            'spec, adapter = load_adapter("adapter", model, params)\n'
            "params = spec.bind(params, adapter)   # or spec.merge(params, adapter): plain arrays\n"
            "```"
        )
    return "\n\n".join(parts)


def _loading(summary: Mapping[str, Any]) -> str:
    """Returns the code that loads the base model, quantized as in training."""
    labels = summary.get("labels")
    if labels is None:
        quantization = summary.get("quantization", "none")
        held = "" if quantization == "none" else f', quantization="{quantization}"'
        return (
            "from peft_jax.hub import load_adapter, load_model\n\n"
            f'model, params = load_model("{summary["model"]}"{held})\n'
        )
    return (
        "import jax\n\n"
        "from peft_jax.hub import load_adapter, load_classifier\n\n"
        "# The adapter's head replaces the one that the key initializes.\n"
        f'model, params = load_classifier("{summary["model"]}", num_labels={labels},\n'
        "                                head_key=jax.random.key(0))\n"
    )


def _table(rows: Sequence[Sequence[str | None]]) -> str:
    """Returns rows as a Markdown table; the first row is the header."""
    lines = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "| --- " + "| ---: " * (len(rows[0]) - 1) + "|", *lines[1:]])


def _number(value: Any) -> str:
    """Returns a number with five digits.

    Example:
      >>> _number(3.0712345), _number(12345.678), _number(None)
      ('3.0712', '12,346', 'not measured')
    """
    if value is None:
        return "not measured"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.2f} GiB"
