"""Tests the newer optimizers against float64 forms of their papers' equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.adapters import AdapterSpec, LoRA
from peft_jax.core import flatten
from peft_jax.data import Batch
from peft_jax.models import build_model
from peft_jax.optim import (
    MixingSettings,
    OptimizerSettings,
    ScheduleSettings,
    decay_mask,
    evaluated_arrays,
    learning_rate_schedule,
    make_optimizer,
    mixing_weights,
)
from peft_jax.optim.eight_bit import decode, encode
from peft_jax.optim.matrices import kinds, orthogonalized
from peft_jax.parallel import MeshSettings, make_mesh
from peft_jax.training import Trainer
from peft_jax.training.step import summed_loss

STEPS, DECAY = 5, 0.1
NAMES = (
    "adamw_8bit",
    "muon",
    "scion",
    "sgg",
    "riemannian_adamw",
    "schedule_free_adamw",
    "prodigy",
)


def tree(seed, scale=1.0):
    """Returns arrays of each kind: matrices, a rotation, a vector, an embedding and a head."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "layers": {
            "q_proj": {"kernel": {"a": leaf(2, 12, 8), "b": leaf(2, 8, 16)}},
            "up_proj": {"kernel": {"r": leaf(2, 2, 3)}},
            "norm": {"scale": leaf(2, 6)},
        },
        "embed_tokens": {"embedding": leaf(10, 6)},
        "lm_head": {"kernel": leaf(6, 10)},
    }


def settings_of(name, **own):
    schedule = {"name": "constant"} if name == "schedule_free_adamw" else {"name": "cosine"}
    given = {
        "name": name,
        "learning_rate": 1.0 if name == "prodigy" else 0.01,
        "weight_decay": DECAY,
        "clip_norm": None,
        "schedule": ScheduleSettings(warmup_steps=2, **schedule),
        **({"recluster_ratio": 0.2, "b3": 0.5} if name == "sgg" else {}),
    }
    return OptimizerSettings(**(given | own))


