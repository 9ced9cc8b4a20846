"""`train`: a run from Python, in a work directory."""

import jax
import jax.numpy as jnp
import pytest

import peft_jax as pj
from peft_jax.hub.fetch import hub_name
from peft_jax.training import fine_tuning
from peft_jax.training.loop import run


def arguments(config):
    """Returns the arguments of `train` that make the run of a configuration."""
    return {
        "data": config.data,
        "steps": config.train.steps,
        "learning_rate": config.train.learning_rate,
        "batch_size": config.train.batch_size,
        "max_length": config.train.max_length,
        "checkpoint": config.checkpoint,
        "logging": config.logging,
        "parallel": config.parallel,
    }


def losses(workdir):
    log = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line.partition('"timing"')[0] for line in log]


def test_a_mixing_without_rates_has_those_of_the_method(tiny, checkpoint, tmp_path, monkeypatch):
    seen = {}

    def stop(config, *_, **__):
        seen["config"] = config
        raise InterruptedError

    monkeypatch.setattr(fine_tuning, "run", stop)
    sizes = {"method.name": "hybrid", "method.block_size": 4}
    config = tiny(**sizes, **{"mixing.ema": 0.9})
    model, params = pj.load_model(checkpoint)
    given = arguments(config) | {"mixing": pj.MixingSettings(ema=0.9)}
    with pytest.raises(InterruptedError):
        pj.train(model, params, config.spec, workdir=tmp_path, **given)
    assert seen["config"].mixing == config.mixing
    assert seen["config"].mixing.rotation_rate == config.spec.method.branches["rotation"]


@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hybrid", "full"))],
)
def test_it_is_the_run_of_a_configuration(method, tiny, checkpoint, tmp_path, listener):
    sizes = {"method.block_size": 4} if method == "hybrid" else {}
    config = tiny(**{"method.name": method, **sizes})
    expected = run(config, tmp_path / "config", reporter=listener)
    model, params = pj.load_model(checkpoint)
    before = jax.tree.map(jnp.copy, params)
    result = pj.train(
        model,
        params,
        config.spec,
        workdir=tmp_path / "python",
        reporter=listener,
        **arguments(config),
    )
    assert result.summary["after"] == expected["after"]
    assert losses(tmp_path / "python") == losses(tmp_path / "config")
    # The parameters that were given are still there, and unchanged.
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, before))
    merged = pj.merge(params, result.spec, result.adapter)
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, merged, params))


def test_a_finished_run_returns_its_result_again(tiny, checkpoint, tmp_path, listener):
    config = tiny()
    model, params = pj.load_model(checkpoint)
    first, again = (
        pj.train(
            model, params, config.spec, workdir=tmp_path, reporter=listener, **arguments(config)
        )
        for _ in range(2)
    )
    assert first.summary == again.summary
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first.adapter, again.adapter))


@pytest.mark.slow
def test_a_quantized_base_is_recorded(tiny, checkpoint, tmp_path, listener):
    config = tiny()
    model, params = pj.load_model(checkpoint, quantization="int8")
    pj.train(model, params, config.spec, workdir=tmp_path, reporter=listener, **arguments(config))
    assert '"quantization": "int8"' in (tmp_path / "config.json").read_text()


def test_a_model_without_a_checkpoint_is_rejected(tiny, tmp_path):
    config = tiny()
    model = pj.build_model(
        {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
    )
    params = model.init_params(jax.random.key(0))
    with pytest.raises(ValueError, match="Trainer"):
        pj.train(model, params, config.spec, workdir=tmp_path, **arguments(config))


def test_mixed_dtypes_are_rejected(tiny, checkpoint, tmp_path):
    config = tiny()
    model, params = pj.load_model(checkpoint)
    params["norm"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["norm"])
    with pytest.raises(ValueError, match="bfloat16, float32"):
        pj.train(model, params, config.spec, workdir=tmp_path, **arguments(config))


def test_a_data_set_s_unknown_setting_is_named():
    with pytest.raises(ValueError, match=r"data\.hold_uot .* 'hold_out'"):
        pj.dataset("alpaca", "rows.jsonl", hold_uot=0.1)


def test_a_folder_of_the_hub_s_cache_has_a_name():
    assert hub_name("/c/models--org--a/snapshots/12ab") == ("org/a", "12ab")
