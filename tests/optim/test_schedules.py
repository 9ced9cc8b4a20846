"""Tests schedules against their formulas in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.optim import SCHEDULES, ScheduleSettings, make_schedule


def expected(settings, peak, total, step):
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    final = settings.final_fraction * peak
    if settings.name == "constant":
        return peak
    if settings.name == "wsd":
        decay = math.ceil(settings.decay_ratio * total)
        done = max(0.0, (step - (total - decay)) / decay)
    else:
        done = (step - warmup) / (total - warmup)
    done = min(1.0, done)
    if settings.name == "cosine":
        return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2
    return peak + (final - peak) * done


@pytest.mark.parametrize("final", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_agrees_with_the_formula(name, warmup, final):
    total = 40
    settings = ScheduleSettings(
        name=name, warmup_steps=warmup, final_fraction=final, decay_ratio=0.33
    )
    schedule = make_schedule(settings, 3e-4, total)
    found = jax.jit(jax.vmap(schedule))(jnp.arange(total + 3))
    wanted = [expected(settings, 3e-4, total, step) for step in range(total + 3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-10)


def test_first_and_last_learning_rates_are_not_zero():
    settings = ScheduleSettings(name="cosine", warmup_ratio=0.1)
    schedule = make_schedule(settings, 1.0, 100)
    assert float(schedule(0)) == pytest.approx(1 / 11)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert 0 < float(schedule(99)) < 1e-3


def test_warmup_ratio_rounds_up():
    assert ScheduleSettings(warmup_ratio=0.03).warmup(10) == 1
    assert ScheduleSettings(warmup_ratio=0.03).warmup(100) == 3
    assert ScheduleSettings(warmup_ratio=0.03).warmup(1) == 0
    assert ScheduleSettings(warmup_steps=7).warmup(100) == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "cosin"}, "name .*'cosin'.* 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps .*-1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio .*1.0"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps .*3 .*warmup_ratio .*0.1"),
        ({"final_fraction": 1.5}, "final_fraction .*1.5"),
        (
            {"name": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.5},
            "warmup_ratio .*0.6 .*decay_ratio .*0.5",
        ),
        ({"decay_ratio": 0.0}, "decay_ratio .*0.0"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        ScheduleSettings(**given)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_ratios_fit_a_run_of_any_length(name, warmup, total):
    settings = ScheduleSettings(name=name, warmup_ratio=warmup, decay_ratio=0.1)
    schedule = make_schedule(settings, 0.8, total)
    rates = [float(schedule(step)) for step in range(total)]
    assert max(rates) == pytest.approx(0.8)
    assert min(rates) > 0


def test_schedule_longer_than_the_run_is_rejected():
    with pytest.raises(ValueError, match=r"warmup_steps is 10\b.* 10"):
        make_schedule(ScheduleSettings(warmup_steps=10), 1.0, 10)
    with pytest.raises(ValueError, match=r"\b8 .*\b5 .*\b10 "):
        make_schedule(ScheduleSettings(name="wsd", warmup_steps=8, decay_ratio=0.5), 1.0, 10)
    with pytest.raises(ValueError, match=r"total_steps .* 0"):
        make_schedule(ScheduleSettings(), 1.0, 0)
    with pytest.raises(ValueError, match=r"learning_rate .*0\.0"):
        make_schedule(ScheduleSettings(), 0.0, 10)