def run(optimizer, steps=STEPS, make=tree):
    """Returns parameters and state after some steps of random gradients."""
    params = make(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(make(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# The papers' equations, in float64 on flat trees. Each yields the directions of one step.


def wide(nested):
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten(nested).items()}


class Adam:
    """Kingma and Ba, 2015, algorithm 1."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m, self.v, self.t = {}, {}, 0

    def __call__(self, gradients, params):
        self.t += 1
        found = {}
        for path, g in gradients.items():
            self.m[path] = self.b1 * self.m.get(path, 0) + (1 - self.b1) * g
            self.v[path] = self.b2 * self.v.get(path, 0) + (1 - self.b2) * g**2
            m = self.m[path] / (1 - self.b1**self.t)
            found[path] = m / (np.sqrt(self.v[path] / (1 - self.b2**self.t)) + self.eps)
        return found


def newton_schulz(x, eps):
    x = x / (np.linalg.norm(x) + eps)
    wide_enough = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(5):
        gram = wide_enough @ wide_enough.T
        wide_enough = 3.4445 * wide_enough + (-4.775 * gram + 2.0315 * gram @ gram) @ wide_enough
    return wide_enough if x.shape[0] <= x.shape[1] else wide_enough.T


IS_MATRIX = {("layers", "q_proj", "kernel", "a"), ("layers", "q_proj", "kernel", "b")}


class Muon:
    """Jordan et al., 2024, with bias corrections as in optax, and Liu et al., 2025, eq. 4."""

    def __init__(self):
        self.adam, self.m, self.t = Adam(), {}, 0

    def __call__(self, gradients, params):
        found = self.adam(gradients, params)
        self.t += 1
        for path in IS_MATRIX:
            g = gradients[path]
            self.m[path] = 0.95 * self.m.get(path, 0) + 0.05 * g
            average = 0.95 * self.m[path] / (1 - 0.95 ** (self.t + 1))
            nesterov = average + 0.05 * g / (1 - 0.95**self.t)
            size = 0.2 * np.sqrt(max(g.shape[-2:]))
            found[path] = size * np.stack([newton_schulz(one, 1e-8) for one in nesterov])
        return found


class Scion:
    """Pethick et al., 2025, algorithm 1 with the norms of tables 3 and 4."""

    def __init__(self):
        self.d = {}

    def __call__(self, gradients, params):
        found = {}
        for path, g in gradients.items():
            d = self.d[path] = 0.9 * self.d.get(path, 0) + 0.1 * g
            if path in IS_MATRIX:
                d_in, d_out = d.shape[-2:]
                each = [newton_schulz(one, 1e-7) for one in d]
                found[path] = np.sqrt(d_out / d_in) * np.stack(each)
            elif path[0] == "lm_head":
                found[path] = np.sign(d) / d.shape[0]
            elif path[0] == "embed_tokens":
                found[path] = np.sign(d)
            else:
                rows = d.reshape(2, -1)
                rms = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
                found[path] = (rows / rms).reshape(d.shape)
        return found


class GradientGrouping:
    """Li et al., 2025, algorithm 1 and eq. 5 to 7, at every step; see `gradient_grouping`."""

    def __init__(self, b3=0.5, clusters=3):
        self.adam, self.b3, self.clusters = Adam(), b3, clusters
        self.factors = {}

    def group(self, m):
        centers = m.mean() + np.linspace(-2, 2, self.clusters) * m.std()
        for _ in range(11):
            nearest = np.argmin(np.abs(m[:, None] - centers), axis=1)
            own = [m[nearest == c] for c in range(self.clusters)]
            centers = np.array(
                [one.mean() if one.size else c for one, c in zip(own, centers, strict=True)]
            )
        return nearest

    def __call__(self, gradients, params):
        found = self.adam(gradients, params)
        groups, spreads = {}, {}
        for path, m in self.adam.m.items():
            rows = m.reshape(2, -1) if path[0] == "layers" else m.reshape(1, -1)
            if rows.shape[1] < 64:
                continue
            groups[path] = np.stack([self.group(row) for row in rows])
            spreads[path] = np.array(
                [
                    [np.median(np.abs(row - row.mean())[group == c]) for c in range(self.clusters)]
                    for row, group in zip(rows, groups[path], strict=True)
                ]
            )
        typical = np.median(np.concatenate([one.ravel() for one in spreads.values()]))
        for path, spread in spreads.items():
            wanted = np.clip(typical / (spread + 1e-8), 0.1, 10)
            before = self.factors.get(path, np.ones_like(spread))
            self.factors[path] = self.b3 * before + (1 - self.b3) * wanted
            picked = np.take_along_axis(self.factors[path], groups[path], axis=1)
            found[path] = found[path] * picked.reshape(found[path].shape)
        return found


class Riemannian:
    """Zhang and Pilanci, 2024: scaled AdamW."""

    def __init__(self):
        self.adam = Adam()

    def __call__(self, gradients, params):
        above = ("layers", "q_proj", "kernel")
        a, b = params[(*above, "a")], params[(*above, "b")]
        g_a, g_b = gradients[(*above, "a")], gradients[(*above, "b")]
        damped = 0.01 * np.eye(8)
        scaled = {
            (*above, "a"): g_a @ np.linalg.inv(b @ b.swapaxes(1, 2) + damped),
            (*above, "b"): np.linalg.inv(a.swapaxes(1, 2) @ a + damped) @ g_b,
        }
        return self.adam(gradients | scaled, params)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("muon", Muon),
        ("scion", Scion),
        ("sgg", GradientGrouping),
        ("riemannian_adamw", Riemannian),
    ],
)
def test_steps_are_those_of_the_paper(name, reference):
    settings, direction = settings_of(name), reference()
    schedule = learning_rate_schedule(settings, STEPS)
    params, decays = wide(tree(0)), flatten(decay_mask(tree(0)))
    for step in range(STEPS):
        found = direction(wide(tree(step + 1)), params)
        rate = float(schedule(step))
        for path, u in found.items():
            params[path] = params[path] - rate * (u + DECAY * decays[path] * params[path])
    got, _ = run(make_optimizer(settings, STEPS))
    for path, leaf in flatten(got).items():
        np.testing.assert_allclose(leaf, params[path], rtol=2e-4, atol=2e-5, err_msg=str(path))


def test_schedule_free_is_that_of_the_paper():
    """Defazio et al., 2024, algorithm 1, whose parameters are y and whose result is x."""
    settings = settings_of("schedule_free_adamw")
    schedule = learning_rate_schedule(settings, STEPS)
    z, x, decays = wide(tree(0)), wide(tree(0)), flatten(decay_mask(tree(0)))
    y, v, weights, largest = dict(z), {}, 0.0, 0.0
    for step in range(STEPS):
        rate = float(schedule(step))
        largest = max(largest, rate)
        weights += largest**2
        c = largest**2 / weights
        for path, g in wide(tree(step + 1)).items():
            v[path] = 0.999 * v.get(path, 0) + 0.001 * g**2
            u = g / (np.sqrt(v[path] / (1 - 0.999 ** (step + 1))) + 1e-8)
            z[path] = z[path] - rate * (u + DECAY * decays[path] * y[path])
            x[path] = (1 - c) * x[path] + c * z[path]
            y[path] = 0.1 * z[path] + 0.9 * x[path]
    params, state = run(make_optimizer(settings, STEPS))
    for wanted, got in ((y, params), (x, evaluated_arrays(state, params))):
        for path, leaf in flatten(got).items():
            np.testing.assert_allclose(leaf, wanted[path], rtol=2e-4, atol=1e-5, err_msg=str(path))


def test_prodigy_is_that_of_the_paper():
    """Mishchenko and Defazio, 2023, algorithm 4, with the weights of its eq. 4."""

    def make(seed):
        # Steps of 1e-6 are lost beside numbers near 1. Gradients of one direction raise d.
        one = jax.tree.map(lambda a, b: a + 0.1 * b, tree(9), tree(seed))
        return one if seed else tree(0, scale=1e-4)

    steps = 10
    settings = settings_of("prodigy", schedule=ScheduleSettings(name="constant"))
    schedule = learning_rate_schedule(settings, steps)
    x, decays = wide(make(0)), flatten(decay_mask(tree(0)))
    start, d, r = dict(x), 1e-6, 0.0
    m, v, s = (dict.fromkeys(x, 0.0) for _ in range(3))
    b3 = np.sqrt(0.999)
    for step in range(steps):
        g = wide(make(step + 1))
        corrected = np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        rate = d * float(schedule(step)) * corrected
        r = b3 * r + d / 1e-6 * rate * sum(np.sum(g[p] * (start[p] - x[p])) for p in x)
        for p in x:
            m[p] = 0.9 * m[p] + 0.1 * d * g[p]
            v[p] = 0.999 * v[p] + 0.001 * (d * g[p]) ** 2
            s[p] = b3 * s[p] + rate * d / 1e-6 * g[p]
        d = max(d, r / sum(np.sum(np.abs(s[p])) for p in x))
        for p in x:
            u = m[p] / (np.sqrt(v[p]) + d * 1e-8)
            x[p] = x[p] - rate * (u + DECAY * decays[p] * x[p])
    assert d > 1.5e-6
    params, state = run(make_optimizer(settings, steps), steps=steps, make=make)
    np.testing.assert_allclose(state.estim_lr, d, rtol=1e-4)
    for path, leaf in flatten(params).items():
        moved, wanted = leaf - flatten(make(0))[path], x[path] - start[path]
        np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=2e-9, err_msg=str(path))


def test_prodigy_is_unharmed_by_gradients_of_zero():
    optimizer = make_optimizer(settings_of("prodigy", weight_decay=0.0), STEPS)
    params = tree(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    updates, state = update(zero, optimizer.init(params), params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, state = update(tree(1), state, params)
    assert np.isfinite(float(optax.tree.norm(updates)))
    assert float(state.estim_lr) == pytest.approx(1e-6)


# AdamW in 8 bits.


def large(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"layers": {"q": {"kernel": leaf(2, 64, 96)}, "norm": {"scale": leaf(2, 64)}}}


def dynamic_map(signed):
    """Returns the levels of Dettmers et al., 2022, section 1.3, from their bits.

    After the sign come zeros, a one, and a linear fraction in the remaining bits.
    """
    levels = [0.0, 1.0]
    for zeros in range(7):
        bits = 6 - zeros + (0 if signed else 1)
        ends = 0.1 + 0.9 * np.arange(2**bits + 1) / 2**bits
        magnitudes = 10.0**-zeros * (ends[:-1] + ends[1:]) / 2
        levels.extend(magnitudes)
        levels.extend(-magnitudes if signed else [])
    return np.array(sorted(levels))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_levels_of_the_dynamic_map(signed):
    levels = dynamic_map(signed)
    assert len(levels) == 256
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 64, 6)) * 10.0 ** rng.uniform(-6, 0, (3, 64, 6))
    values = jnp.asarray(values if signed else np.abs(values), jnp.float32)
    codes, scales = map(np.asarray, encode(values, 1, signed=signed))
    assert codes.shape == values.shape
    assert scales.shape == (3, 1, 6)
    parts = np.asarray(values, np.float64) / scales.astype(np.float64)
    nearest = np.abs(parts[..., None] - levels).argmin(-1)
    assert np.mean(nearest != codes) < 0.002  # those in the middle, which float32 rounds
    decoded = decode(jnp.asarray(codes), jnp.asarray(scales), 1, signed=signed)
    np.testing.assert_allclose(decoded, levels[codes] * scales, rtol=1e-6)


def test_eight_bit_steps_follow_adamw():
    """Each step is Adam's from the decoded moments before it; the moments take a quarter."""
    settings = settings_of("adamw_8bit")
    optimizer = make_optimizer(settings, STEPS)
    got, state = run(optimizer, make=large)
    exact, plain = run(make_optimizer(settings_of("adamw"), STEPS), make=large)
    moved = jax.tree.map(lambda p, q: np.asarray(p - q), got, large(0))
    wanted = jax.tree.map(lambda p, q: np.asarray(p - q), exact, large(0))
    small = [one["layers"]["norm"]["scale"] for one in (moved, wanted)]
    np.testing.assert_allclose(*small, rtol=1e-5, atol=1e-7)
    found, right = (one["layers"]["q"]["kernel"] for one in (moved, wanted))
    assert np.linalg.norm(found - right) < 0.03 * np.linalg.norm(right)
    assert np.any(found != right)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in (state, plain)]
    assert sizes[0] < 0.3 * sizes[1]


# What all of them share.


@pytest.mark.fast("muon")
@pytest.mark.parametrize("name", NAMES)
def test_sharded_steps_equal_those_of_one_device(name):
    """The states are sharded as their parameters, but for scales and single numbers."""
    make = large if name == "adamw_8bit" else tree
    optimizer = make_optimizer(settings_of(name), STEPS)
    if name == "riemannian_adamw":
        make = lambda seed: {"layers": {"q_proj": tree(seed)["layers"]["q_proj"]}}  # noqa: E731
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, tensor=4))
    alone, _ = run(optimizer, steps=2, make=make)

    def spread(leaf):
        rows = leaf.ndim > 1 and leaf.shape[-2] % 2 == 0
        columns = leaf.ndim > 0 and leaf.shape[-1] % 4 == 0
        axes = [None] * max(leaf.ndim - 2, 0)
        axes += ["fsdp" if rows else None] if leaf.ndim > 1 else []
        axes += ["tensor" if columns else None] if leaf.ndim else []
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*axes)))

    apart, _ = run(optimizer, steps=2, make=lambda seed: jax.tree.map(spread, make(seed)))
    for path, leaf in flatten(apart).items():
        # A code of 8 bits may round the other way.
        atol = 1e-4 if name == "adamw_8bit" else 2e-5
        np.testing.assert_allclose(leaf, flatten(alone)[path], rtol=2e-4, atol=atol)


