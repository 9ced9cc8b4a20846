"""Tests optimizers against optax's own and against explicit compositions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.optim import (
    NO_DECAY,
    OPTIMIZERS,
    MixingSettings,
    OptimizerSettings,
    ScheduleSettings,
    component_products,
    component_values,
    decay_mask,
    hybrid_mixing,
    learning_rate_schedule,
    make_optimizer,
    mixing_weights,
)

CONSTANT = ScheduleSettings(name="constant")
COSINE = ScheduleSettings(name="cosine", warmup_steps=2, final_fraction=0.1)


def lora_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "layers": {
            "q_proj": {"kernel": {"a": leaf(2, 6, 3), "b": leaf(2, 3, 6)}},
            "input_layernorm": {"scale": leaf(2, 6)},
        }
    }


def hybrid_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernel = {
        "low_rank": {"a": leaf(2, 6, 3), "b": leaf(2, 3, 6)},
        "rotation": {"r": 10 * leaf(2, 1, 3, 1), "scale": leaf(2, 6)},
    }
    return {"layers": {"q_proj": {"kernel": kernel}}, "norm": {"scale": leaf(6)}}


def run(optimizer, make_tree, steps=5):
    """Returns parameters and state after some steps of random gradients."""
    params = make_tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(make_tree(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(found, wanted, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, wanted)


def in_optax(name, rate, **kwargs):
    weights_only = lambda tree: decay_mask(tree)  # noqa: E731
    return {
        "adamw": lambda: optax.adamw(rate, weight_decay=0.1, mask=weights_only, **kwargs),
        "adam": lambda: optax.adam(rate, **kwargs),
        "nadamw": lambda: optax.nadamw(rate, weight_decay=0.1, mask=weights_only, **kwargs),
        "lion": lambda: optax.lion(rate, weight_decay=0.1, mask=weights_only, **kwargs),
        "adafactor": lambda: optax.adafactor(rate, **kwargs),
        "rmsprop": lambda: optax.rmsprop(rate, **kwargs),
        "sgd": lambda: optax.sgd(rate, **kwargs),
    }[name]()


@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lion", "adafactor", "rmsprop", "sgd"])
def test_optimizer_agrees_with_optax(name):
    decay = 0.1 if name in ("adamw", "nadamw", "lion") else 0.0
    settings = OptimizerSettings(
        name=name, learning_rate=0.01, weight_decay=decay, clip_norm=None, schedule=COSINE
    )
    schedule = learning_rate_schedule(settings, 10)
    found, _ = run(make_optimizer(settings, 10), lora_tree)
    with jax.numpy_dtype_promotion("standard"):
        wanted, _ = run(in_optax(name, schedule), lora_tree)
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("name", "given", "in_optax_names"),
    [
        ("adamw", {"b1": 0.5, "b2": 0.7, "eps": 1e-2}, {"b1": 0.5, "b2": 0.7, "eps": 1e-2}),
        ("lion", {"b1": 0.5, "b2": 0.7}, {"b1": 0.5, "b2": 0.7}),
        ("rmsprop", {"b2": 0.7, "eps": 1e-2}, {"decay": 0.7, "eps": 1e-2}),
        ("sgd", {"b1": 0.7}, {"momentum": 0.7}),
    ],
)
def test_constants_reach_the_optimizer(name, given, in_optax_names):
    decay = 0.1 if name in ("adamw", "lion") else 0.0
    settings = OptimizerSettings(
        name=name,
        learning_rate=0.01,
        weight_decay=decay,
        clip_norm=None,
        schedule=CONSTANT,
        **given,
    )
    found, _ = run(make_optimizer(settings, 10), lora_tree)
    with jax.numpy_dtype_promotion("standard"):
        wanted, _ = run(in_optax(name, 0.01, **in_optax_names), lora_tree)
    assert_same(found, wanted)


def test_clipping_bounds_the_gradient_norm():
    settings = OptimizerSettings(name="sgd", learning_rate=0.5, clip_norm=2.0, schedule=CONSTANT)
    optimizer = make_optimizer(settings, 10)
    gradients = lora_tree(1, scale=100.0)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)
    small = lora_tree(1, scale=1e-3)
    updates, _ = optimizer.update(small, optimizer.init(small), small)
    assert_same(updates, jax.tree.map(lambda g: -0.5 * g, small))


@pytest.mark.parametrize("rule", ["proportional", "inverse", "predicted_decrease"])
def test_mixing_is_of_clipped_steps_and_raw_gradients(rule):
    settings = OptimizerSettings(learning_rate=0.01, clip_norm=0.5, schedule=COSINE)
    mixing = MixingSettings(rule=rule)
    found, state = run(make_optimizer(settings, 10, mixing=mixing), hybrid_tree)

    with jax.numpy_dtype_promotion("standard"):
        clipped = optax.chain(
            optax.partition(
                {group: optax.clip_by_global_norm(0.5) for group in ("low_rank", "rotation", "")},
                lambda tree: component_values(
                    tree, {"low_rank": "low_rank", "rotation": "rotation"}, ""
                ),
            ),
            optax.adam(1.0),
        )
        explicit = optax.chain(
            hybrid_mixing(clipped, mixing),
            optax.scale_by_schedule(learning_rate_schedule(settings, 10)),
        )
        wanted, wanted_state = run(explicit, hybrid_tree)
    assert_same(found, wanted)
    np.testing.assert_allclose(
        mixing_weights(state)["layers"], mixing_weights(wanted_state)["layers"], rtol=1e-5
    )


def test_branches_give_the_rates_that_the_mixing_leaves_to_the_method():
    settings = OptimizerSettings(name="sgd", clip_norm=None, schedule=CONSTANT)
    rates = {"low_rank": 3.0, "rotation": 5.0}
    partial = MixingSettings(rule="none", low_rank_rate=2.0)
    given = MixingSettings(rule="none", low_rank_rate=2.0, rotation_rate=5.0)
    found, _ = run(make_optimizer(settings, 10, mixing=partial, branches=rates), hybrid_tree)
    wanted, _ = run(make_optimizer(settings, 10, mixing=given), hybrid_tree)
    assert_same(found, wanted)


@pytest.mark.parametrize("rule", ["proportional", "inverse"])
def test_clipping_does_not_change_mixing_weights(rule):
    mixing = MixingSettings(rule=rule)
    weights = []
    for clip_norm in (None, 1e-3):
        settings = OptimizerSettings(clip_norm=clip_norm, schedule=CONSTANT)
        _, state = run(make_optimizer(settings, 10, mixing=mixing), hybrid_tree, steps=1)
        weights.append(mixing_weights(state)["layers"])
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4)
    assert np.all(np.abs(weights[0] - 0.5) > 0.05)


def test_weight_decay_excludes_rotations_norms_and_lora_ga():
    settings = OptimizerSettings(
        learning_rate=0.1, weight_decay=0.5, clip_norm=None, schedule=CONSTANT
    )
    params = {"layers": lora_tree(0)["layers"], "head": hybrid_tree(0)["layers"]["q_proj"]}
    optimizer = make_optimizer(settings, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    kernel = params["layers"]["q_proj"]["kernel"]
    for name in ("a", "b"):
        found = updates["layers"]["q_proj"]["kernel"][name]
        np.testing.assert_allclose(found, -0.05 * kernel[name], rtol=1e-6)
    still = {"head": updates["head"], "norm": updates["layers"]["input_layernorm"]}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(still))


def test_no_decay_excludes_further_components():
    mask = decay_mask(lora_tree(0), (*NO_DECAY, "a", "b"))
    assert not any(jax.tree.leaves(mask))
    assert all(jax.tree.leaves(decay_mask(lora_tree(0), ())))


def test_bfloat16_parameters_have_float32_moments_and_compile_once():
    settings = OptimizerSettings(learning_rate=0.01, weight_decay=0.1, schedule=CONSTANT)
    optimizer = make_optimizer(settings, 10)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), lora_tree(0))
    state = optimizer.init(params)
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        gradients = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
        updates, state = optimizer.update(gradients, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert traces == 1
    floats = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32}
    assert floats == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_converges(name):
    rate = {"sgd": 0.3, "adafactor": 0.3, "prodigy": 1.0, "muon": 0.3, "scion": 0.3}.get(name, 0.1)
    falls = "constant" if name == "schedule_free_adamw" else "linear"
    settings = OptimizerSettings(
        name=name,
        learning_rate=rate,
        clip_norm=None,
        schedule=ScheduleSettings(name=falls, warmup_steps=5),
    )
    optimizer = make_optimizer(settings, 150)
    start, target = lora_tree(4), lora_tree(3)

    def loss(params):
        return optax.tree.norm(jax.tree.map(jnp.subtract, params, target), squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=150)
    assert float(loss(params)) < 0.02 * float(loss(start))


def test_learning_rates_equal_one_optimizer_per_rate():
    schedule = ScheduleSettings(name="linear", warmup_steps=2)

    def optimizer(rate, **own):
        settings = OptimizerSettings(
            learning_rate=rate, weight_decay=0.1, clip_norm=None, schedule=schedule, **own
        )
        return make_optimizer(settings, 10)

    def tree(seed):
        return {"blocks": lora_tree(seed), "classifier": lora_tree(seed + 50)}

    found, _ = run(optimizer(1e-3, learning_rates={"classifier": 4e-2, "b": 0.3}), tree)
    rates = component_values(tree(0), {"classifier": 4e-2, "b": 0.3}, 1e-3)
    apart = optax.partition({rate: optimizer(rate) for rate in (1e-3, 0.3, 4e-2)}, rates)
    wanted, _ = run(apart, tree)
    assert_same(found, wanted)


def test_rate_factors_equal_one_optimizer_per_product():
    def optimizer(rate, **own):
        settings = OptimizerSettings(
            learning_rate=rate, weight_decay=0.1, clip_norm=None, schedule=COSINE, **own
        )
        return make_optimizer(settings, 10)

    def tree(seed):
        return {"blocks": lora_tree(seed), "classifier": lora_tree(seed + 50)}

    own = {"learning_rates": {"classifier": 2e-2}, "rate_factors": {"b": 16.0, "q_proj": 0.5}}
    found, _ = run(optimizer(1e-3, **own), tree)
    factors = component_products(tree(0), own["rate_factors"])
    rates = component_values(tree(0), {"classifier": 2e-2}, 1e-3)
    rates = jax.tree.map(lambda rate, factor: f"{rate * factor:g}", rates, factors)
    names = sorted(set(jax.tree.leaves(rates)))
    assert names == ["0.0005", "0.001", "0.008", "0.01", "0.02", "0.16"]
    apart = optax.partition({name: optimizer(float(name)) for name in names}, rates)
    wanted, _ = run(apart, tree)
    assert_same(found, wanted)


def test_rate_factors_make_no_group_of_clipping():
    assert OptimizerSettings(rate_factors={"b": 16.0}).clipping == OptimizerSettings().clipping


def test_tree_map_params_accepts_learning_rates_by_component():
    """`optax.tree_map_params`, which derives shardings, initializes with a placeholder."""
    optimizer = make_optimizer(OptimizerSettings(learning_rates={"b": 0.3}), 10)
    params = lora_tree(0)
    state = optimizer.init(params)
    marked = optax.tree_map_params(
        optimizer, lambda _: "followed", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.leaves(marked).count("followed") == 2 * len(jax.tree.leaves(params))


def test_unknown_component_is_named():
    for setting in ("learning_rates", "rate_factors"):
        settings = OptimizerSettings(**{setting: {"clasifier": 1e-3}})
        with pytest.raises(ValueError, match=rf"{setting} .*'clasifier'.* a, classifier"):
            make_optimizer(settings, 10).init({"classifier": {"a": jnp.zeros(2)}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rates": {"head": 0.0}}, r"learning_rates\['head'\] .*0.0"),
        ({"rate_factors": {"b": -2.0}}, r"rate_factors\['b'\] .*-2.0"),
        ({"name": "adamv"}, "name .*'adamv'.* 'adam"),
        ({"learning_rate": -1.0}, "learning_rate .*-1.0"),
        ({"weight_decay": -0.1}, "weight_decay .*-0.1"),
        ({"clip_norm": 0.0}, "clip_norm .*0.0"),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay .*0.1.* adam "),
        ({"name": "lion", "eps": 1e-8}, "eps .* lion .* b1, b2"),
        ({"name": "adafactor", "b1": 0.9}, "b1 .*0.9.* adafactor "),
        ({"b2": 1.0}, "b2 .*1.0"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**given)
