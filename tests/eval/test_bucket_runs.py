"""Tests evaluations of runs whose work directory is in a bucket, against a stand-in server."""

import contextlib
import json

import jax
import pytest
from stand_in_bucket import BUCKET, serve

from eval.bucket_runs import open_run
from eval.loading import find_model
from eval.settings import EvalSettings
from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.commands import export
from peft_jax.hub import find_folder, load_model, save_adapter
from peft_jax.runtime.errors import StorageError

RUN = f"{BUCKET}/runs/first"


@pytest.fixture
def bucket(checkpoint, tmp_path, monkeypatch):
    """Yields a bucket with a finished run."""
    model, params = load_model(checkpoint)
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj",))
    state = spec.init(jax.random.key(0), params)
    save_adapter(tmp_path / "adapter", model, spec, state, str(checkpoint), quantization="none")
    with serve() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        for file in (tmp_path / "adapter").iterdir():
            stand_in.objects[f"runs/first/adapter/{file.name}"] = file.read_bytes()
        config = {"data": {"split_special_tokens": False}}
        stand_in.objects["runs/first/config.json"] = json.dumps(config).encode()
        yield stand_in


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Returns a function that makes this process one of a host with a disk of its own."""
    return lambda name: monkeypatch.setenv("PEFT_JAX_CACHE", str(tmp_path / name))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_results_are_in_the_bucket_and_continue_on_another_host(bucket, host, scheme):
    url = f"{scheme}://{RUN}"
    identities = []
    for name in ("first host", "other host"):
        host(name)
        with open_run(f"{url}/") as run:
            settings = EvalSettings(tasks=("rte",), workdir=run.folder, url=run.url)
            identities.append(find_model(settings).identity())
            results = settings.output_folder / "results.json"
            assert results.is_file() == (name == "other host")
            results.write_text(name)
            assert run.shown(results) == f"{url}/eval/results.json"
        assert bucket.objects["runs/first/eval/results.json"].decode() == name
    assert identities[0] == identities[1]
    assert identities[0]["adapter"] == f"{url}/adapter"


def test_results_that_could_not_be_copied_are_kept(bucket, host):
    host("host")
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(open_run(f"gs://{RUN}"))
        (run.folder / "eval" / "results.json").write_text("new")
        bucket.denied = ("POST",)
        with pytest.raises(StorageError, match="could not be written"):
            stack.close()
    bucket.denied = ()
    bucket.objects["runs/first/eval/results.json"] = b"old"
    with open_run(f"gs://{RUN}") as run:
        assert (run.folder / "eval" / "results.json").read_text() == "new"
    assert bucket.objects["runs/first/eval/results.json"] == b"new"


def test_whole_model_must_be_copied_first(bucket, host):
    host("host")
    for name in list(bucket.objects):
        if "/adapter/" in name:
            del bucket.objects[name]
    with open_run(f"gs://{RUN}") as run:
        unfinished = EvalSettings(tasks=("rte",), workdir=run.folder, url=run.url)
        with pytest.raises(ValueError, match=f"gs://{RUN} has neither adapter/ nor model/"):
            _ = unfinished.source
    bucket.objects["runs/first/model/config.json"] = b"{}"
    with open_run(f"gs://{RUN}") as run:
        settings = EvalSettings(tasks=("rte",), workdir=run.folder, url=run.url)
        with pytest.raises(ValueError, match=f"gcloud storage cp -r gs://{RUN}/model"):
            _ = settings.source


def test_adapter_in_a_bucket_is_found(bucket, host, tmp_path, capsys):
    host("host")
    folder = find_folder(f"s3://{RUN}/adapter")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()
    }
    with pytest.raises(ValueError, match=f"its adapter is gs://{RUN}/adapter"):
        find_folder(f"gs://{RUN}")
    out = tmp_path / "out"
    assert export.main([f"--workdir=gs://{RUN}", "--format=peft", f"--output={out}"]) == 0
    assert (out / "adapter_model.safetensors").is_file()
