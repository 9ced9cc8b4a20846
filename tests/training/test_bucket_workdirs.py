"""Tests runs whose work directory is in a bucket, against a stand-in server."""

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from stand_in_bucket import BUCKET, serve

from peft_jax.runtime import bucket_lock, buckets
from peft_jax.runtime.bucket_lock import OWNER, lock_bucket
from peft_jax.runtime.buckets import Bucket
from peft_jax.runtime.errors import RefusedError, StorageError
from peft_jax.runtime.progress import Reporter
from peft_jax.training import run
from peft_jax.training.bucket_workdir import keep_copy
from peft_jax.training.report.metrics import read_records
from peft_jax.training.workdir import WorkDir

CONSTANT = {"optimizer.schedule.name": "constant", "checkpoint.keep": 2}
RUN = f"{BUCKET}/runs/first"


@pytest.fixture(scope="module")
def server():
    with serve() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def ended(tiny, server, tmp_path_factory):
    """Returns the objects, the writes and the messages of a run of four steps."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        see(server, patch, tmp_path_factory.mktemp("first host"))
        run(
            tiny(**CONSTANT, **{"train.steps": 4}),
            f"gs://{RUN}",
            reporter=Reporter(console=Console(file=said)),
        )
    writes = [(name, text) for name, text in server.log if not name.endswith(OWNER)]
    assert OWNER not in {name.rpartition("/")[2] for name in server.objects}
    return SimpleNamespace(objects=dict(server.objects), writes=writes, text=said.getvalue())


def quiet():
    return Reporter(console=Console(quiet=True))


def see(server, monkeypatch, cache):
    """Shows the bucket to this process, as a host with that folder of staged files."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PEFT_JAX_CACHE", str(cache))


@pytest.fixture
def bucket(server, ended, monkeypatch, tmp_path):
    """Returns the bucket after the run of four steps, as another host sees it."""
    see(server, monkeypatch, tmp_path / "cache")
    server.objects = dict(ended.objects)
    yield server
    server.denied = ()


def records(text: bytes) -> list[dict]:
    """Returns what does not depend on the clock, of the records of training."""
    found = [json.loads(line) for line in text.splitlines()]
    return [
        {name: value for name, value in record.items() if name != "timing"}
        for record in found
        if record["split"] == "train"
    ]


def test_another_host_resumes_with_the_same_result(tiny, ended, bucket, tmp_path, listener):
    """Through another protocol, too: both lead to the same objects."""
    run(tiny(**CONSTANT), f"s3://{RUN}", reporter=listener)
    assert "resuming from step 4 of 6" in listener.text
    whole = tmp_path / "whole"
    run(tiny(**CONSTANT), whole, reporter=quiet())
    files = {name.removeprefix("runs/first/"): text for name, text in bucket.objects.items()}
    for name in ("adapter/adapter_model.safetensors", "config.json", "inputs.json"):
        assert files[name] == (whole / name).read_bytes(), name
    assert records(files["metrics.jsonl"]) == records((whole / "metrics.jsonl").read_bytes())
    assert json.loads(files["summary.json"])["steps"] == 6
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"4", "6"}
    assert OWNER not in files
    for url, text in (("gs", ended.text), ("s3", listener.text)):
        assert f"{url}://{RUN}/report/README.md" in text
        assert "workdirs" not in text


def test_checkpoints_have_the_same_form_on_disk(tiny, bucket, tmp_path):
    """What is copied by hand from the bucket is restored on disk, and the other way round."""
    for name, content in bucket.objects.items():
        file = tmp_path / "copy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    settings = tiny(**CONSTANT).checkpoint
    folder = WorkDir.at(tmp_path / "copy" / "runs" / "first")
    with (
        keep_copy(folder, say=pytest.fail) as copy,
        copy.checkpoints(settings) as checkpoints,
    ):
        assert checkpoints.newest(say=pytest.fail) == 4
        arrays = {"weights": jnp.arange(6.0)}
        checkpoints.save(5, arrays, {"step": 5})
        checkpoints.wait()
    bucket.objects.clear()
    for file in folder.path.rglob("*"):
        if file.is_file():
            bucket.objects[f"runs/second/{file.relative_to(folder.path)}"] = file.read_bytes()
    with (
        keep_copy(WorkDir.at(f"s3://{BUCKET}/runs/second"), say=pytest.fail) as copy,
        copy.checkpoints(settings) as checkpoints,
    ):
        assert checkpoints.newest(say=pytest.fail) == 5
        weights = arrays["weights"]
        shape = jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=weights.sharding)
        restored = checkpoints.read_arrays(5, {"weights": shape})
        np.testing.assert_array_equal(restored["weights"], weights)


