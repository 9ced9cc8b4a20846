"""Tests plans against compiled steps and formulas."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import colab, hybrid_7b, hybrid_30b, hybrid_70b, hybrid_405b
from peft_jax.adapters import METHODS
from peft_jax.commands import plan as plan_command
from peft_jax.core import flatten
from peft_jax.cost import find_topology
from peft_jax.models import build_model
from peft_jax.models.architectures import (
    ARCHITECTURES,
    check_architecture,
    find_architecture,
)
from peft_jax.parallel import MeshSettings, make_mesh
from peft_jax.plan import describe, make_plan
from peft_jax.plan.compiler import read_out_of_memory
from peft_jax.plan.planner import find_model
from peft_jax.plan.search import _layouts, _Sizes
from peft_jax.training import RefusedError, RunConfig, config_files, from_config_dict
from peft_jax.training.blueprint import draw_blueprint
from peft_jax.training.program import step_bytes
from peft_jax.training.step_flops import count_step

ROOT = Path(__file__).parents[2]
GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small(tmp_path: Path, method: str = "lora", **changes) -> RunConfig:
    """Returns a run of a small model, whose folder only has a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    config = config_files.base(method=method, precision="float32")
    config.model.path = str(tmp_path)
    config.data.recipe = "alpaca"
    config.train.steps, config.train.batch_size, config.train.max_length = 3, 8, 32
    if method in ("lora", "lora_ga", "hybrid"):
        config.method.rank = 4
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return from_config_dict(config)


def test_plan_without_weights_and_data_agrees_with_the_compiled_step(tmp_path):
    config = small(tmp_path, "lora_ga", parallel__fsdp=4)
    plan = make_plan(config, find_topology("cpu"))
    assert plan.fits
    model = build_model(SMALL, config.execution)
    blueprint = draw_blueprint(config, model, make_mesh(config.parallel))
    compiled = blueprint.trace_step().lower().compile()
    memory = plan.memory
    assert memory.total == step_bytes(compiled)
    parts = memory.base + memory.adapters + memory.optimizer
    assert parts + memory.activations + memory.temporaries == memory.total

    def share(tree):
        return sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )

    assert memory.base == share(blueprint.frozen)
    # The kinds add up to the step's arguments, except the step's number and the batch.
    given = share(blueprint.state) + share(blueprint.constant) + share(blueprint.frozen)
    assert parts == given - 4
    assert compiled.memory_analysis().argument_size_in_bytes >= given
    assert json.loads(json.dumps(plan.to_mapping()))["fits"] is True
    assert "yes: it fits" in describe(plan)


@pytest.mark.slow
def test_activations_count_where_they_lie(tmp_path):
    """Two layers keep their inputs: 2 of 8 rows, half of 32 tokens, and 32 float32 features."""
    config = small(
        tmp_path,
        execution__remat="full",
        parallel__data=1,
        parallel__fsdp=4,
        parallel__tensor=2,
    )
    plan = make_plan(config, find_topology("cpu"))
    assert plan.memory.activations == 2 * 2 * 16 * 32 * 4


def test_frozen_kernels_take_two_products_and_trainable_ones_three(tmp_path):
    """Per token: 4 N for an adapter, 6 N for full fine-tuning.

    LoRA's gradients take 4 r (d_in + d_out) a token, and adding A B to a kernel, forwards and
    backwards, 4 r d_in d_out.
    """
    counts = {}
    for method in ("lora", "full"):
        config = small(tmp_path, method)
        model = build_model(SMALL, config.execution)
        blueprint = draw_blueprint(config, model, make_mesh(MeshSettings(devices=1)))
        counts[method] = count_step(blueprint)
    kernels = {p: x.shape for p, x in flatten(model.abstract_params()).items() if p[-1] == "kernel"}
    numbers = sum(math.prod(shape) for shape in kernels.values())
    tokens = 8 * 32
    adapted = [shape for path, shape in kernels.items() if path[0] == "layers"]
    lora = sum(
        4 * 4 * layers * (tokens * (d_in + d_out) + d_in * d_out) for layers, d_in, d_out in adapted
    )
    attention = 12 * 2 * 32 * 32
    assert counts["lora"].total == tokens * (4 * numbers + attention) + lora
    assert counts["full"].total == tokens * (6 * numbers + attention)
    assert counts["lora"].adapters == lora
    assert counts["full"].adapters == 0
    assert counts["lora"].computed == counts["lora"].total


