"""Tests the properties of every adapter method; a new method needs one line in `METHODS`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_jax.adapters import (
    BOFT,
    EVA,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    AdapterSpec,
    AdapterState,
    DoRA,
    FourierFT,
    Full,
    GraLoRA,
    HiRA,
    Hybrid,
    LNTuning,
    LoftQ,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAGA,
    LoRAOne,
    MiSS,
    OLoRA,
    PiSSA,
    RandLora,
    SHiRA,
    TrainableTokens,
    Unitary,
    VeRA,
)
from peft_jax.core import Path, Tree, flatten, linear, take_rows, unflatten
from peft_jax.models import quantize_params

METHODS = {
    "full": Full(),
    "ln_tuning": LNTuning(),
    "lora": LoRA(rank=2),
    "lora_on_embedding": LoRA(rank=2),
    "trainable_tokens": TrainableTokens(token_indices=(5, 1, 2, 3, 4)),
    # Scaled by alpha / sqrt(rank), its term would outweigh the base's with the default alpha.
    "lora_rank_stabilized": LoRA(rank=2, alpha=8.0, rank_stabilized=True),
    "dora": DoRA(rank=2),
    "lora_fa": LoRAFA(rank=2),
    "adalora": AdaLoRA(rank=3),
    "lora_ga": LoRAGA(rank=2),
    "lora_ga_peft": LoRAGA(rank=2, convention="peft"),
    "lora_one": LoRAOne(rank=2),
    "eva": EVA(rank=2),
    "pissa": PiSSA(rank=2),
    "pissa_randomized": PiSSA(rank=2, iterations=4),
    "olora": OLoRA(rank=2),
    "loftq": LoftQ(rank=2),
    "loha": LoHa(rank=2),
    "lokr": LoKr(rank=2),
    "gralora": GraLoRA(rank=4, alpha=16.0, hybrid_rank=1),
    "hira": HiRA(rank=2),
    "miss": MiSS(rank=5),
    "vera": VeRA(rank=8, d_initial=4.0),
    "randlora": RandLora(rank=5, alpha=20.0),
    "randlora_held": RandLora(rank=5, alpha=20.0, hold_bases=True),
    "fourierft": FourierFT(n_frequency=60),
    "shira": SHiRA(rank=2),
    "ia3": IA3(feedforward_modules=("down",)),
    "oft": OFT(block_size=4),
    "oft_exact_shared": OFT(block_size=4, neumann_terms=0, share_blocks=True),
    "hra": HRA(rank=4),
    "boft": BOFT(block_size=4, n_butterfly_factors=2),
    "boft_one_factor": BOFT(block_size=3, n_butterfly_factors=1),
    "unitary": Unitary(),
    "hybrid": Hybrid(rank=2, block_size=4),
    "hybrid_random_start": Hybrid(rank=2, block_size=4, gradient_init=False),
    "hybrid_unitary": Hybrid(rank=2, rotation="unitary"),
    "hybrid_some_unitary": Hybrid(rank=2, block_size=4, unitary_modules=("down",)),
}
PLAIN = [name for name in METHODS if not METHODS[name].corrects_quantization]
"""Names of methods tested over kernels that are not quantized."""
ADAPTERS = [name for name in PLAIN if name not in ("full", "ln_tuning")]
QUANTIZED = {
    f"{name} on {quantization}": (name, quantization)
    for name, quantization in (
        ("lora", "int8"),
        *(
            (name, "nf4")
            for name in (
                "lora",
                "dora",
                "lora_ga",
                "pissa",
                "loftq",
                "hira",
                "oft",
                "boft",
                "unitary",
                "hybrid",
            )
        ),
    )
}
"""Names and quantization formats of methods tested over quantized stacked kernels."""
VARIANTS = {
    "ln_tuning",
    "lora_rank_stabilized",
    "lora_fa",
    "lora_ga_peft",
    "lora_one",
    "eva",
    "olora",
    "pissa",
    "pissa_randomized",
    "loha",
    "lokr",
    "gralora",
    "hira",
    "miss",
    "shira",
    "ia3",
    "hra",
    "oft_exact_shared",
    "randlora",
    "randlora_held",
    "fourierft",
    "boft_one_factor",
    "hybrid_random_start",
    "hybrid_some_unitary",
    "hybrid_unitary",
    *(name for name in QUANTIZED if name not in ("lora on int8", "hybrid on nf4")),
}
"""Names whose kind another name covers in the fast suite."""
DETACHED = ("dora",)
"""Methods that take a part of their function as a constant in the gradient, as their paper does."""

TARGETS = {"lora_on_embedding": ("up", "embed")}
"""Modules that a method adapts, where they are not all linear maps."""

LAYERS, WIDTH, HIDDEN, OUT, VOCAB, ROWS = 3, 24, 48, 8, 6, 32
TOKENS = np.arange(ROWS) % VOCAB


def make_params(key: jax.Array, dtype: Any = jnp.float32) -> Tree:
    keys = jax.random.split(key, 5)

    def kernel(key: jax.Array, *shape: int) -> dict[str, jax.Array]:
        return {"kernel": (jax.random.normal(key, shape) / np.sqrt(shape[-2])).astype(dtype)}

    return {
        "embed": {"embedding": jax.random.normal(keys[4], (VOCAB, WIDTH)).astype(dtype)},
        "layers": {
            "up": kernel(keys[0], LAYERS, WIDTH, HIDDEN),
            "down": kernel(keys[1], LAYERS, HIDDEN, WIDTH),
            "norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)},
        },
        "proj": kernel(keys[2], WIDTH, WIDTH),
        "lm_head": kernel(keys[3], WIDTH, OUT),
    }


@functools.partial(jax.jit, static_argnames="scan")
def apply(params: Tree, x: jax.Array, *, scan: bool = True) -> jax.Array:
    def block(x: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        hidden = jnp.tanh(linear(x * layer["norm"]["scale"].astype(x.dtype), layer["up"]["kernel"]))
        return x + linear(hidden, layer["down"]["kernel"]), None

    x = x + take_rows(params["embed"]["embedding"], jnp.asarray(TOKENS)).astype(x.dtype)
    if scan:
        x, _ = jax.lax.scan(block, x, params["layers"])
    else:
        for i in range(LAYERS):
            x, _ = block(x, jax.tree.map(lambda a, i=i: a[i], params["layers"]))
    return linear(jnp.tanh(linear(x, params["proj"]["kernel"])), params["lm_head"]["kernel"])


def loss(params: Tree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    return jnp.mean((apply(params, x) - y).astype(jnp.float32) ** 2)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A small regression with an initial and a perturbed adapter."""

    spec: AdapterSpec
    params: Tree
    originals: Tree
    """Parameters before they were quantized."""
    start: AdapterState
    moved: AdapterState
    batch: tuple[jax.Array, jax.Array]
    loss: Callable[..., jax.Array]
    """Compiled loss of (trainable arrays, constant arrays, parameters, batch)."""
    gradient: Callable[..., Tree]

    def bind(self, state: AdapterState) -> Tree:
        return jax.jit(self.spec.bind)(self.params, state)

    def loss_of(self, trainable: Tree) -> jax.Array:
        return self.loss(trainable, self.start.constant, self.params, self.batch)


