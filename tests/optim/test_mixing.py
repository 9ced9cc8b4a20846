"""Tests hybrid mixing against a NumPy implementation without stacked layers and optax."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.adapters import Hybrid
from peft_jax.optim import MixingSettings, MixingState, hybrid_mixing, mixing_weights

LAYERS = 3
SHAPES = {
    ("layers", "self_attn", "q_proj", "kernel", "low_rank", "a"): (LAYERS, 8, 2),
    ("layers", "self_attn", "q_proj", "kernel", "low_rank", "b"): (LAYERS, 2, 8),
    ("layers", "self_attn", "q_proj", "kernel", "rotation", "r"): (LAYERS, 1, 4, 1),
    ("layers", "self_attn", "q_proj", "kernel", "rotation", "scale"): (LAYERS, 8),
    ("layers", "mlp", "up_proj", "kernel", "low_rank", "a"): (LAYERS, 8, 2),
    ("layers", "mlp", "up_proj", "kernel", "rotation", "phases"): (LAYERS, 4),
    ("layers", "input_layernorm", "scale"): (LAYERS, 8),
    ("lm_head", "kernel", "low_rank", "b"): (2, 16),
    ("lm_head", "kernel", "rotation", "r"): (1, 4, 6),
    ("norm", "scale"): (8,),
}
RULES = ("proportional", "inverse", "predicted_decrease", "fixed", "none")


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def flat_leaves(tree):
    return {
        tuple(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def random_flat(seed, spread=3.0):
    """Returns leaves whose layers and branches have gradients of very different sizes."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in SHAPES.items():
        values = rng.standard_normal(shape)
        if path[0] == "layers":
            size = np.exp(spread * rng.standard_normal(shape[:1]))
            values = values * size.reshape(-1, *([1] * (len(shape) - 1)))
        flat[path] = (values * np.exp(spread * rng.standard_normal())).astype(np.float32)
    return flat


def as_jax(flat, dtype=jnp.float32):
    return nest({path: jnp.asarray(leaf, dtype) for path, leaf in flat.items()})


class Plain:
    """Implements the paper's mixing layer by layer and kernel by kernel, in float64.

    The inner optimizer is Adam, also implemented here.
    """

    def __init__(self, settings, rate=0.1, b1=0.9, b2=0.99, eps=1e-8):
        self.settings, self.rate, self.b1, self.b2, self.eps = settings, rate, b1, b2, eps
        self.step, self.first, self.second, self.history = 0, {}, {}, {}

    @staticmethod
    def unstack(flat):
        """Returns {(layer or None, path): one layer's array}."""
        singles = {}
        for path, leaf in flat.items():
            if path[0] == "layers":
                for layer in range(LAYERS):
                    singles[layer, path] = np.asarray(leaf[layer], np.float64)
            else:
                singles[None, path] = np.asarray(leaf, np.float64)
        return singles

    def adam(self, gradients):
        updates = {}
        for name, g in gradients.items():
            self.first[name] = self.b1 * self.first.get(name, 0.0) + (1 - self.b1) * g
            self.second[name] = self.b2 * self.second.get(name, 0.0) + (1 - self.b2) * g * g
            mean = self.first[name] / (1 - self.b1**self.step)
            square = self.second[name] / (1 - self.b2**self.step)
            updates[name] = -self.rate * mean / (np.sqrt(square) + self.eps)
        return updates

    def group_of(self, layer, path):
        kernel = path[: path.index("kernel") + 1]
        if layer is not None and self.settings.grouping == "block":
            return ("layers", layer)
        return (".".join(kernel), layer)

    def evidence(self, branch, members, gradients, updates):
        chosen = [name for name in members if branch in name[1]]
        if self.settings.rule == "predicted_decrease":
            return max(0.0, -sum(np.sum(gradients[n] * updates[n]) for n in chosen))
        total = sum(np.sum(gradients[n] ** 2) for n in chosen)
        if self.settings.norm == "rms":
            total = total / sum(gradients[n].size for n in chosen)
        return np.sqrt(total)

    def raw(self, members, gradients, updates):
        settings = self.settings
        if settings.rule == "fixed":
            return settings.fixed
        if settings.rule == "none":
            return 0.5
        low = self.evidence("low_rank", members, gradients, updates)
        rotation = self.evidence("rotation", members, gradients, updates)
        if low + rotation == 0:
            return 0.5
        return (rotation if settings.rule == "inverse" else low) / (low + rotation)

    def update(self, flat):
        """Maps stacked gradients by path to stacked updates by path and λ by group."""
        settings = self.settings
        self.step += 1
        gradients = self.unstack(flat)
        updates = self.adam(gradients)
        groups = {}
        for layer, path in gradients:
            if "low_rank" in path or "rotation" in path:
                groups.setdefault(self.group_of(layer, path), []).append((layer, path))
        weights = {}
        for group, members in groups.items():
            past = self.history.setdefault(group, [])
            past.append(self.raw(members, gradients, updates))
            ages = np.arange(len(past))[::-1]
            averaged = np.average(past, weights=settings.ema**ages if settings.ema else ages == 0)
            weights[group] = min(max(averaged, settings.floor), 1 - settings.floor)
        for group, members in groups.items():
            for name in members:
                low = "low_rank" in name[1]
                share = weights[group] if low else 1 - weights[group]
                share = 1.0 if settings.rule == "none" else share
                rate = settings.rate("low_rank" if low else "rotation")
                updates[name] = updates[name] * share * rate
        stacked = {}
        for path in flat:
            if path[0] == "layers":
                stacked[path] = np.stack([updates[layer, path] for layer in range(LAYERS)])
            else:
                stacked[path] = updates[None, path]
        return stacked, weights


