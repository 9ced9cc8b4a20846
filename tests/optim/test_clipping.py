"""Tests clipping by group against optax's clipping of each group alone."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.optim import GroupClipping, OptimizerSettings, ScheduleSettings, make_optimizer

CONSTANT = ScheduleSettings(name="constant")
BRANCHES = ("low_rank", "rotation")


def gradients(low=1.0, rotation=1.0, head=1.0):
    """Returns random gradients of a hybrid and a head, whose parts have the given norms."""
    rng = np.random.default_rng(0)

    def leaves(norm, *shapes):
        parts = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        whole = np.sqrt(sum(np.square(part).sum() for part in parts))
        return [jnp.asarray(part * np.float32(norm / whole)) for part in parts]

    a, b = leaves(low, (2, 6, 3), (2, 3, 6))
    r, scale = leaves(rotation, (2, 3), (2, 6))
    (kernel,) = leaves(head, (6, 2))
    branches = {"low_rank": {"a": a, "b": b}, "rotation": {"r": r, "scale": scale}}
    return {"layers": {"q_proj": {"kernel": branches}}, "classifier": {"kernel": kernel}}


@hypothesis.given(norms=st.tuples(*[st.floats(1e-3, 1e3) for _ in range(3)]))
@hypothesis.settings(max_examples=30)
def test_each_group_is_clipped_as_if_alone(norms):
    tree = gradients(*norms)
    clipping = GroupClipping(1.0, BRANCHES)
    clipped, factors = clipping.clip(tree), clipping.factors(tree)
    alone = optax.clip_by_global_norm(1.0)
    branches, kernel = tree["layers"]["q_proj"]["kernel"], clipped["layers"]["q_proj"]["kernel"]
    for name in BRANCHES:
        wanted, _ = alone.update(branches[name], optax.EmptyState())
        jax.tree.map(np.testing.assert_array_equal, kernel[name], wanted)
    wanted, _ = alone.update(tree["classifier"], optax.EmptyState())
    jax.tree.map(np.testing.assert_array_equal, clipped["classifier"], wanted)
    assert factors.keys() == {*BRANCHES, "rest"}
    for name, norm in zip((*BRANCHES, "rest"), norms, strict=True):
        np.testing.assert_allclose(factors[name], min(1.0, 1.0 / norm), rtol=1e-5)


def test_without_named_groups_it_is_optax_clipping_to_the_bit():
    tree = gradients(3.0, 40.0, 0.1)
    clipping = GroupClipping(1.0)
    wanted, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    jax.tree.map(np.testing.assert_array_equal, clipping.clip(tree), wanted)
    assert clipping.factors(tree).keys() == {"all"}


@pytest.mark.parametrize("grown", ["rotation", "classifier"])
def test_a_larger_gradient_does_not_change_the_steps_of_another_group(grown):
    settings = OptimizerSettings(
        name="sgd", learning_rate=0.1, learning_rates={"classifier": 1.0}, schedule=CONSTANT
    )
    optimizer = make_optimizer(settings, 10)

    def steps(**norms):
        tree = gradients(**norms)
        updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
        return updates["layers"]["q_proj"]["kernel"]["low_rank"]

    sizes = {"head" if grown == "classifier" else grown: 1e4}
    jax.tree.map(np.testing.assert_array_equal, steps(), steps(**sizes))


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_state_has_the_structure_of_version_0_1(clip_norm):
    """Checkpoints of 0.1 hold the state of this composition."""
    settings = OptimizerSettings(weight_decay=0.1, clip_norm=clip_norm, schedule=CONSTANT)
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    before = optax.chain(
        *clip,
        optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=_all), optax.scale(-1.0)
        ),
        optax.scale_by_schedule(lambda step: 0.1),
    )
    tree = gradients()
    paths = [
        [path for path, _ in jax.tree.leaves_with_path(optimizer.init(tree))]
        for optimizer in (before, make_optimizer(settings, 10))
    ]
    assert paths[0] == paths[1]


def _all(tree):
    return jax.tree.map(lambda _: True, tree)


def test_a_norm_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"max_norm .*-1"):
        GroupClipping(-1.0)
