"""Tests the plots and the report of a run."""

import json

import numpy as np
import pytest

from peft_jax.training.report.page import write_report
from peft_jax.training.report.plots import _lambda_rows, draw_all, smooth


@pytest.fixture(scope="module", autouse=True)
def empty_pictures():
    """Draws the pictures, which these tests look at."""


def records(layers: int = 3, steps: int = 12, groups=("layers",)) -> list[dict]:
    """Returns records in which λ of group g, layer l at step s is (g + l + s) / 100."""
    made = [{"step": 0, "split": "held_out", "loss": 3.0, "targets": 10}]
    for step in range(1, steps + 1):
        weights = {
            name: [(at + layer + step) / 100 for layer in range(layers)]
            for at, name in enumerate(groups)
        }
        made.append(
            {
                "step": step,
                "split": "train",
                "loss": 3.0 - step / 10,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "grad_norm_by_layer": {"low_rank": [0.5] * layers, "rotation": [0.6] * layers},
                "lambda": weights,
            }
        )
    made.append({"step": steps, "split": "held_out", "loss": 1.9, "targets": 10})
    return made


def picture(path):
    import matplotlib.image

    return matplotlib.image.imread(path)


def test_lambda_has_a_row_for_every_layer_of_every_group():
    groups = ("layers.mlp.up_proj.kernel", "layers.mlp.down_proj.kernel")
    rows, labels, sizes = _lambda_rows([r for r in records(groups=groups) if r["split"] == "train"])
    assert rows.shape == (6, 12)
    np.testing.assert_allclose(rows[4], (1 + 1 + np.arange(1, 13)) / 100)
    assert labels == ["0", "1", "2"] * 2
    assert sizes == [("mlp.up_proj", 3), ("mlp.down_proj", 3)]


def test_map_is_red_for_low_rank_and_blue_for_rotation(tmp_path):
    """Reads the image back, with upper layers above one half and lower ones below."""
    made = records(layers=4)
    for record in made:
        if "lambda" in record:
            record["lambda"] = {"layers": [0.9, 0.9, 0.1, 0.1]}
    image = picture(draw_all(made, tmp_path)["lambda"])[..., :3]
    redder = image[..., 0] - image[..., 2]
    left = slice(image.shape[1] // 4, image.shape[1] // 2)
    red = np.flatnonzero((redder[:, left] > 0.3).mean(axis=1) > 0.9)
    blue = np.flatnonzero((redder[:, left] < -0.3).mean(axis=1) > 0.9)
    assert red.size > 50
    assert blue.size > 50
    assert red.max() < blue.min()


@pytest.mark.fast("1-126", "2-2")
@pytest.mark.parametrize("layers", [1, 2, 126])
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_and_many_layers_can_be_drawn(tmp_path, layers, steps):
    drawn = draw_all(records(layers=layers, steps=steps), tmp_path)
    assert set(drawn) == {"loss", "learning_rate", "gradients", "lambda"}
    for path in drawn.values():
        assert picture(path).std() > 0.01  # not an empty sheet


def test_clipping_is_drawn_where_a_step_was_clipped(tmp_path):
    made = records()
    train = [record for record in made if record["split"] == "train"]
    for record in train:
        record["clip_factor"] = {"low_rank": 1.0, "rotation": 0.5, "classifier": 1.0}
        record["clipped"] = {"low_rank": 0.0, "rotation": 1.0, "classifier": 0.0}
    assert picture(draw_all(made, tmp_path)["clipping"]).std() > 0.01
    for record in train:
        record["clipped"]["rotation"] = 0.0
    assert "clipping" not in draw_all(made, tmp_path)


def test_non_finite_values_are_not_drawn(tmp_path):
    made = records()
    made[5]["loss"] = made[5]["grad_norm"] = None
    made[5]["grad_norm_by_layer"]["low_rank"] = [None, 0.5, 0.5]
    assert len(draw_all(made, tmp_path)) == 4


def test_no_records_give_no_plots(tmp_path):
    assert draw_all([], tmp_path) == {}


def test_moving_average_keeps_a_line_and_ignores_missing_values():
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 5)[2:-2], line[2:-2])
    line[7] = np.nan
    np.testing.assert_allclose(smooth(line, 3)[7], 7.0)


def side(source, split, rows, left_out) -> dict:
    return {
        "source": source,
        "split": split,
        "rows_in_source": rows,
        "held_out": 0,
        "set_aside": 0,
        "rows": rows,
        "checked": rows,
        "used": rows - sum(left_out.values()),
        "left_out": left_out,
        "truncated": 3,
    }


def test_report_has_its_plots_and_numbers(tmp_path):
    summary = {
        "loss_before": 3.0,
        "loss_after": 1.9,
        "before": {"loss": 3.0, "targets": 10, "accuracy": 0.25},
        "after": {"loss": 1.9, "targets": 10, "accuracy": 0.75},
        "train_loss": 1.8,
        "trainable_parameters": 1234,
        "total_parameters": 56789,
        "trainable_percent": 2.17,
        "steps": 12,
        "data": {
            "train": side("data/a|b.jsonl", None, 1000, {"too long": 40, "empty": 10}),
            "held_out": side("data/dev.jsonl", "validation", 30, {"empty": 2}),
            "epochs": None,
            "passes": 2.34567,
            "passes_estimated": True,
        },
        "rows_per_step": 4,
        "tokens": 480,
        "tokens_per_second": 100.0,
        "seconds_per_step": 0.4,
        "seconds_to_first_step": 7.25,
        "flops_per_second": 3.2e12,
        "utilization": None,
        "seconds": {"train": 4.8},
        "peak_memory_bytes": {"host": 2**30, "device": None},
        "step_memory_bytes": 2**29,
        "method": "hybrid",
        "model": "/models/small",
        "recipe": "gsm8k",
        "devices": ["cpu 0"],
        "versions": {},
    }
    page = write_report(
        tmp_path, summary=summary, config={"seed": 3}, records=records(), table="a table"
    )
    text = page.read_text()
    for expected in (
        "small on gsm8k, with hybrid",
        "| accuracy | 0.25 | 0.75 |",
        "1,234",
        "1.00 GiB",
        "| operations per second | 3.2 T |",
        "| source | data/a\\|b.jsonl | data/dev.jsonl |",
        "| split |  | validation |",
        "| used | 950 | 28 |",
        "| left out: too long | 40 | 0 |",
        "| left out: empty | 10 | 2 |",
        "| truncated | 3 | 3 |",
        "The run makes about 2.35 passes over its rows.",
    ):
        assert expected in text
    assert "peak memory of a device" not in text
    assert "utilization" not in text
    assert json.loads(text.split("```json\n")[1].split("```")[0]) == {"seed": 3}
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.rsplit("(", 1)[1].rstrip(")")).is_file()
