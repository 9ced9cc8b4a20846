"""Kernels in a training step: chosen by the configuration, and run on shards of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kernels_pallas import dispatch
from peft_jax.adapters import BOFT, AdapterSpec
from peft_jax.data import Batch
from peft_jax.models import ExecutionSettings, build_model
from peft_jax.parallel import MeshSettings, batch_sharding, make_mesh, on_mesh, sharding_tree
from peft_jax.training import TrainState, TrainStep

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SPEC = AdapterSpec(method=BOFT(block_size=4, n_butterfly_factors=2))


def rows() -> Batch:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (1, 4, 9)).astype(np.int32)
    shape = (1, 4, 8)
    return Batch(
        tokens=tokens[..., :-1],
        targets=tokens[..., 1:],
        loss_mask=np.ones(shape, np.float32),
        positions=np.broadcast_to(np.arange(8, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
    )


def take_step(mesh=None, **execution):
    """Returns the state after one training step, and the step's metrics."""
    model = build_model(LLAMA, ExecutionSettings(**execution))
    params = model.init_params(jax.random.key(0))
    adapter = SPEC.init(jax.random.key(1), params)
    trainable = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapter.trainable
    )
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    step = TrainStep(
        model=model,
        spec=SPEC,
        optimizer=optimizer,
        learning_rate=lambda step: jnp.float32(1.0),
        chunk_size=16,
        seed=0,
    )
    frozen, batch = SPEC.frozen(params), jax.tree.map(jnp.asarray, rows())
    if mesh is None:
        return jax.jit(step)(
            TrainState.create(trainable, optimizer), frozen, adapter.constant, batch
        )
    with on_mesh(mesh):
        frozen = jax.device_put(frozen, sharding_tree(model.logical_axes(), mesh, shapes=frozen))
        placed = jax.NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec))
        batch = jax.device_put(batch, placed)
        return jax.jit(step)(
            TrainState.create(trainable, optimizer), frozen, adapter.constant, batch
        )


@pytest.fixture(scope="module")
def alone():
    return take_step(kernels="xla")


def expect_equal(found, expected) -> None:
    np.testing.assert_allclose(found[1]["loss"], expected[1]["loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        found[0].trainable,
        expected[0].trainable,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "interpret"])
def test_every_implementation_takes_the_same_step(alone, kernels, kernel_log):
    expect_equal(take_step(kernels=kernels, remat="full"), alone)
    chosen = {
        "auto": (": xla", "rotates the kernel"),
        "interpret": (": interpret",),
    }
    assert kernel_log
    assert all(any(choice in line for choice in chosen[kernels]) for line in kernel_log)


def test_rejects_an_implementation_that_cannot_run():
    with pytest.raises(dispatch.KernelError, match="no Pallas kernel for cpu"):
        take_step(kernels="pallas")
    with pytest.raises(ValueError, match=r"kernels is 'palas'.*pallas"):
        ExecutionSettings(kernels="palas")


def test_each_device_of_a_mesh_rotates_its_own_shard(alone, kernel_log):
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    expect_equal(take_step(mesh), alone)
    # Each device holds one row of 8 tokens; "tensor" shards the 32 feed-forward features.
    assert any(line.startswith("block_rotation(float32[1, 8, 16]") for line in kernel_log)
    assert not any("[4, 8," in line or ", 32]," in line for line in kernel_log)
