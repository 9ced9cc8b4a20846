"""Runs that train virtual tokens: they learn, are resumed, saved, loaded and generated with."""

import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.loop import run

QUICK = ("prompt_tuning",)


def config_of(tiny, method, **changes):
    settings = {
        "method.name": method,
        "method.target_modules": "all-linear",
        "optimizer.schedule.name": "constant",
    }
    return tiny(**{**settings, "method.num_virtual_tokens": 4, "evaluate.every": 3, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("method", [*QUICK, pytest.param("prefix_tuning", marks=pytest.mark.slow)])
def test_a_run_learns_and_its_adapter_generates(method, tiny, checkpoint, tmp_path, listener):
    config = config_of(tiny, method, **{"train.steps": 12})
    summary = run(config, tmp_path, reporter=listener)
    assert summary["loss_after"] < summary["loss_before"]
    assert not (tmp_path / "model").exists()

    model, params = pj.load_model(checkpoint)
    spec, state = pj.load_adapter(tmp_path / "adapter", model, params)
    assert spec.method.num_virtual_tokens == 4
    bound = spec.bind(params, state)
    settings = pj.GenerationSettings(max_new_tokens=5, eos_ids=())
    found = pj.generate(model, bound, [[5, 6, 7], [8]], settings).completions
    for prompt, completion in zip(([5, 6, 7], [8]), found, strict=True):
        row = list(prompt)
        for _ in range(5):
            row.append(int(np.argmax(model(bound, jnp.array([row], jnp.int32))[0, -1])))
        assert completion.tokens.tolist() == row[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_resumed_run_ends_where_a_whole_one_does(method, tiny, tmp_path, listener):
    whole = run(config_of(tiny, method), tmp_path / "whole", reporter=listener)
    run(config_of(tiny, method, **{"train.steps": 2}), tmp_path / "parts", reporter=listener)
    parts = run(config_of(tiny, method), tmp_path / "parts", reporter=listener)
    assert parts["after"] == whole["after"]


def test_what_a_run_cannot_do_is_rejected_at_once(tiny, tmp_path, listener):
    with pytest.raises(ValueError, match=r"export\.merged is true, but prompt_tuning"):
        config_of(tiny, "prompt_tuning", **{"export.merged": True})
    config = config_of(tiny, "prompt_tuning", **{"method.target_modules": "q_proj"})
    with pytest.raises(RefusedError, match=r"target_modules is .*must be 'all-linear'"):
        run(config, tmp_path, reporter=listener)