def hybrid(seed):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernel = {
        "low_rank": {"a": leaf(2, 6, 3), "b": leaf(2, 3, 6)},
        "rotation": {"r": leaf(2, 1, 3, 1), "scale": leaf(2, 6)},
    }
    return {"layers": {"q_proj": {"kernel": kernel}}}


@pytest.mark.fast("muon", "schedule_free_adamw")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
def test_mixing_weights_and_rates_scale_each_step(name):
    settings = settings_of(name, clip_norm=1.0)
    both = settings_of(name, clip_norm=1.0, rate_factors={"b": 4.0}, learning_rates={"r": 0.02})
    mixing = MixingSettings(rule="fixed", fixed=0.25)
    plain, _ = run(make_optimizer(settings, STEPS), steps=1, make=hybrid)
    mixed, state = run(make_optimizer(both, STEPS, mixing=mixing), steps=1, make=hybrid)
    np.testing.assert_allclose(mixing_weights(state)["layers"], 0.25)
    for path, start in flatten(hybrid(0)).items():
        factor = {"a": 0.25, "b": 1.0, "r": 1.5, "scale": 0.75}[path[-1]]
        before, after = flatten(plain)[path] - start, flatten(mixed)[path] - start
        if path[-1] in ("r", "scale") and name not in ("muon", "scion"):
            # `learning_rates` clips r apart from the scale, which Adam's first step hardly sees.
            np.testing.assert_allclose(after, factor * before, rtol=2e-2, atol=2e-6)
        else:
            np.testing.assert_allclose(after, factor * before, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "schedule_free_adamw"}, "schedule.name is 'linear'.*averages.*'constant'"),
        ({"name": "schedule_free_adamw", "schedule": "constant", "b1": 0.0}, "b1 is 0"),
        ({"name": "prodigy", "rate_factors": {"b": 16.0}}, "rate_factors is .*b.* prodigy"),
        ({"name": "prodigy", "learning_rates": {"b": 1.0}}, "learning_rates is .* prodigy"),
        ({"name": "adamw", "damping": 0.1}, "damping is 0.1, but adamw .* takes b1, b2, eps"),
        ({"name": "sgg", "clusters": 1}, "clusters must be .* from 2 .* 1"),
        ({"name": "sgg", "recluster_ratio": 1.5}, "recluster_ratio .* at most 1, .*1.5"),
        ({"name": "riemannian_adamw", "damping": 0.0}, "damping .* above 0"),
        ({"name": "scion", "b2": 0.9}, "b2 is 0.9, but scion"),
    ],
)
def test_settings_that_do_not_combine_are_rejected(given, message):
    if "schedule" in given:
        given = given | {"schedule": ScheduleSettings(name=given["schedule"])}
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**given)