def test_finished_run_is_known_on_every_host(tiny, bucket, listener):
    summary = run(tiny(**CONSTANT, **{"train.steps": 4}), f"gs://{RUN}/", reporter=listener)
    assert listener.text == f"this run is finished; see gs://{RUN}/report/README.md"
    assert summary["steps"] == 4


@pytest.mark.slow
def test_every_moment_of_a_run_leaves_a_bucket_to_resume_from(
    tiny, ended, bucket, monkeypatch, tmp_path
):
    """A run killed after any of its writes is looked at by another host."""
    config = tiny(**CONSTANT, **{"train.steps": 4})
    bucket.objects.clear()
    newest = 0
    for number, (name, text) in enumerate(ended.writes):
        if text is None:
            bucket.objects.pop(name, None)
        else:
            bucket.objects[name] = text
        if "/arrays/" in name and number % 6:
            continue  # None of these can be told from the others.
        before = dict(bucket.objects)
        see(bucket, monkeypatch, tmp_path / f"host {number}")
        folder = WorkDir.at(f"gs://{RUN}")
        with keep_copy(folder, say=pytest.fail) as copy:
            assert folder.check(config) == []
            if folder.summary.is_file():
                assert folder.lost_results(adapter=True, model=False) == []
            with copy.checkpoints(config.checkpoint) as checkpoints:
                step = checkpoints.newest(say=lambda message: None)
                if step is not None:
                    kept = read_records(folder.metrics)
                    assert checkpoints.read_run(step)["records"] <= len(kept)
        assert (step or 0) >= newest
        newest = step or 0
        bucket.objects = before
    assert newest == 4


def test_damaged_checkpoint_is_not_used(tiny, bucket):
    said: list[str] = []
    damaged = next(name for name in bucket.objects if "/checkpoints/4/arrays/" in name)
    bucket.objects[damaged] += b"x"
    bucket.objects["runs/first/checkpoints/6/run/metadata"] = b"{}"
    settings = tiny(**CONSTANT).checkpoint
    with (
        keep_copy(WorkDir.at(f"gs://{RUN}"), say=pytest.fail) as copy,
        copy.checkpoints(settings) as checkpoints,
    ):
        for _ in range(2):
            assert checkpoints.newest(say=said.append) == 2
    assert said[0] == f"removed the incomplete checkpoint gs://{RUN}/checkpoints/6"
    assert said[1].startswith(f"checkpoint gs://{RUN}/checkpoints/4 is damaged (")
    assert len(said) == 2
    assert damaged in bucket.objects


def test_checkpoints_of_this_host_are_not_fetched_again(tiny, bucket, monkeypatch):
    fetched: list[str] = []
    download = Bucket.download
    monkeypatch.setattr(
        Bucket, "download", lambda self, files: fetched.extend(files) or download(self, files)
    )
    settings = tiny(**CONSTANT).checkpoint
    with (
        keep_copy(WorkDir.at(f"gs://{RUN}"), say=pytest.fail) as copy,
        copy.checkpoints(settings) as checkpoints,
    ):
        assert checkpoints.newest(say=pytest.fail) == 4
        assert any(name.startswith("checkpoints/4/") for name in fetched)
        fetched.clear()
        assert checkpoints.newest(say=pytest.fail) == 4
        assert not fetched
        (checkpoints.path(4) / "run" / "metadata").write_text("{}")
        assert checkpoints.newest(say=pytest.fail) == 4
        assert any(name.startswith("checkpoints/4/") for name in fetched)