def test_rematerialization_is_not_in_the_total(tmp_path):
    def count(remat):
        config = small(tmp_path, execution__remat=remat)
        model = build_model(SMALL, config.execution)
        return count_step(draw_blueprint(config, model, make_mesh(MeshSettings(devices=1))))

    plain, again = count("none"), count("full")
    assert plain.total == again.total
    assert again.computed > plain.computed


CONFIGS = {
    "7b": (hybrid_7b, 7.069e9),
    "30b": (hybrid_30b, 32.529e9),
    "70b": (hybrid_70b, 70.554e9),
    "405b": (hybrid_405b, 405.853e9),
    "colab": (colab, 1.544e9),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_have_models_of_the_right_size(name):
    module, parameters = CONFIGS[name]
    config = from_config_dict(module.get_config(""))
    model = build_model(find_architecture(config.model.architecture), config.execution)
    count = sum(x.size for x in jax.tree.leaves(model.abstract_params()))
    assert count == pytest.approx(parameters, rel=1e-3)
    assert config.spec.method.name == "hybrid"
    assert "--plan --topology=" in module.__doc__


@pytest.mark.parametrize("method", METHODS)
def test_configurations_accept_every_method(method):
    for module, _ in CONFIGS.values():
        assert from_config_dict(module.get_config(f"method={method}")).spec.method.name == method


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_json_must_agree_with_the_architecture(name):
    hf_config = find_architecture(name)
    check_architecture(name, build_model(hf_config).config)
    key = "n_layer" if "n_layer" in hf_config else "num_hidden_layers"
    other = build_model(hf_config | {key: 3})
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*num_layers is 3"):
        check_architecture(name, other.config)
    with pytest.raises(ValueError, match="did you mean"):
        find_architecture(name[:-1] + "x")


def test_checkpoint_of_another_architecture_is_rejected(tmp_path):
    config = small(tmp_path, model__architecture="llama-3.1-405b")
    with pytest.raises(RefusedError, match=r"llama-3\.1-405b.*the checkpoint differs"):
        make_plan(config, find_topology("cpu"))


def test_planning_downloads_nothing(tmp_path):
    config = small(tmp_path, model__path="meta-llama/Llama-3.1-405B")
    with pytest.raises(RefusedError, match=r"model\.path .*model\.architecture"):
        make_plan(config, find_topology("cpu"))


def test_both_forms_of_out_of_memory_errors_are_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.10G of 15.75G hbm. Exceeded by 4.35G."
    assert read_out_of_memory(said) == "it needs 20.10 GiB, but 15.75 GiB are available"
    assert read_out_of_memory("x RESOURCE_EXHAUSTED: more\nthan that") == "RESOURCE_EXHAUSTED: more"


@pytest.mark.slow
@needs_libtpu
def test_only_adapter_gradients_cross_tpu_slices(tmp_path):
    config = small(
        tmp_path, model__dtype="bfloat16", parallel__slice=2, parallel__fsdp=2, parallel__tensor=2
    )
    plan = make_plan(config, find_topology("v5e:2x2*2"))
    assert plan.fits
    assert plan.limit == int(15.75 * GIB)
    assert 0 < plan.memory.total < GIB
    between = sum(one.total for one in plan.collectives if one.between_slices)
    trained = plan.memory.adapters
    assert 0 < between < 8 * trained + 4096
    sent = [one for one in plan.estimate.timeline.transfers if one.kind == "network"]
    assert sum(one.seconds for one in sent) > 0
    parts = set(plan.estimate.timeline.by_part())
    assert parts >= {"embedding", "norm", "attention", "mlp", "low_rank", "loss", "optimizer"}
    assert plan.estimate.seconds == pytest.approx(sum(plan.estimate.timeline.by_kind().values()))
    text = describe(plan)
    assert "on v5e:2x2*2 (8 chips): slice=2, fsdp=2, tensor=2" in text
    assert "between slices" in text


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "peft_jax.plan", *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_command_rejects_a_topology_with_one_message(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plan_command.main(["--config=configs/hybrid_405b.py", "--topology=v5q:2x2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("peft_jax.plan: ")
    assert "'v5q'; did you mean 'v5p'" in said
    assert "Traceback" not in said


@needs_libtpu
@pytest.mark.slow
def test_405b_hybrid_needs_half_of_full_fine_tunings_memory():
    """With rematerialization; its fastest layout saves activations instead."""
    memory = {}
    for method, flags in (
        ("full", []),
        ("hybrid", ["--config.execution.remat=full", "--config.train.gradient_accumulation=1"]),
    ):
        result = run_plan(
            f"--config=configs/hybrid_405b.py:method={method}",
            "--topology=v5p:4x4x8",
            "--json",
            *flags,
        )
        assert result.returncode == 0, result.stderr
        plan = json.loads(result.stdout)
        memory[method] = plan["memory_a_device"]["total"]
    assert memory["hybrid"] <= 0.5 * memory["full"]


@needs_libtpu
@pytest.mark.slow
def test_step_that_does_not_fit_names_the_memory_it_needs():
    result = run_plan(
        "--config=configs/hybrid_70b.py",
        "--topology=v5e:4x4",
        "--config.parallel.fsdp=16",
        "--config.parallel.tensor=1",
    )
    assert result.returncode == 4, result.stderr
    assert "no: it needs" in result.stdout
    assert "but 15.75 GiB are available" in result.stdout


@needs_libtpu
def test_search_accounts_for_quantization():
    """70B parameters take 131 GiB in bfloat16 and 36 GiB in NF4; eight chips have 126 GiB."""
    eight = find_topology("v5e:2x4")
    found = {}
    for quantization in ("none", "nf4"):
        config = hybrid_70b.get_config("lora")
        config.model.quantization = quantization
        run = from_config_dict(config)
        model = find_model(run)
        found[quantization] = _layouts(run, model, _Sizes.of(run, model), eight)
    assert not found["none"]
    assert found["nf4"]


@needs_libtpu
def test_layouts_of_a_mixture_shard_its_experts():
    """128 experts and 32 rows divide over 16 chips along "expert", with and without "tensor"."""
    config = hybrid_70b.get_config("method=lora")
    config.model.architecture, config.train.batch_size = "qwen3-30b-a3b", 32
    run, topology = from_config_dict(config), find_topology("v5p:2x2x4")
    model = find_model(run)
    found = {
        (one.mesh.fsdp, one.mesh.expert, one.mesh.tensor): one.least_bytes
        for one in _layouts(run, model, _Sizes.of(run, model), topology)
        if (one.remat, one.microbatches) == ("full", 1)
    }
    assert {(1, 16, 1), (1, 4, 4), (4, 4, 1)} <= found.keys()
    # What is not an expert's is replicated along "expert", and an eighth of all parameters or less.
    assert found[16, 1, 1] < found[1, 16, 1] < 3 * found[16, 1, 1]


@needs_libtpu
@pytest.mark.slow
def test_search_finds_the_smallest_topology_that_fits():
    """The 1.5B model of configs/colab.py fits on one chip."""
    result = run_plan("--config=configs/colab.py", "--search", "--topology=v5e", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["topology"] == "v5e:1x1"
    assert "best layout: --config.parallel.data=1" in result.stderr
