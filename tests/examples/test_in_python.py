"""Tests the examples of training from Python."""

import jax
import numpy as np
import optax
import pytest

from examples import own_loop, pairwise_loss
from peft_jax.models import build_model


@pytest.mark.slow
def test_pairwise_loss_makes_the_better_answer_likelier():
    losses = pairwise_loss.train()
    np.testing.assert_allclose(
        losses[0], np.log(2), rtol=1e-5
    )  # the adapter is still at its initialization
    assert np.mean(losses[-5:]) < 0.4


@pytest.mark.slow
def test_custom_loop_keeps_the_best_adapter():
    losses, merged = own_loop.train()
    assert min(losses) < 0.5 * losses[0]
    batch = own_loop.make_batch(-1 % 2**32)
    logits = build_model(own_loop.CONFIG)(merged, jax.numpy.asarray(batch.tokens))
    with jax.numpy_dtype_promotion("standard"):
        found = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    mean = float((found * batch.loss_mask).sum() / batch.loss_mask.sum())
    np.testing.assert_allclose(mean, min(losses), rtol=1e-4)
