"""Tests that a step on a mesh agrees with one device, for every method and mesh axis."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from peft_jax.adapters import METHODS
from peft_jax.core import flatten
from peft_jax.data import Batch
from peft_jax.models import build_model
from peft_jax.parallel import MESH_AXES, MeshSettings, make_mesh
from peft_jax.training import run
from peft_jax.training.blueprint import draw_blueprint
from peft_jax.training.report.metrics import read_records
from peft_jax.training.state import TrainState

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOOM = {
    "model_type": "bloom",
    "vocab_size": 40,
    "n_embed": 32,
    "n_layer": 2,
    "num_attention_heads": 4,
}
ROWS, TOKENS, STEPS = 16, 16, 2
INNER = MeshSettings(data=1, fsdp=2, sequence=2, tensor=2)
OUTER = MeshSettings(slice=2, data=2, fsdp=2)
SETTINGS = {
    "lora": {"rank": 2},
    "loftq": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "gralora": {"rank": 4},
    "hira": {"rank": 2},
    "miss": {"rank": 5},
    "vera": {"rank": 4},
    # Its default alpha would scale random numbers by 128 here, and rounding with them.
    "randlora": {"rank": 5, "alpha": 4.0},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3, "projection": 5},
    "fourierft": {"n_frequency": 50},
    "shira": {"rank": 2},
    "oft": {"block_size": 4},
    "lora_ga": {"rank": 2},
    "boft": {"block_size": 4},
    "hybrid": {"rank": 2, "block_size": 4},
}


def batch(microbatches: int) -> Batch:
    """Returns rows with two packed texts, padding and partial loss masks."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 40, (ROWS, TOKENS + 1)).astype(np.int32)
    ends = np.sort(random.integers(2, TOKENS + 1, (ROWS, 2)), axis=1)
    index = np.arange(TOKENS)[None]
    segments = np.where(index < ends[:, :1], 1, np.where(index < ends[:, 1:], 2, 0))
    positions = np.where(segments == 2, index - ends[:, :1], index)
    rows = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=((segments > 0) & (random.random((ROWS, TOKENS)) < 0.7)).astype(np.float32),
        positions=positions.astype(np.int32),
        segment_ids=segments.astype(np.int32),
    )
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, TOKENS), rows)


@pytest.fixture(scope="module")
def take_steps(tiny):
    """Returns a function that takes steps from one start on any mesh."""

    @functools.cache
    def run(method: str, mesh: MeshSettings, family: str = "llama", **changes):
        settings = {
            "method.name": method,
            "method.target_modules": "all-linear",
            "optimizer.name": "sgd",
            "train.learning_rate": 0.5,
            "train.batch_size": ROWS,
            "train.gradient_accumulation": 2,
            "train.max_length": TOKENS,
            "train.loss_chunk": 32,
        }
        settings |= {f"method.{name}": value for name, value in SETTINGS.get(method, {}).items()}
        config = tiny(**settings | changes)
        model = build_model(LLAMA if family == "llama" else BLOOM, config.execution)
        blueprint = draw_blueprint(config, model, make_mesh(mesh))
        random = np.random.default_rng(1)

        def draw(path, leaf):
            """The start: away from zero, where an adapter of zeros would have no gradient."""
            if np.issubdtype(leaf.dtype, np.integer):  # places in a kernel
                return random.integers(0, 16, leaf.shape).astype(leaf.dtype)
            small = 0.1 * random.standard_normal(leaf.shape)
            positive = "scale" in path or path[-1] == "norm"
            return (small + positive).astype(np.float32)

        def place(shapes):
            flat = {path: draw(path, leaf) for path, leaf in flatten(shapes).items()}
            arrays = jax.tree.unflatten(jax.tree.structure(shapes), list(flat.values()))
            return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), arrays, shapes)

        sort = functools.partial(jax.tree.map, lambda leaf: leaf)
        params = place(sort(blueprint.params))
        trainable = place(sort(blueprint.state.trainable))
        constant = place(sort(blueprint.constant))
        frozen = blueprint.spec.frozen(params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.state)
        state = jax.jit(
            functools.partial(TrainState.create, optimizer=blueprint.optimizer),
            out_shardings=shardings,
        )(trainable)
        rows = jax.tree.map(lambda x: jax.device_put(x, blueprint.placement.microbatches), batch(2))
        step = blueprint.trace_step().lower().compile()
        for _ in range(STEPS):
            state, metrics = step(state, frozen, constant, rows)
        return blueprint, state, metrics

    return run


def assert_same(found, expected) -> None:
    _, state, metrics = found
    _, other, reference = expected
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), metrics, reference
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6),
        state.trainable,
        other.trainable,
    )


ONE = MeshSettings(devices=1)
EVERY = [method for method in METHODS if method != "trainable_tokens"]
"""The methods that need no setting of the task."""


@pytest.mark.parametrize(
    "method",
    [m if m == "hybrid" else pytest.param(m, marks=pytest.mark.slow) for m in EVERY],
)
def test_every_method_agrees_on_a_mesh(take_steps, method):
    """Compares losses, gradient norms, λ and trainable arrays after two steps."""
    sharded = take_steps(method, INNER)
    assert_same(sharded, take_steps(method, ONE))
    _, _, metrics = sharded
    assert bool(metrics["finite"])
    assert bool(metrics["lambda"]) == (method == "hybrid")


