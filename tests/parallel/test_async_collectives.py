"""Tests the compiler options for transfers behind products, with the TPU compiler if installed."""

import dataclasses
import importlib.util
import logging

import jax
import pytest

from peft_jax.cost import estimate_program, find_topology, network_of, read_program
from peft_jax.models import build_model
from peft_jax.parallel import MeshSettings, async_collective_options, async_collectives, make_mesh
from peft_jax.plan.compiler import compile_for_topology
from peft_jax.training.blueprint import draw_blueprint
from peft_jax.training.config import RunConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


WIDE = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def run_config(**sections):
    return RunConfig.from_mapping(
        {
            "model": {"path": "unused"},
            "data": {"recipe": "text", "path": "unused"},
            "method": {"name": "lora"},
            "train": {"steps": 1, "batch_size": 2, "max_length": 8},
            **sections,
        }
    )


def mesh_of(name):
    return make_mesh(MeshSettings(data=1, fsdp=2, tensor=-1), find_topology(name).devices)


def test_only_tpus_that_need_options_get_them():
    assert async_collective_options(mesh_of("cpu")) == {}


def test_unknown_options_are_left_out():
    """The CPU's compiler knows none of a TPU's options."""
    mesh, known = mesh_of("cpu"), {"xla_cpu_enable_fast_math": "False"}
    assert (
        async_collectives.known_options(mesh, {**async_collectives.SPARSE_CORE, **known}) == known
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_enable_fast_math"):
        async_collectives.known_options(mesh, {"xla_cpu_enable_fast_math": "perhaps"})


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2", "v5e:2x2", "v4:2x2x1"])
def test_known_tpus_have_compilers_that_know_the_options(name, caplog):
    mesh = mesh_of(name)
    with caplog.at_level(logging.WARNING):
        options = async_collective_options(mesh)
    expected = dict(async_collectives.SPARSE_CORE) if name[:3] in ("v5p", "v6e") else {}
    assert options == expected
    assert not caplog.messages


@needs_libtpu
def test_a_lacking_option_is_named(monkeypatch, caplog):
    options = {**async_collectives.SPARSE_CORE, "xla_tpu_of_another_version": "true"}
    monkeypatch.setattr(async_collectives, "SPARSE_CORE", options)
    async_collectives._warn_once.cache_clear()
    for _ in range(2):
        found = async_collective_options(mesh_of("v5p:2x2x1"))
    assert {*options} - {*found} == {"xla_tpu_of_another_version"}
    (message,) = caplog.messages
    assert "TPU v5" in message
    assert "xla_tpu_of_another_version" in message


@pytest.mark.slow
@needs_libtpu
def test_gathers_run_behind_products():
    """The kernels of a layer are gathered while earlier products run."""
    topology = find_topology("v5p:2x2x4")
    found = {}
    for wanted in (False, True):
        config = run_config(
            execution={"async_collectives": wanted, "compute_dtype": "bfloat16"},
            parallel={"data": 1, "fsdp": -1},
            train={"steps": 1, "batch_size": 16, "max_length": 4096},
        )
        model = build_model(WIDE, config.execution)
        report = compile_for_topology(config, model, topology.name)
        network = network_of(topology.devices, "v5p", 1, 1)
        program = read_program(report.program)
        found[wanted] = estimate_program(program, chip=topology.chip, network=network)
    gathers = {
        wanted: [
            one.asynchronous
            for one in program.transfers
            if one.kind == "links" and one.collective.kind == "all-gather"
        ]
        for wanted, program in found.items()
    }
    assert len(gathers[False]) >= 7
    assert not any(gathers[False])
    assert sum(gathers[True]) >= 7
    # The first layer's kernels have no earlier products.
    waited = {wanted: program.by_kind()["links"] for wanted, program in found.items()}
    assert waited[True] < 0.8 * waited[False]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_step_is_compiled_with_the_options(wanted, monkeypatch):
    """`execution.async_collectives` decides; the options reach the compiler, which rejects them."""
    monkeypatch.setattr(
        "peft_jax.training.program.async_collective_options", lambda mesh: {"xla_no_option": "true"}
    )
    config = run_config(execution={"async_collectives": wanted})
    model = build_model(LLAMA, config.execution)
    mesh = make_mesh(dataclasses.replace(config.parallel, devices=2), jax.devices())
    lowered = draw_blueprint(config, model, mesh).trace_step().lower()
    if not wanted:
        lowered.compile()
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_option"):
        lowered.compile()
