"""Tests that checkpoints are restored bit for bit, and damaged ones are not."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.runtime.errors import StorageError
from peft_jax.training import checkpoints as checkpoints_module
from peft_jax.training.checkpoints import Checkpoints


def _arrays(seed: int):
    key = jax.random.key(seed)
    trainable = {
        "layers": {"q": {"a": jax.random.normal(key, (2, 8, 3)), "b": jnp.zeros((2, 3, 8))}},
        "head": jax.random.normal(key, (5,), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(trainable)
    return {
        "trainable": trainable,
        "constant": {},
        "optimizer": optimizer,
        "step": jnp.asarray(seed, jnp.int32),
    }


def _abstract(arrays):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays
    )


def _same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _write(folder, steps=(10, 20, 30), **settings):
    with Checkpoints(folder, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, _arrays(step), {"step": step, "data": {"row": step * 2}})


@pytest.fixture
def said():
    return []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_checkpoint_is_restored_bit_for_bit(tmp_path, said, asynchronous):
    _write(tmp_path / "checkpoints", asynchronous=asynchronous)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.newest(say=said.append) == 30
        assert checkpoints.read_run(30) == {"step": 30, "data": {"row": 60}}
        _same(checkpoints.read_arrays(30, _abstract(_arrays(0))), _arrays(30))
    assert not said


def test_buffers_may_be_donated_once_save_returns(tmp_path, said):
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jnp.arange(1024.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": x}, {})
        for _ in range(20):
            x = add(x)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.read_arrays(0, _abstract({"x": x}))["x"]
    np.testing.assert_array_equal(np.asarray(restored), np.arange(1024.0, dtype=np.float32))


def test_newest_checkpoints_are_kept(tmp_path):
    _write(tmp_path, steps=(1, 2, 3, 4, 5), keep=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]


def test_keep_below_two_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="keep is 1"):
        Checkpoints(tmp_path, keep=1)


def test_no_checkpoint_is_found_in_an_empty_folder(tmp_path, said):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.newest(say=said.append) is None
    assert not said


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(folder):
    path = _largest(folder / "arrays")
    path.write_bytes(path.read_bytes()[:-1])


def _flip_one_bit(folder):
    path = _largest(folder / "arrays")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _delete_a_file(folder):
    _largest(folder / "arrays").unlink()


def _empty_the_manifest(folder):
    (folder / "manifest.json").write_text("")


def _a_manifest_of_nothing(folder):
    (folder / "manifest.json").write_text("{}")


def _a_manifest_without_a_file(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["arrays/_METADATA"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _delete_the_manifest(folder):
    (folder / "manifest.json").unlink()


def _nonsense_manifest(folder):
    (folder / "manifest.json").write_text(json.dumps({"arrays/x": 3}))


def _damage_the_run(folder):
    path = folder / "run" / "metadata"
    path.write_text(path.read_text().replace("30", "31"))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip_one_bit,
        _delete_a_file,
        _empty_the_manifest,
        _a_manifest_of_nothing,
        _a_manifest_without_a_file,
        _delete_the_manifest,
        _nonsense_manifest,
        _damage_the_run,
    ],
)
def test_damaged_checkpoint_is_renamed_and_the_previous_one_used(tmp_path, said, damage):
    _write(tmp_path)
    damage(tmp_path / "30")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 20
        _same(checkpoints.read_arrays(20, _abstract(_arrays(0))), _arrays(20))
        assert (tmp_path / "damaged-30").is_dir()
        # A checkpoint of the same step can be written again.
        checkpoints.save(30, _arrays(31), {})
        checkpoints.wait()
        assert checkpoints.newest(say=said.append) == 30
        _same(checkpoints.read_arrays(30, _abstract(_arrays(0))), _arrays(31))
    assert len(said) == 1
    assert "30" in said[0]
    assert "damaged" in said[0]


def test_no_checkpoint_is_found_if_all_are_damaged(tmp_path, said):
    _write(tmp_path)
    for step in (10, 20, 30):
        _truncate(tmp_path / str(step))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) is None
    assert len(said) == 3


def test_incomplete_checkpoints_are_not_used(tmp_path, said):
    _write(tmp_path)
    # Simulates processes killed before the rename and while deleting.
    shutil.copytree(tmp_path / "30", tmp_path / "40.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "30", tmp_path / "50")
    (tmp_path / "50" / "manifest.json").unlink()
    (tmp_path / "10").rename(tmp_path / "deleting-10")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 30
        checkpoints.save(40, _arrays(40), {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 40
    assert len(said) == 3
    # A checkpoint without a manifest may be complete, so it is not deleted.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30", "40", "damaged-50"]


# Orbax leaves files open on errors, which this test does not concern.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_structure_or_shapes_are_rejected(tmp_path):
    _write(tmp_path)
    wider = _arrays(0)
    wider["trainable"]["head"] = jnp.zeros((6,), jnp.bfloat16)
    more = _arrays(0)
    more["trainable"]["tail"] = jnp.zeros((6,))
    with Checkpoints(tmp_path) as checkpoints:
        for other in (wider, more):
            with pytest.raises(ValueError, match="30 "):
                checkpoints.read_arrays(30, _abstract(other))


def test_checkpoint_is_restored_with_another_sharding(tmp_path):
    _write(tmp_path)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.NamedSharding(mesh, jax.P("data"))
    abstract = _abstract(_arrays(0))
    abstract["trainable"]["layers"]["q"]["a"] = jax.ShapeDtypeStruct(
        (2, 8, 3), jnp.float32, sharding=rows
    )
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.read_arrays(30, abstract)
    assert restored["trainable"]["layers"]["q"]["a"].sharding == rows
    _same(restored, _arrays(30))


@pytest.mark.parametrize("content", [None, "", "{"])
def test_files_outside_the_manifest_are_not_needed(tmp_path, said, content):
    _write(tmp_path)
    path = tmp_path / "30" / "_CHECKPOINT_METADATA"
    path.unlink() if content is None else path.write_text(content)
    for extra in (tmp_path / "30").rglob("commit_success.txt"):
        extra.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 30
        assert checkpoints.read_run(30)["step"] == 30
        _same(checkpoints.read_arrays(30, _abstract(_arrays(0))), _arrays(30))
    assert not said


@pytest.mark.parametrize(
    "name",
    [
        "lr[1e-3]",
        "{a,b}",
        "*",
        "a?[!b",
        "a b",
        "-dash",
        "größe",
        "back\\slash",
        "a%20b",
        "#1",
        "~x",
    ],
)
def test_folder_name_may_have_pattern_characters(tmp_path, said, name):
    folder = tmp_path / name / "checkpoints"
    _write(folder, steps=(10,))
    assert [path.name for path in folder.iterdir()] == ["10"]
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest(say=said.append) == 10
        assert checkpoints.read_run(10)["step"] == 10
        _same(checkpoints.read_arrays(10, _abstract(_arrays(0))), _arrays(10))
    assert not said


def test_unreadable_checkpoint_gets_no_manifest(tmp_path, said, monkeypatch):
    """Orbax does not find the arrays it wrote into a folder whose name is a pattern."""
    monkeypatch.setattr(checkpoints_module, "_plain_path", contextlib.nullcontext)
    folder = tmp_path / "lr[1e-3]"
    with pytest.raises(StorageError, match="10 cannot be read back"):
        _write(folder, steps=(10,))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest(say=said.append) is None


def test_name_of_a_renamed_checkpoint_is_restored(tmp_path, said):
    _write(tmp_path)
    (tmp_path / "30").rename(tmp_path / "best")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 30
        _same(checkpoints.read_arrays(30, _abstract(_arrays(0))), _arrays(30))
    assert len(said) == 1
    assert "best " in said[0]
    assert "step 30" in said[0]


def test_step_is_read_from_the_checkpoint_and_not_its_name(tmp_path, said):
    _write(tmp_path)
    (tmp_path / "10").rename(tmp_path / "400")
    shutil.copytree(tmp_path / "20", tmp_path / "50")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 30
        assert checkpoints.steps() == [10, 20, 30]
    assert len(said) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20", "30", "damaged-50"]


def test_copy_of_a_checkpoint_is_not_changed(tmp_path, said):
    _write(tmp_path)
    for name in ("30.bak", "keep"):
        shutil.copytree(tmp_path / "30", tmp_path / name)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 30
    assert not said
    assert {"30.bak", "keep"} < {p.name for p in tmp_path.iterdir()}


@pytest.fixture
def small_files():
    """Limits files of this process to 200,000 bytes, as `ulimit -f` does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_failing_write_is_reported_in_one_line(tmp_path, said, capfd, asynchronous):
    large = {"x": jax.random.normal(jax.random.key(0), (300_000,))}
    _write(tmp_path, steps=(1,))
    reason = f"checkpoint {tmp_path / '2'} could not be written: {os.strerror(errno.EFBIG)}"
    with Checkpoints(tmp_path, asynchronous=asynchronous) as checkpoints:

        def save():
            checkpoints.save(2, large, {"step": 2})
            checkpoints.wait()

        with pytest.raises(StorageError, match=f"^{re.escape(reason)}$"):
            save()
    assert "Traceback" not in capfd.readouterr().err
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(say=said.append) == 1