@pytest.mark.slow
def test_outer_mesh_axes_agree(take_steps):
    assert_same(take_steps("full", OUTER), take_steps("full", ONE))


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("axis", [axis for axis in MESH_AXES if axis != "expert"])
def test_every_single_mesh_axis_agrees(take_steps, axis, method):
    sizes = {"data": 1, axis: 2}
    assert_same(take_steps(method, MeshSettings(devices=2, **sizes)), take_steps(method, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "unitary"])
def test_alibi_model_agrees_on_a_mesh(take_steps, method):
    assert_same(take_steps(method, INNER, "bloom"), take_steps(method, ONE, "bloom"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"execution.remat": "full"},
        {"execution.remat": "dots", "execution.attention": "chunked"},
        {"execution.remat": "products"},
        {"execution.remat": "attention", "execution.attention": "chunked"},
        {"execution.scan_layers": False},
    ],
    ids=str,
)
def test_execution_settings_agree_on_a_mesh(take_steps, changes):
    assert_same(take_steps("hybrid", INNER, **changes), take_steps("hybrid", ONE))


def losses_over_quantized(tiny, workdir, method: str, quantization: str, mesh: dict) -> list[float]:
    """Returns the losses of a complete run over a quantized base model."""
    config = tiny(
        **{f"method.{name}": value for name, value in SETTINGS[method].items()},
        **{f"parallel.{axis}": size for axis, size in mesh.items()},
        method__name=method,
        model__quantization=quantization,
        train__steps=2,
        train__batch_size=8,
        checkpoint__every=0,
    )
    run(config, workdir)
    return [record["loss"] for record in read_records(workdir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("method", "quantization", "mesh"),
    [
        pytest.param(
            *("hybrid", "int8", {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}),
            marks=pytest.mark.slow,
        ),
        pytest.param("lora", "nf4", {"data": 1, "fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("hybrid", "nf4", {"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param(
            *("hybrid", "w8a8g8", {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("lora", "w8a8g8", {"data": 1, "fsdp": 4, "tensor": 2}), marks=pytest.mark.slow
        ),
        pytest.param("lora", "int8", {"slice": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_quantized_base_agrees_on_a_mesh(tiny, tmp_path, method, quantization, mesh):
    cut = losses_over_quantized(tiny, tmp_path / "cut", method, quantization, {"devices": 0} | mesh)
    alone = losses_over_quantized(tiny, tmp_path / "alone", method, quantization, {"devices": 1})
    np.testing.assert_allclose(cut, alone, rtol=1e-3)


def test_adapters_and_optimizer_are_sharded_as_their_kernels(take_steps):
    """No large array is replicated: each device's share is nearly even."""
    blueprint, state, _ = take_steps("hybrid", INNER)

    def share(tree):
        leaves = jax.tree.leaves(tree)
        whole = sum(x.nbytes for x in leaves)
        return sum(x.addressable_shards[0].data.nbytes for x in leaves) / whole

    # Parameters are replicated along "sequence", and low-rank factors sharded along one axis.
    assert share(state.trainable) < 0.6
    kernel = state.trainable["layers"]["mlp"]["up_proj"]["kernel"]
    cut = {name: leaf.sharding.spec for name, leaf in flatten(kernel).items()}
    assert cut["low_rank", "a"] == jax.P(None, "fsdp", None)
    assert cut["low_rank", "b"] == jax.P(None, None, "tensor")
    assert cut["rotation", "r"] == jax.P(None, None, "fsdp", None)
    moments = [leaf.sharding.spec for leaf in jax.tree.leaves(blueprint.state.opt_state)]
    assert all(isinstance(spec, jax.sharding.PartitionSpec) for spec in moments)


@pytest.mark.parametrize("mesh", [INNER, OUTER], ids=["inner", "outer"])
def test_optimizer_state_is_sharded_along_every_axis_of_a_slice(tiny, mesh):
    config = tiny(
        **{"train.batch_size": ROWS, "train.max_length": TOKENS, "method.rank": 8},
        **{"optimizer.name": "adamw"},
    )
    blueprint = draw_blueprint(config, build_model(LLAMA, config.execution), make_mesh(mesh))

    def share(tree):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        own = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        return own / sum(leaf.size for leaf in leaves)

    assert share(blueprint.state.opt_state) == blueprint.mesh.shape["slice"] / 8
    assert share(blueprint.state.trainable) > share(blueprint.state.opt_state)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshSettings(data=1, tensor=8), r"tensor=8 .*heads \(4\) and kv_heads \(2\)"),
        (MeshSettings(data=1, fsdp=-1, devices=3), r"train\.batch_size .*a multiple of 6"),
        (MeshSettings(data=1, sequence=-1, devices=5), r"sequence=5 .*sequence \(16\)"),
    ],
)
def test_meshes_that_do_not_divide_are_rejected(tiny, mesh, message):
    config = tiny(**{"train.batch_size": 16, "train.gradient_accumulation": 2})
    model = build_model(LLAMA, config.execution)
    with pytest.raises(ValueError, match=message) as refusal:
        draw_blueprint(dataclasses.replace(config, parallel=mesh), model, make_mesh(mesh))
    assert "these meshes do" in str(refusal.value) or "multiple" in str(refusal.value)