def wait_until(happens) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(bucket_lock, "PATIENCE_SECONDS", 0.6)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_one_run_at_a_time(bucket, impatient, tmp_path, scheme):
    """In a folder whose name would be another one if it were read as a pattern or a URL."""
    said = []
    folder = Bucket(f"{scheme}://{BUCKET}/runs/lr[1e-3]* 50%25?é")
    here, there = tmp_path / "here", tmp_path / "there"
    with lock_bucket(folder, here, say=said.append) as lock:
        with (
            pytest.raises(RefusedError, match=r"another run, process \d+ on"),
            lock_bucket(folder, there, say=said.append),
        ):
            pass
        with (
            pytest.raises(RefusedError, match="another run on this machine"),
            lock_bucket(folder, here, say=pytest.fail),
        ):
            pass
        lock.check()
        assert "runs/lr[1e-3]* 50%25?é/owner.json" in bucket.objects
    assert folder.read(OWNER) is None
    assert len(said) == 1


def test_dead_owner_is_replaced(bucket, impatient, tmp_path):
    said = []
    folder = Bucket(f"gs://{RUN}")
    with lock_bucket(folder, tmp_path / "here", say=pytest.fail):
        left = folder.read(OWNER)
    folder.write(OWNER, left)
    with lock_bucket(folder, tmp_path / "here", say=pytest.fail):
        pass  # The lock file shows that it died.
    folder.write(OWNER, left)
    with lock_bucket(folder, tmp_path / "there", say=said.append):
        assert "which did not give it back" in said[0]


def test_run_whose_folder_was_taken_ends(tiny, bucket, impatient):
    """The next checkpoint is not written over the other run's."""
    folder = WorkDir.at(f"gs://{RUN}")
    with keep_copy(folder, say=pytest.fail) as copy:
        Bucket(folder.url).write(OWNER, b'{"token": "another"}')
        wait_until(lambda: copy.lock.is_lost)
        with pytest.raises(StorageError, match=f"another run has taken gs://{RUN}"):
            copy.finish()
    assert Bucket(folder.url).read(OWNER) == b'{"token": "another"}'


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    ("denied", "message"),
    [
        (("GET",), "cannot be reached: PERMISSION_DENIED"),
        (("POST", "PUT"), "could not be written: PERMISSION_DENIED"),
    ],
    ids=["reading", "writing"],
)
def test_denied_bucket_is_rejected(tiny, bucket, scheme, denied, message):
    bucket.denied = denied
    with pytest.raises(RefusedError) as error:
        run(tiny(), f"{scheme}://{RUN}")
    assert message in str(error.value)
    assert f"{scheme}://{RUN}" in str(error.value)
    assert "\n" not in str(error.value)


def test_unreachable_bucket_is_rejected(tiny, bucket, monkeypatch):
    assert buckets.CONTACT_SECONDS < 20
    monkeypatch.setattr(buckets, "CONTACT_SECONDS", 0.2)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://localhost:1")
    with pytest.raises(RefusedError, match=r"cannot be reached: no response within"):
        run(tiny(), f"gs://{RUN}")


@pytest.mark.parametrize("url", ["http://localhost:1/a", "hf://a/b", "gs://not a bucket/a", "gs:/"])
def test_other_urls_are_rejected(url):
    with pytest.raises(RefusedError, match="give gs://bucket/folder"):
        WorkDir.at(url)


def test_path_that_was_a_url_is_one():
    """Path takes one of the slashes."""
    assert WorkDir.at(Path(f"gs://{RUN}")) == WorkDir.at(f"gs://{RUN}/")
    assert WorkDir.at(f"gs://{RUN}").path != WorkDir.at(f"s3://{RUN}").path


def test_bucket_that_fails_ends_the_run_with_its_last_checkpoint(tiny, bucket, monkeypatch):
    upload = Bucket.upload

    def deny_one(self, files, **options):
        bucket.denied = ("POST",) if any("checkpoints/6" in name for name in files) else ()
        upload(self, files, **options)

    monkeypatch.setattr(Bucket, "upload", deny_one)
    with pytest.raises(StorageError) as error:
        run(tiny(**CONSTANT), f"gs://{RUN}", reporter=quiet())
    assert "PERMISSION_DENIED" in str(error.value)
    assert f"the last checkpoint is gs://{RUN}/checkpoints/4" in str(error.value)
    assert "runs/first/checkpoints/4/manifest.json" in bucket.objects
    assert "runs/first/summary.json" not in bucket.objects