@functools.cache
def make_problem(name: str, modules_to_save: tuple[str, ...] = ()) -> Problem:
    key = jax.random.key(0)
    name, quantization = QUANTIZED.get(name, (name, "none"))
    originals = make_params(jax.random.fold_in(key, 1))
    params = quantize_params(originals, quantization)
    x = jax.random.normal(jax.random.fold_in(key, 2), (ROWS, WIDTH))
    batch = (x, apply(make_params(jax.random.fold_in(key, 3)), x))
    spec = AdapterSpec(
        method=METHODS[name],
        target_modules=TARGETS.get(name, "all-linear"),
        modules_to_save=modules_to_save,
    )
    start = spec.init(
        jax.random.fold_in(key, 4), params, loss_fn=loss, batches=[batch], originals=originals
    )
    leaves, tree = jax.tree.flatten(start.trainable)
    moved = [
        leaf + 0.1 * jax.random.normal(jax.random.fold_in(key, 5 + i), leaf.shape)
        for i, leaf in enumerate(leaves)
    ]

    def bound_loss(trainable: Tree, constant: Tree, params: Tree, batch: Any) -> jax.Array:
        return loss(spec.bind(params, AdapterState(trainable, constant)), batch)

    return Problem(
        spec=spec,
        params=params,
        originals=originals,
        start=start,
        moved=start.replace(trainable=jax.tree.unflatten(tree, moved)),
        batch=batch,
        loss=jax.jit(bound_loss),
        gradient=jax.jit(jax.grad(bound_loss)),
    )


