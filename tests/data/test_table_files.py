"""Rows know their source files, in every format and after every selection."""

import gzip
import json

import datasets
import pytest

from peft_jax.data.recipes import get_recipe
from peft_jax.data.settings import DataSettings
from peft_jax.data.sources import open_sources

ROWS = [{"text": f"row {number}"} for number in range(8)]


def write(path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in ROWS))
    else:
        path.write_text(lines)


def sources(path, **changes):
    settings = DataSettings(recipe="text", path=str(path), **changes)
    return open_sources(settings, get_recipe("text").configured(settings))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet", "txt"])
def test_rows_of_a_file_know_the_file(tmp_path, ending):
    file = tmp_path / f"rows.{ending}"
    write(file)
    found = sources(file, hold_out=2, train_rows=4)
    assert found.train.files == found.held_out.files == (file,)


def test_rows_of_a_folder_know_the_files_of_their_split(tmp_path):
    names = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl")
    for name in (*names, "test.jsonl"):
        write(tmp_path / name)
    found = sources(tmp_path)
    assert found.train.files == (tmp_path / names[0], tmp_path / names[1])
    assert found.held_out.files == (tmp_path / names[2],)


def test_rows_of_a_saved_data_set_know_its_arrow_file(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = sources(tmp_path / "saved").train.files
    assert file.suffix == ".arrow"
    assert file.parent == tmp_path / "saved"