def relaxed(inner):
    """Allows dtype promotion only inside optax's own optimizers, which rely on it."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def adam():
    return relaxed(optax.adam(0.1, b1=0.9, b2=0.99))


def assert_agrees(settings, steps=4, transform=lambda optimizer: optimizer):
    plain = Plain(settings)
    optimizer = transform(hybrid_mixing(adam(), settings))
    params = as_jax(random_flat(99))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        flat = random_flat(step)
        updates, state = update(as_jax(flat), state, params)
        expected, weights = plain.update(flat)
        found = mixing_weights(state)
        for (name, layer), weight in weights.items():
            value = found[name] if layer is None else found[name][layer]
            np.testing.assert_allclose(value, weight, rtol=2e-5, atol=1e-7)
        assert sum(w.size for w in found.values()) == len(weights)
        for path, value in flat_leaves(updates).items():
            np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("grouping", ["block", "kernel"])
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_plain_implementation(rule, grouping):
    assert_agrees(MixingSettings(rule=rule, grouping=grouping, fixed=0.3))


@pytest.mark.parametrize(
    "settings",
    [
        MixingSettings(norm="rms", rule="proportional"),
        MixingSettings(norm="rms", rule="inverse", grouping="kernel"),
        MixingSettings(rule="proportional", ema=0.7),
        MixingSettings(ema=0.9, floor=0.2, grouping="kernel"),
        MixingSettings(floor=0.5),
        MixingSettings(rule="proportional", low_rank_rate=2.0, rotation_rate=0.25),
        MixingSettings(rule="predicted_decrease", low_rank_rate=3.0, rotation_rate=0.5, ema=0.5),
        MixingSettings(rule="fixed", fixed=0.0, floor=0.1),
        MixingSettings(rule="none", low_rank_rate=0.5, rotation_rate=0.0),
    ],
    ids=str,
)
def test_options_agree_with_the_plain_implementation(settings):
    assert_agrees(settings)


@pytest.mark.parametrize("rule", RULES)
def test_rates_scale_steps_and_nothing_else(rule):
    """A rate must not enter λ as well, or it would enter the ratio of the steps squared."""
    params, gradients = as_jax(random_flat(0)), as_jax(random_flat(1))

    def updated(**rates):
        optimizer = hybrid_mixing(adam(), MixingSettings(rule=rule, **rates))
        return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)

    (one, state), (ten, same) = updated(), updated(low_rank_rate=2.0, rotation_rate=10.0)
    jax.tree.map(np.testing.assert_array_equal, mixing_weights(state), mixing_weights(same))
    ten = flat_leaves(ten)
    for path, step in flat_leaves(one).items():
        rate = 10.0 if "rotation" in path else 2.0 if "low_rank" in path else 1.0
        np.testing.assert_allclose(ten[path], rate * step, rtol=1e-6)


def test_gradients_of_a_block_only_change_its_own_weight():
    optimizer = hybrid_mixing(optax.sgd(1.0))
    flat = random_flat(0, spread=0.0)
    state = optimizer.init(as_jax(flat))
    path = ("layers", "mlp", "up_proj", "kernel", "low_rank", "a")
    changed = dict(flat)
    changed[path] = flat[path] * np.array([1.0, 50.0, 1.0], np.float32)[:, None, None]
    update = jax.jit(optimizer.update)
    before, after = (
        np.asarray(mixing_weights(update(as_jax(leaves), state)[1])["layers"])
        for leaves in (flat, changed)
    )
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert after[1] > before[1] + 0.1


def test_leaves_outside_a_branch_keep_the_inner_updates():
    params, gradients = as_jax(random_flat(0)), as_jax(random_flat(1))
    inner, mixed = adam(), hybrid_mixing(adam())
    alone, _ = jax.jit(inner.update)(gradients, inner.init(params), params)
    together, _ = jax.jit(mixed.update)(gradients, mixed.init(params), params)
    alone, together = flat_leaves(alone), flat_leaves(together)
    for path in (("norm", "scale"), ("layers", "input_layernorm", "scale")):
        np.testing.assert_array_equal(alone[path], together[path])


@functools.cache
def one_kernel_update(rule, floor):
    """Returns a compiled function from two gradient sizes to one kernel's λ and updates."""
    optimizer = hybrid_mixing(optax.sgd(0.1), MixingSettings(rule=rule, floor=floor))

    @jax.jit
    def update(low, rotation):
        branches = {
            "low_rank": {"a": jnp.full((2, 3), low)},
            "rotation": {"r": jnp.full(4, rotation)},
        }
        updates, state = optimizer.update({"q": branches}, optimizer.init({"q": branches}))
        return mixing_weights(state)["q"], updates

    return update


