"""Tests that invalid configurations are rejected before anything is loaded."""

import json
import shutil

import jax
import pytest

from peft_jax.training import RefusedError, run
from peft_jax.training.prepare import prepare


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data.path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data.recipe": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"method.target_modules": "qproj"}, "did you mean 'q_proj'"),
        ({"method.name": "lora_ga", "method.rank": 20}, "a rank of at most"),
        ({"method.name": "boft", "method.block_size": 7, "method.n_butterfly_factors": 1}, "7"),
        ({"train.batch_size": 10**9}, "activations take"),
        ({"train.batch_size": 3, "parallel.devices": 2}, "must be a multiple of 2"),
        ({"parallel.tensor": 3, "parallel.devices": 8}, "8 devices"),
        # Few rows that are packed are slow to count, for grain is slow to shuffle them.
        (
            {"train.steps": None, "train.epochs": 1e9, "data.packing": False},
            "train.epochs 1e+09 makes too many steps",
        ),
        ({"parallel.devices": 1000}, "devices is 1000"),
    ],
    ids=str,
)
def test_invalid_configuration_is_rejected(tiny, tmp_path, changes, message):
    with pytest.raises(RefusedError) as refused:
        run(tiny(**changes), tmp_path / "run")
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_missing_wandb_package_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(RefusedError, match="pip install wandb"):
        run(tiny(**{"logging.wandb_project": "mine"}), tmp_path / "run")


def test_tokenizer_of_another_model_is_rejected(tiny, tmp_path, checkpoint):
    """Tokens beyond the embedding would silently be read as other tokens."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"more{n}": len(vocabulary) + n for n in range(5)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RefusedError, match=r"the tokenizer .* rows"):
        run(tiny(**{"model.path": str(folder)}), tmp_path / "run")


def test_checkpoint_without_a_tokenizer_is_rejected(tiny, tmp_path, checkpoint):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(RefusedError, match="no tokenizer"):
        run(tiny(**{"model.path": str(folder)}), tmp_path / "run")


def test_workdir_that_is_a_file_is_rejected(tiny, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RefusedError, match="is a file"):
        run(tiny(), tmp_path / "run")


def test_abstract_arrays_have_the_real_shapes(tiny):
    """A checkpoint is restored with the abstract state and constants."""
    changes = {"method.name": "hybrid", "method.rank": 2, "method.block_size": 4}
    job = prepare(tiny(**changes, **{"parallel.devices": 4, "parallel.fsdp": 2}), say=print)
    params = job.model.init_params(jax.random.key(0))
    made = job.spec.abstract(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made.trainable) == jax.tree.map(
        lambda x: (x.shape, x.dtype), job.state.trainable
    )
    opt_state = jax.eval_shape(job.optimizer.init, made.trainable)
    assert jax.tree.structure(opt_state) == jax.tree.structure(job.state.opt_state)
    # A moment is cut as what it belongs to is, and on along the mesh's other axis.
    shardings = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(job.state.opt_state)
    }
    down = job.state.trainable["layers"]["self_attn"]["q_proj"]["kernel"]["low_rank"]["a"]
    assert "fsdp" in jax.tree.leaves(tuple(down.sharding.spec))
    moments = [
        spec for name, spec in shardings.items() if "q_proj" in name and name.endswith("['a']")
    ]
    assert moments
    assert set(moments) == {jax.P(None, ("fsdp", "data"), None)}


def test_rows_longer_than_the_context_give_a_warning(tiny):
    said = []
    prepare(tiny(**{"train.max_length": 128}), say=said.append)
    assert "up to 64 tokens" in said[0]
