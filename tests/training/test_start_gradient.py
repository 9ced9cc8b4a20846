"""Tests the backward pass that initializes adapters: sharding, compilation and memory."""

import dataclasses

import jax
import numpy as np
import pytest

from peft_jax.adapters.sketch import sites_of
from peft_jax.core import flatten
from peft_jax.data import Batch
from peft_jax.models import build_model
from peft_jax.parallel import MeshSettings, make_mesh, on_mesh
from peft_jax.training import program
from peft_jax.training.blueprint import draw_blueprint
from peft_jax.training.program import step_bytes

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE = LLAMA | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352}
ROWS, TOKENS = 16, 16
ONE = MeshSettings(devices=1)
INNER = MeshSettings(data=1, fsdp=2, sequence=2, tensor=2)
OUTER = MeshSettings(slice=2, data=2, fsdp=2)


@pytest.fixture
def draw(tiny):
    """Returns a function that builds the program of a run with LoRA-GA."""

    def build(mesh: MeshSettings, architecture=LLAMA, **changes):
        settings = {
            "method.name": "lora_ga",
            "method.target_modules": "all-linear",
            "method.rank": 2,
            "train.batch_size": ROWS,
            "train.gradient_accumulation": 2,
            "train.max_length": TOKENS,
        }
        config = tiny(**settings | changes)
        return draw_blueprint(config, build_model(architecture, config.execution), make_mesh(mesh))

    return build


def microbatches(blueprint, count: int = 2) -> list[Batch]:
    """Returns microbatches of random tokens, of which some are not learned."""
    random = np.random.default_rng(0)
    train = blueprint.config.train
    found = []
    for _ in range(count):
        shape = (train.microbatch_size, train.max_length)
        tokens = random.integers(0, blueprint.model.config.vocab_size, shape).astype(np.int32)
        rows = Batch.from_tokens(tokens)
        mask = rows.loss_mask * (random.random(shape) < 0.7)
        found.append(dataclasses.replace(rows, loss_mask=mask.astype(np.float32)))
    return found


def random_params(blueprint):
    """Returns parameters of one seed, sharded as the program's."""
    model, quantization = blueprint.model, blueprint.config.model.quantization
    return blueprint.place_base(model.init_params(jax.random.key(0), "float32", quantization))


def factors_of(blueprint, seed: int = 1):
    with on_mesh(blueprint.mesh):
        return blueprint.start_factors(
            jax.random.key(seed), random_params(blueprint), microbatches(blueprint)
        )


def products(factors) -> dict[tuple[str, ...], np.ndarray]:
    """Returns U S Vᵀ by path, on which signs and rotations of vectors have no effect."""
    return {
        path: np.einsum("...ik,...k,...jk->...ij", *(np.asarray(x, np.float64) for x in factor))
        for path, factor in factors.items()
    }


@pytest.mark.parametrize(
    ("mesh", "passes"),
    [
        pytest.param(INNER, 1, id="inner-1", marks=pytest.mark.slow),
        pytest.param(INNER, 4, id="inner-4", marks=pytest.mark.slow),
        pytest.param(OUTER, 1, id="outer-1", marks=pytest.mark.slow),
        pytest.param(OUTER, 4, id="outer-4", marks=pytest.mark.slow),
    ],
)
def test_factors_on_a_mesh_agree_with_one_device(draw, mesh, passes):
    changes = {"method.init_passes": passes}
    alone = products(factors_of(draw(ONE, **changes)))
    found = products(factors_of(draw(mesh, **changes)))
    for path, expected in alone.items():
        error = np.linalg.norm(found[path] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, path


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_factors_over_a_quantized_base_agree_on_a_mesh(draw, quantization):
    changes = {"model.quantization": quantization}
    alone = products(factors_of(draw(ONE, **changes)))
    found = products(factors_of(draw(INNER, **changes)))
    for path, expected in alone.items():
        error = np.linalg.norm(found[path] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, path


@pytest.mark.slow
def test_sketches_and_factors_are_sharded_as_the_kernels(draw):
    blueprint = draw(INNER)
    path = ("layers", "mlp", "up_proj", "kernel")
    factors = factors_of(blueprint)
    assert factors[path].u.sharding.shard_shape((2, 32, 4)) == (2, 16, 4)
    assert factors[path].v.sharding.shard_shape((2, 48, 4)) == (2, 24, 4)
    text = blueprint.trace_start(abstract_rows(blueprint)).lower().compile().as_text()
    # Behind the stack of 2 layers: of [32, 12] and [25, 48] a device has half.
    result = text[text.index("->") : text.index("\n")]
    assert "f32[2,16,12]" in result
    assert "f32[2,25,24]" in result
    assert "f32[2,32,12]" not in result


def abstract_rows(blueprint):
    """Returns one microbatch of a program, as shapes."""
    rows = blueprint.placement.rows
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=rows), blueprint.batch
    )


@pytest.mark.slow
def test_programs_of_one_shape_share_the_compiled_pass(draw, monkeypatch):
    traces = []
    summed_loss = program.summed_loss

    def counted(*args, **kwargs):
        traces.append(1)
        return summed_loss(*args, **kwargs)

    monkeypatch.setattr(program, "summed_loss", counted)
    # A length that no other test has, so that nothing is compiled yet.
    changes = {"train.max_length": TOKENS + 2}
    first = draw(ONE, **changes)
    factors_of(first, seed=1)
    factors_of(first, seed=2)
    factors_of(draw(ONE, **changes, **{"method.name": "hybrid", "method.block_size": 4}), seed=3)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh"),
    [("lora_ga", ONE), ("hybrid", INNER)],
    ids=str,
)
def test_the_pass_needs_no_more_memory_than_a_step(draw, method, mesh):
    """Holds for microbatches of the step, which both hold the activations of."""
    blueprint = draw(
        mesh, WIDE, **{"method.name": method, "method.rank": 8, "train.max_length": 64}
    )
    start = step_bytes(blueprint.trace_start(abstract_rows(blueprint)).lower().compile())
    step = step_bytes(blueprint.trace_step().lower().compile())
    assert start is not None
    assert step is not None
    assert start <= step


def test_a_method_without_a_gradient_has_no_pass(draw):
    blueprint = draw(ONE, **{"method.name": "lora"})
    with pytest.raises(ValueError, match="lora does not start from batches"):
        blueprint.trace_start(abstract_rows(blueprint))


def test_widths_follow_the_number_of_passes(draw):
    params = draw(ONE).params
    path = next(path for path in flatten(params) if path[-1] == "kernel")
    (one,) = sites_of(params, {path: 4}, passes=1)
    (two,) = sites_of(params, {path: 4}, passes=2)
    assert (one.right, one.left) == (12, 25)
    assert (two.right, two.left) == (12, 12)