@hypothesis.given(
    low=st.floats(0, 1e6, width=32),
    rotation=st.floats(0, 1e6, width=32),
    floor=st.sampled_from([0.0, 0.25, 0.5]),
    rule=st.sampled_from(RULES),
)
@hypothesis.settings(deadline=None)
def test_weights_stay_in_their_range(low, rotation, floor, rule):
    weight, updates = one_kernel_update(rule, floor)(np.float32(low), np.float32(rotation))
    assert floor <= weight <= 1 - floor
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_give_a_weight_of_one_half(rule):
    params = as_jax(random_flat(0))
    optimizer = hybrid_mixing(optax.sgd(0.1), MixingSettings(rule=rule))
    _, state = jax.jit(optimizer.update)(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    )
    for weight in mixing_weights(state).values():
        np.testing.assert_array_equal(weight, 0.5)


def test_non_finite_gradient_does_not_persist_in_the_average():
    params = as_jax(random_flat(0))
    optimizer = hybrid_mixing(optax.sgd(0.1), MixingSettings(ema=0.9))
    state = optimizer.init(params)
    bad = random_flat(1)
    path = ("layers", "mlp", "up_proj", "kernel", "low_rank", "a")
    bad[path] = bad[path].copy()
    bad[path][0, 0, 0], bad[path][1, 0, 0] = np.inf, np.nan
    updates, state = jax.jit(optimizer.update)(as_jax(bad), state)
    np.testing.assert_allclose(mixing_weights(state)["layers"][:2], 0.5, rtol=1e-6)
    assert np.isinf(flat_leaves(updates)[path][0, 0, 0])  # the update itself is not hidden
    _, state = jax.jit(optimizer.update)(params, state)
    assert np.isfinite(mixing_weights(state)["layers"]).all()


def test_bfloat16_gradients_are_summed_in_float32():
    """4096 ones and one 64 have equal squares; a bfloat16 sum of ones would stop at 256."""
    gradients = {
        "kernel": {
            "low_rank": {"a": jnp.ones((4096,), jnp.bfloat16)},
            "rotation": {"r": jnp.full((1,), 64.0, jnp.bfloat16)},
        }
    }
    optimizer = hybrid_mixing(optax.sgd(1.0))
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(gradients))
    np.testing.assert_allclose(mixing_weights(state)["kernel"], 0.5, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_single_branch_keeps_its_full_update():
    kernel = {"low_rank": {"a": jnp.ones(3)}, "rotation": {"r": jnp.ones(3)}}
    params = {"q": {"kernel": kernel}, "k": {"kernel": {"rotation": {"r": jnp.ones(3)}}}}
    settings = MixingSettings(rule="proportional", rotation_rate=0.5)
    optimizer = hybrid_mixing(optax.sgd(1.0), settings)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params))
    assert set(mixing_weights(state)) == {"q.kernel"}
    np.testing.assert_allclose(updates["k"]["kernel"]["rotation"]["r"], -0.5)
    np.testing.assert_allclose(updates["q"]["kernel"]["rotation"]["r"], -0.25)