def marked(names: Iterable[str]) -> list[Any]:
    """Marks variants as slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in names
    ]


@pytest.fixture(params=marked([*PLAIN, *QUANTIZED]))
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(request.param)


@pytest.fixture(params=marked([*ADAPTERS, *QUANTIZED]))
def adapter_problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(request.param)


def assert_close(actual: Any, expected: Any, tolerance: float, name: Any = "") -> None:
    """Asserts that the error's norm is at most `tolerance` times the norm of `expected`."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape, name
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def test_function_is_unchanged_at_init(problem: Problem) -> None:
    x = problem.batch[0]
    if problem.spec.method.corrects_quantization:
        found, quantized, exact = (
            apply(tree, x)
            for tree in (problem.bind(problem.start), problem.params, problem.originals)
        )
        assert jnp.linalg.norm(found - exact) < 0.9 * jnp.linalg.norm(quantized - exact)
        return
    if getattr(problem.spec.method, "steps_at_start", False):
        assert problem.loss_of(problem.start.trainable) < loss(problem.params, problem.batch)
        return
    assert_close(apply(problem.bind(problem.start), x), apply(problem.params, x), 1e-5)


@pytest.mark.fast("lora", "lora on int8", "lora_on_embedding", "vera", "boft", "unitary", "hybrid")
def test_base_arrays_are_unchanged_by_training(adapter_problem: Problem) -> None:
    problem = adapter_problem
    before = jax.tree.map(np.array, problem.params)
    bound = flatten(problem.spec.bind(problem.params, problem.start))
    for path, leaf in flatten(problem.params).items():
        assert getattr(bound[path], "base", bound[path]) is leaf
    trained, _ = train(problem, steps=3)
    for path, leaf in flatten(trained).items():
        assert not np.array_equal(leaf, flatten(problem.start.trainable)[path]), path
    jax.tree.map(np.testing.assert_array_equal, before, problem.params)


def test_every_trainable_array_has_a_gradient(problem: Problem) -> None:
    gradients = problem.gradient(
        problem.moved.trainable, problem.moved.constant, problem.params, problem.batch
    )
    assert jax.tree.structure(gradients) == jax.tree.structure(problem.start.trainable)
    for path, gradient in flatten(gradients).items():
        assert float(jnp.abs(gradient).max()) > 0, path


def test_gradient_agrees_with_finite_differences(adapter_problem: Problem) -> None:
    problem = adapter_problem
    if problem.spec.method.name in DETACHED:
        pytest.skip("a part of its function is a constant in the gradient")
    here = problem.moved.trainable
    gradient = problem.gradient(here, problem.moved.constant, problem.params, problem.batch)
    for path, leaf in flatten(gradient).items():
        # Checks one array's gradient direction at a time, so that no array hides another's error.
        length = float(jnp.linalg.norm(leaf))
        unit = {path: leaf / length}
        # A float32 loss needs a long step for a small slope. A large slope comes with curvature and
        # needs a short step.
        step = 1e-3 * min(max(0.2, 1.0 / length), 4.0)
        at = {s: float(problem.loss_of(shifted(here, unit, s * step))) for s in (-2, -1, 1, 2)}
        slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
        np.testing.assert_allclose(slope, length, rtol=2e-3, atol=5e-4, err_msg=str(path))


def shifted(tree: Tree, directions: Mapping[Path, jax.Array], step: float) -> Tree:
    return unflatten(
        {
            p: leaf + step * directions[p] if p in directions else leaf
            for p, leaf in flatten(tree).items()
        }
    )


def test_merged_and_bound_agree(problem: Problem) -> None:
    x = problem.batch[0]
    bound = apply(problem.bind(problem.moved), x)
    merged = problem.spec.merge(problem.params, problem.moved)
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(merged).values())
    assert_close(apply(merged, x), bound, 1e-5)
    assert not np.allclose(bound, apply(problem.params, x), atol=1e-3)


def test_merge_rejects_nan(adapter_problem: Problem) -> None:
    problem = adapter_problem
    bad = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), problem.start.trainable)
    with pytest.raises(ValueError, match=r"(layers\.(up|down)|embed) .*finite"):
        problem.spec.merge(problem.params, problem.start.replace(trainable=bad))


def test_stacked_equals_unrolled(problem: Problem) -> None:
    bound = problem.bind(problem.moved)
    x = problem.batch[0]
    assert_close(apply(bound, x, scan=True), apply(bound, x, scan=False), 1e-5)