def test_trees_and_mixing_that_do_not_suit_are_rejected():
    vectors = {"layers": {"norm": {"scale": jnp.ones((2, 6))}}}
    for name, message in (
        ("muon", r"'muon'.*layers.norm.scale has the shape \(2, 6\).*adamw"),
        ("riemannian_adamw", "pairs of A .* only scale.* lora, dora or hybrid"),
    ):
        with pytest.raises(ValueError, match=message):
            make_optimizer(settings_of(name), STEPS).init(vectors)
    with pytest.raises(
        ValueError, match=r"'prodigy', and mixing.rule is 'fixed'.* mixing.rule none"
    ):
        make_optimizer(settings_of("prodigy"), STEPS, mixing=MixingSettings(rule="fixed"))
    make_optimizer(settings_of("prodigy"), STEPS, mixing=MixingSettings(rule="none"))


def test_kinds_of_the_arrays_of_adapters():
    expert = {"layers": {"mlp": {"experts": {"up": {"kernel": {"a": jnp.ones((2, 4, 6, 3))}}}}}}
    assert jax.tree.leaves(kinds(expert)) == ["matrix"]
    found = flatten(kinds(tree(0)))
    assert {path[-1] if path[0] == "layers" else path[0]: kind for path, kind in found.items()} == {
        "a": "matrix",
        "b": "matrix",
        "r": "other",
        "scale": "other",
        "embed_tokens": "lookup",
        "lm_head": "lookup",
    }