def test_sharded_equals_unsharded():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {
        ("layers", "self_attn", "q_proj", "kernel", "low_rank", "a"): P(None, ("data", "model")),
        ("layers", "self_attn", "q_proj", "kernel", "low_rank", "b"): P(None, "data", "model"),
        ("layers", "self_attn", "q_proj", "kernel", "rotation", "r"): P(None, None, "model"),
        ("layers", "self_attn", "q_proj", "kernel", "rotation", "scale"): P(None, "model"),
        ("lm_head", "kernel", "low_rank", "b"): P("data", "model"),
    }
    tree_specs = nest({path: specs.get(path, P()) for path in SHAPES})
    params, gradients = as_jax(random_flat(0)), as_jax(random_flat(1))
    optimizer = hybrid_mixing(adam(), MixingSettings(ema=0.5))
    update = jax.jit(optimizer.update)
    alone, alone_state = update(gradients, optimizer.init(params), params)

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree_specs, is_leaf=lambda x: isinstance(x, P)
    )
    params, gradients = jax.device_put((params, gradients), (shardings, shardings))
    sharded, state = update(gradients, optimizer.init(params), params)
    path = ("layers", "self_attn", "q_proj", "kernel", "low_rank", "a")
    leaf = sharded["layers"]["self_attn"]["q_proj"]["kernel"]["low_rank"]["a"]
    assert leaf.sharding.shard_shape(leaf.shape) == (LAYERS, 1, 2), path
    for name, weight in mixing_weights(alone_state).items():
        np.testing.assert_allclose(mixing_weights(state)[name], weight, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sharded, alone)


def test_accumulation_weights_by_the_accumulated_gradient():
    flats = [random_flat(seed) for seed in range(4)]
    params = as_jax(random_flat(9))
    mean = {path: np.mean([flat[path] for flat in flats], axis=0) for path in SHAPES}
    optimizer = hybrid_mixing(adam())
    expected, expected_state = jax.jit(optimizer.update)(
        as_jax(mean), optimizer.init(params), params
    )

    accumulating = optax.MultiSteps(hybrid_mixing(adam()), every_k_schedule=4)
    state = accumulating.init(params)
    # MultiSteps multiplies a boolean by a float, which JAX rejects under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(accumulating.update)
        for flat in flats[:3]:
            updates, state = update(as_jax(flat), state, params)
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
            np.testing.assert_array_equal(mixing_weights(state)["layers"], 0.5)
        updates, state = update(as_jax(flats[3]), state, params)
    for name, weight in mixing_weights(expected_state).items():
        np.testing.assert_allclose(mixing_weights(state)[name], weight, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), updates, expected)


def test_extra_arguments_reach_the_inner_optimizer():
    params, gradients = as_jax(random_flat(0)), as_jax(random_flat(1, spread=0.0))
    inner = optax.polyak_sgd(max_learning_rate=10.0)
    mixed = hybrid_mixing(optax.polyak_sgd(max_learning_rate=10.0))
    alone, _ = jax.jit(inner.update)(gradients, inner.init(params), params, value=jnp.float32(2.0))
    updates, state = jax.jit(mixed.update)(
        gradients, mixed.init(params), params, value=jnp.float32(2.0)
    )
    weight = mixing_weights(state)["lm_head.kernel"]
    found = updates["lm_head"]["kernel"]["low_rank"]["b"]
    np.testing.assert_allclose(
        found, weight * alone["lm_head"]["kernel"]["low_rank"]["b"], rtol=1e-6
    )