@pytest.mark.fast("full", "lora", "lora on int8", "dora", "oft", "boft", "unitary", "hybrid")
def test_bfloat16_agrees_with_float32(problem: Problem) -> None:
    exact = apply(problem.bind(problem.moved), problem.batch[0])
    rounded_params = unflatten(
        {path: leaf.astype(jnp.bfloat16) for path, leaf in flatten(problem.params).items()}
    )
    bound = jax.jit(problem.spec.bind)(rounded_params, problem.moved)
    rounded = apply(bound, problem.batch[0].astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    # A bfloat16 has 8 significant bits, and the network has four products in sequence. A hybrid
    # adds a second branch to each of its two maps, and so that branch's error.
    products = 6 if problem.spec.method.branches else 4
    assert_close(rounded, exact, products * 2**-7)


@pytest.mark.fast("full", "lora", "lora on int8", "lora_ga", "dora", "oft", "boft", "hybrid on nf4")
def test_sharded_equals_unsharded(problem: Problem) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))

    def place(leaf: jax.Array, *spec: str | None) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    def shard(leaf: jax.Array) -> jax.Array:
        return place(leaf, *[None] * (leaf.ndim - 1), "fsdp" if leaf.shape[-1] % 2 == 0 else None)

    unsharded = problem.gradient(
        problem.moved.trainable, problem.moved.constant, problem.params, problem.batch
    )
    sharded = problem.gradient(
        jax.tree.map(shard, problem.moved.trainable),
        jax.tree.map(shard, problem.moved.constant),
        jax.tree.map(shard, problem.params),
        tuple(place(a, "data") for a in problem.batch),
    )
    for path, leaf in flatten(unsharded).items():
        assert_close(flatten(sharded)[path], leaf, 1e-4, path)


@pytest.mark.fast("full", "lora", "lora on int8", "adalora", "boft", "unitary", "hybrid")
def test_training_converges_with_one_compilation(problem: Problem) -> None:
    first = float(problem.loss_of(problem.start.trainable))
    trained, traces = train(problem, steps=150)
    assert traces == 1
    assert float(problem.loss_of(trained)) < 0.8 * first


def test_abstract_state_agrees_with_init(problem: Problem) -> None:
    abstract = problem.spec.abstract(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), problem.params)
    )
    expected = jax.tree.map(lambda a: (a.shape, a.dtype), problem.start)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == expected


def test_every_array_axis_has_a_logical_name(problem: Problem) -> None:
    kernel_axes = unflatten(
        {p: ("layers", "in", "out")[-a.ndim :] for p, a in flatten(problem.params).items()}
    )
    axes = problem.spec.axes(problem.params, kernel_axes)
    for tree, names in (
        (problem.start.trainable, axes.trainable),
        (problem.start.constant, axes.constant),
    ):
        flat = flatten(names)
        assert flat.keys() == flatten(tree).keys()
        for path, leaf in flatten(tree).items():
            assert len(flat[path]) == leaf.ndim, path


def test_frozen_parameters_exclude_trainable_leaves() -> None:
    problem = make_problem("lora", modules_to_save=("lm_head",))
    frozen = problem.spec.frozen(problem.params)
    assert "lm_head" not in frozen
    x = problem.batch[0]
    bound = problem.spec.bind(frozen, problem.start)
    assert_close(apply(bound, x), apply(problem.params, x), 1e-6)
    full = make_problem("full")
    assert full.spec.frozen(full.params) == {}


def test_quantized_leaves_cannot_be_trained_in_full() -> None:
    params = quantize_params(make_params(jax.random.key(0)), "int8")
    with pytest.raises(ValueError, match=r"layers\.down, layers\.up .*quantized"):
        AdapterSpec(method=Full()).targets(params)
    with pytest.raises(ValueError, match=r"layers\.up .*quantized"):
        AdapterSpec(method=LoRA(rank=2), target_modules=("down",), modules_to_save=("up",)).targets(
            params
        )


def train(problem: Problem, *, steps: int) -> tuple[Tree, int]:
    optimizer = optax.adam(1e-2)
    traces = 0

    @jax.jit
    def step(trainable: Tree, opt_state: Any) -> tuple[Tree, Any]:
        nonlocal traces
        traces += 1
        gradient = problem.gradient(
            trainable, problem.start.constant, problem.params, problem.batch
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(trainable, updates), opt_state

    trainable, opt_state = problem.start.trainable, optimizer.init(problem.start.trainable)
    # Optax relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            trainable, opt_state = step(trainable, opt_state)
    return trainable, traces