def test_orthogonalized_matrices_have_singular_values_near_one():
    found = orthogonalized(jnp.asarray(np.random.default_rng(0).standard_normal((3, 40, 6))))
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not np.any(orthogonalized(jnp.zeros((4, 2))))


# Other implementations.


@pytest.mark.slow
def test_riemannian_steps_equal_those_of_peft():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["0"]))
    torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = optimizers.create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=0.01, reg=0.05, weight_decay=0.0
    )
    params = {"a": jnp.asarray(a.detach().numpy().T), "b": jnp.asarray(b.detach().numpy().T)}
    settings = settings_of(
        "riemannian_adamw",
        damping=0.05,
        weight_decay=0.0,
        schedule=ScheduleSettings(name="constant"),
    )
    ours = make_optimizer(settings, 3)
    state = ours.init(params)
    for _ in range(3):
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        gradients = {"a": jnp.asarray(a.grad.numpy().T), "b": jnp.asarray(b.grad.numpy().T)}
        optimizer.step()
        updates, state = ours.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["a"], a.detach().numpy().T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(params["b"], b.detach().numpy().T, rtol=1e-3, atol=1e-5)


# The average of schedule-free training in a run.


@pytest.mark.slow
def test_schedule_free_averages_are_evaluated_and_merged():
    config = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    model = build_model(config)
    params = model.init_params(jax.random.key(0))
    optimizer = make_optimizer(settings_of("schedule_free_adamw", learning_rate=0.1), 4)
    spec = AdapterSpec(LoRA(rank=2))
    trainer = Trainer(model, spec, optimizer, mesh=make_mesh(MeshSettings(devices=2)))
    rng = np.random.default_rng(0)
    batches = [Batch.from_tokens(rng.integers(0, 32, (4, 10))) for _ in range(4)]
    training = trainer.fit(params, batches)
    state = training.state.opt_state
    wanted = jax.tree.map(
        lambda y, z: (np.asarray(y) - 0.1 * np.asarray(z)) / 0.9, training.state.trainable, state.z
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        training.adapter.trainable,
        wanted,
    )
    rows, adapter = jax.tree.map(jnp.asarray, batches[0]), training.adapter

    @jax.jit
    def loss(trainable):
        bound = spec.bind(params, adapter.replace(trainable=trainable))
        return summed_loss(model, bound, rows, chunk_size=64)[0]

    found = trainer.evaluate(training, batches[:1]) * float(rows.loss_mask.sum())
    assert found == pytest.approx(float(loss(wanted)), rel=1e-5)
    assert abs(float(loss(training.state.trainable)) / found - 1) > 1e-4