def without_scale(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", tree)


def test_masks_work_outside_and_inside_the_mixing():
    """`optax.masked` replaces masked leaves by nodes without leaves."""
    params, gradients = as_jax(random_flat(0)), as_jax(random_flat(1))
    settings = MixingSettings(rule="proportional")
    outside = optax.masked(hybrid_mixing(optax.sgd(1.0), settings), without_scale)
    updates, state = jax.jit(outside.update)(gradients, outside.init(params), params)
    flat = random_flat(1)
    masked = {path: leaf for path, leaf in flat.items() if path[-1] != "scale"}
    plain = Plain(settings)
    _, weights = plain.update({path: masked.get(path, np.zeros_like(flat[path])) for path in flat})
    for layer in range(LAYERS):
        found = mixing_weights(state)["layers"][layer]
        np.testing.assert_allclose(found, weights["layers", layer], rtol=1e-5)
    np.testing.assert_array_equal(
        flat_leaves(updates)["norm", "scale"], flat["norm", "scale"]
    )  # a masked leaf keeps its gradient

    inside = hybrid_mixing(optax.masked(optax.sgd(1.0), without_scale))
    updates, state = jax.jit(inside.update)(gradients, inside.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(gradients)


def test_leaf_masked_by_the_inner_optimizer_predicts_no_decrease():

    def drop(updates, state, params=None):
        kept = jax.tree.map(
            lambda keep, leaf: -leaf if keep else optax.MaskedNode(),
            without_scale(updates),
            updates,
        )
        return kept, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), drop)
    flat = random_flat(1)
    optimizer = hybrid_mixing(inner, MixingSettings(rule="predicted_decrease", grouping="kernel"))
    updates, state = jax.jit(optimizer.update)(as_jax(flat), optimizer.init(as_jax(flat)))
    kernel = ("layers", "self_attn", "q_proj", "kernel")
    squares = {
        path[-1]: np.sum(np.square(leaf, dtype=np.float64), axis=tuple(range(1, leaf.ndim)))
        for path, leaf in flat.items()
        if path[:4] == kernel
    }
    low = squares["a"] + squares["b"]
    np.testing.assert_allclose(
        mixing_weights(state)[".".join(kernel)], low / (low + squares["r"]), rtol=1e-5
    )
    assert isinstance(updates["norm"]["scale"], optax.MaskedNode)


def test_partitioned_inner_optimizer_is_mixed():
    params, gradients = as_jax(random_flat(0)), as_jax(random_flat(1))
    inner = optax.partition(
        {"still": optax.set_to_zero(), "moving": optax.sgd(1.0)},
        lambda tree: jax.tree.map(lambda keep: "moving" if keep else "still", without_scale(tree)),
    )
    optimizer = hybrid_mixing(inner)
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert (updates["norm"]["scale"] == 0).all()
    weight = mixing_weights(state)["lm_head.kernel"]
    expected = -(1 - weight) * gradients["lm_head"]["kernel"]["rotation"]["r"]
    np.testing.assert_allclose(updates["lm_head"]["kernel"]["rotation"]["r"], expected, rtol=1e-6)


def test_weights_are_found_in_a_nested_state():
    params = as_jax(random_flat(0))
    nested = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.chain(hybrid_mixing(adam()), optax.scale(2.0)), without_scale),
    )
    assert set(mixing_weights(nested.init(params))) == {"layers", "lm_head.kernel"}
    assert mixing_weights(adam().init(params)) == {}
    twice = optax.chain(hybrid_mixing(adam()), hybrid_mixing(adam()))
    with pytest.raises(ValueError, match=r"\['layers', 'lm_head.kernel'\]"):
        mixing_weights(twice.init(params))


def test_tree_map_params_finds_the_state_with_the_structure_of_parameters():
    """`optax.tree_map_params` derives a state's shardings from those of the parameters."""
    params = as_jax(random_flat(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), hybrid_mixing(adam()))
    state = jax.eval_shape(optimizer.init, params)
    marked = optax.tree_map_params(
        optimizer, lambda _, p: p.shape, state, params, transform_non_params=lambda _: "other"
    )
    (mixing,) = [node for node in marked if isinstance(node, MixingState)]
    assert (mixing.count, mixing.weights, mixing.average) == ("other", "other", "other")
    assert mixing.inner_state[0].mu["norm"]["scale"] == (8,)


def quadratic():
    """Returns a least-squares loss over the tree's shapes and its starting point."""
    target = as_jax(random_flat(5, spread=0.0))

    def loss(params):
        return sum(
            jnp.sum(jnp.square(a - b))
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    return loss, jax.tree.map(jnp.zeros_like, target)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "inner",
    [optax.sgd(0.1), optax.lion(0.04)],
    ids=["sgd", "lion"],
)
def test_mixed_optimizer_converges(rule, inner):
    loss, start = quadratic()
    optimizer = hybrid_mixing(relaxed(inner), MixingSettings(rule=rule, ema=0.5, floor=0.1))

    def step(carry, _):
        params, state = carry
        updates, state = jax.jit(optimizer.update)(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=300)
    assert float(loss(params)) < 0.02 * float(loss(start))


