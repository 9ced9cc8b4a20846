"""Quantizing while loading gives the same kernels as quantizing afterwards, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core import flatten, is_quantized_leaf
from peft_jax.hub import leaf_loading, load_model, save_model
from peft_jax.hub import tensors as tensors_module
from peft_jax.hub.load import open_sources
from peft_jax.models import build_model, quantize_params
from peft_jax.parallel import MeshSettings, make_mesh, sharding_tree

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the folder of a checkpoint, and its parameters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_model(CONFIG)
    params = model.init_params(jax.random.key(0))
    save_model(folder, model, params)
    return folder, params


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.fast("int8-float32", "nf4-bfloat16", "w8a8-bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "w8a8"])
def test_loading_quantizes_only_the_kernels_of_blocks(saved, quantization, dtype):
    folder, params = saved
    model, loaded = load_model(folder, dtype=dtype, quantization=quantization)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    assert_same(loaded, quantize_params(cast, quantization))
    abstract = model.abstract_params(dtype, quantization)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    for path, leaf in flatten(loaded).items():
        assert isinstance(leaf, jax.Array) != is_quantized_leaf(path)


@pytest.mark.fast("*nf4")
# 192 and 320 rows are 3 and 5 tiles. Shards in 2, 4 and 8 end inside tiles, and the scales are
# replicated.
# One scale of "w8a8" is for all rows.
@pytest.mark.parametrize("quantization", ["nf4", "w8a8"])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        {"fsdp": 2, "tensor": 2, "devices": 4},  # each device compiles its own quantization
        pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param({"tensor": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sharded_loading_gives_the_same_values(saved, mesh, quantization, monkeypatch):
    monkeypatch.setattr(leaf_loading, "_PIECE", 64 * 40 * 4)  # A few tiles at a time.
    folder, params = saved

    def shardings(model):
        return sharding_tree(
            model.logical_axes(quantization),
            make_mesh(MeshSettings(**{"data": 1} | mesh)),
            shapes=model.abstract_params("float32", quantization),
        )

    model, loaded = load_model(folder, quantization=quantization, sharding=shardings)
    assert_same(loaded, quantize_params(params, quantization))
    for leaf, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(shardings(model)), strict=True
    ):
        assert leaf.sharding == sharding


@pytest.fixture
def count_reads(monkeypatch):
    """Returns a function that returns the bytes read from tensor files since its last call."""
    counts = []
    original = tensors_module._read_into

    def counted(descriptor, view, start, file):
        counts.append(len(view))
        original(descriptor, view, start, file)

    def taken():
        total = sum(counts)
        counts.clear()
        return total

    monkeypatch.setattr(tensors_module, "_read_into", counted)
    return taken


def test_only_the_requested_part_of_long_rows_is_read(tmp_path, count_reads):
    # Kernels are stored transposed, so a range of d_in is a part of every row of the file.
    model = build_model(CONFIG | {"hidden_size": 4096, "head_dim": 8, "num_hidden_layers": 1})
    params = model.init_params(jax.random.key(0))
    save_model(tmp_path, model, params)
    leaf = flatten(params)["layers", "mlp", "up_proj", "kernel"]
    up = open_sources(tmp_path, model)["layers", "mlp", "up_proj", "kernel"]
    part = np.empty((1, 1024, 320), np.float32)
    up.read_into(part, ((0, 1), (1024, 2048), (0, 320)))
    np.testing.assert_array_equal(part, leaf[:, 1024:2048])
    assert count_reads() == part.nbytes
    most = np.empty((1, 4000, 320), np.float32)
    up.read_into(most, ((0, 1), (96, 4096), (0, 320)))
    np.testing.assert_array_equal(most, leaf[:, 96:])
    assert count_reads() == leaf.nbytes


def test_replicated_leaves_are_read_once(saved, count_reads):
    folder, _ = saved
    sharding = NamedSharding(jax.make_mesh((2, 4), ("a", "b")), PartitionSpec())
    _, loaded = load_model(folder, quantization="int8", sharding=sharding)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(build_model(CONFIG).abstract_params()))
    assert count_reads() == 4 * numbers
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(loaded))