def test_step_compiles_once():
    loss, params = quadratic()
    optimizer = hybrid_mixing(adam(), MixingSettings(ema=0.5))
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        updates, state = jax.jit(optimizer.update)(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert traces == 1


def test_scan_and_loop_agree():
    loss, params = quadratic()
    optimizer = hybrid_mixing(adam())

    def step(carry, _):
        params, state = carry
        updates, state = jax.jit(optimizer.update)(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), mixing_weights(state)["layers"]

    (scanned, _), weights = jax.lax.scan(step, (params, optimizer.init(params)), length=5)
    state, looped, one_step = optimizer.init(params), params, jax.jit(step)
    for row in weights:
        (looped, state), weight = one_step((looped, state), None)
        np.testing.assert_allclose(row, weight, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), scanned, looped)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "propotional"}, "rule .*'propotional'.* 'proportional'"),
        ({"norm": "l2"}, "norm .*'l2'.* frobenius, rms"),
        ({"norm": "rms"}, "norm .*'rms'.*'predicted_decrease'"),
        ({"grouping": "layer"}, "grouping .*'layer'"),
        ({"ema": 1.0}, "ema .*1.0"),
        ({"floor": 0.6}, "floor .*0.6"),
        ({"fixed": -0.1}, "fixed .*-0.1"),
        ({"low_rank_rate": -1.0}, "low_rank_rate .*-1.0"),
        ({"rotation_rate": float("nan")}, "rotation_rate .*nan"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        MixingSettings(**given)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MixingSettings().ema = 0.5


def test_mixing_without_both_branches_is_rejected():
    with pytest.raises(ValueError, match="'low_rank' and a 'rotation'"):
        hybrid_mixing(adam()).init({"layers": {"q": {"kernel": {"a": jnp.ones((2, 3))}}}})


@pytest.mark.parametrize("rotation", ["boft", "unitary"])
def test_branches_of_the_hybrid_method_are_found(rotation):
    method = Hybrid(rank=2, block_size=4, rotation=rotation, gradient_init=False)
    trainable, _ = jax.vmap(lambda key: method.init(key, (8, 6)))(
        jax.random.split(jax.random.key(0))
    )
    optimizer = hybrid_mixing(optax.sgd(1.0))
    state = optimizer.init({"layers": {"q_proj": {"kernel": trainable}}})
    assert {name: w.shape for name, w in mixing_weights(state).items()} == {"layers": (2,)}


def test_a_kernel_that_some_blocks_have_is_a_group_of_its_own():
    def kernel(layers):
        return {"low_rank": {"a": jnp.ones((layers, 2))}, "rotation": {"r": jnp.ones((layers, 3))}}

    params = {"layers": {"q": kernel(4), "k": kernel(4), "experts": kernel(3), "mlp": kernel(1)}}
    optimizer = hybrid_mixing(optax.sgd(1.0), MixingSettings(rule="proportional"))
    state = optimizer.init(params)
    rows = jnp.arange(1.0, 4.0)[:, None]
    gradients = jax.tree.map(jnp.zeros_like, params)
    gradients["layers"]["experts"] = {"low_rank": {"a": rows * jnp.array([3.0, 4.0])}} | {
        "rotation": {"r": jnp.ones((3, 3)) / np.sqrt(3.0)}
    }
    updates, state = optimizer.update(gradients, state, params)
    weights = mixing_weights(state)
    assert {name: weight.shape for name, weight in weights.items()} == {
        "layers": (4,),
        "layers.experts": (3,),
        "layers.mlp": (1,),
    }
    expected = 5 * rows[:, 0] / (5 * rows[:, 0] + 1)
    np.testing.assert_allclose(weights["layers.experts"], expected, rtol=1e-6)
    own = updates["layers"]["experts"]["rotation"]["r"]
    np.testing.assert_allclose(own[:, 0], -(1 - expected) / np.sqrt(3.0), rtol=1e-5)


def test_different_numbers_of_layers_are_rejected():
    kernel = {"low_rank": {"a": jnp.ones((3, 2))}, "rotation": {"r": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match=r"layers.q.kernel.rotation.r .*\(4, 2\).* 3"):
        hybrid_mixing(adam()).init({"layers": {"q": {"kernel": kernel}}})


def test_gradients_of_another_tree_are_rejected():
    kernel = {"low_rank": {"a": jnp.ones(3)}, "rotation": {"r": jnp.ones(3)}}
    optimizer = hybrid_mixing(optax.sgd(1.0))
    state = optimizer.init({"q": {"kernel": kernel}})
    with pytest.raises(ValueError, match=r"\['k.kernel'\].*\['q.kernel'\]"):
        optimizer.update({"k": {"kernel": kernel}}, state)
