"""Counts the operations of a training step, and computes a run's utilization."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from peft_jax.adapters.gradient_products import kernel_shape
from peft_jax.core import Path, flatten, is_stacked
from peft_jax.cost import FlopCount, count_flops, count_jaxpr, find_chip
from peft_jax.models import SequenceClassifier
from peft_jax.models.attention import choose_attention
from peft_jax.models.decoder import DecoderConfig
from peft_jax.training.blueprint import Blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepArithmetic:
    """Floating-point operations of one step, over all devices.

    `total` counts the operations of the model and its gradient once, without rematerialization.
    Attention counts every pair of tokens, as is usual (Chowdhery et al., 2022, arXiv 2204.02311,
    appendix B), though causal attention needs only half of them.

    Attributes:
      base: Products with the model's kernels, including the head. A frozen kernel takes part in
        two products, forward and for the gradient of its input, and a trainable one in a third.
      attention: Products of queries, keys, attention weights and values.
      adapters: All other operations: the adapters' products, decompositions and transforms.
      computed: Operations that a step computes, including rematerialization.
    """

    base: float
    attention: float
    adapters: float
    computed: float

    @property
    def total(self) -> float:
        """Operations of the model and its gradient."""
        return self.base + self.attention + self.adapters


def count_step(blueprint: Blueprint) -> StepArithmetic:
    """Counts the operations of one step from its traced program, without compiling.

    Raises:
      RuntimeError: The program has loops with computed trip counts.
    """
    remat = blueprint.model.execution.remat
    total = _count(blueprint, remat="none")
    base, attention = _base(blueprint), _attention(blueprint)
    return StepArithmetic(
        base=base,
        attention=attention,
        adapters=total - base - attention,
        computed=total if remat == "none" else _count(blueprint, remat=remat),
    )


def count_step_flops(
    blueprint: Blueprint, traced: jax.stages.Traced, *, say: Callable[[str], None]
) -> float | None:
    """Returns only `StepArithmetic.total`, for a run that has already traced its step.

    Args:
      blueprint: Blueprint of the run.
      traced: Traced step, which is counted if it is suitable.
      say: Prints why operations could not be counted.

    Returns:
      The operations; None if they could not be counted, because a run does not depend on them.
    """
    try:
        if _is_plain(blueprint):
            return _known(count_jaxpr(traced.jaxpr.jaxpr))
        return _count(blueprint, remat="none")
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        say(
            "the operations of a step were not counted, so the summary has no utilization:"
            f" {type(error).__name__}: {reason}"
        )
        return None


def _is_plain(blueprint: Blueprint) -> bool:
    """Returns whether a step runs on one device, without rematerialization, with known loops."""
    execution, tokens = blueprint.model.execution, blueprint.config.train.max_length
    # The operations of a fused attention kernel cannot be counted.
    fused = blueprint.mesh.devices.flat[0].platform != "cpu"
    attention = choose_attention(
        execution.attention,
        tokens=tokens,
        keys=tokens,
        why_not_fused=None if fused else "a CPU has no kernel",
    )
    dense = attention == "dense"
    return dense and execution.remat == "none" and blueprint.mesh.size == 1


def _count(blueprint: Blueprint, *, remat: str) -> float:
    # Counts dense attention, because the trip counts of chunked attention's loops are computed.
    execution = dataclasses.replace(blueprint.model.execution, remat=remat, attention="dense")
    other = dataclasses.replace(blueprint, model=blueprint.model.with_execution(execution))
    return _known(
        count_flops(other.train_step(), other.state, other.frozen, other.constant, other.batch)
    )


def _known(count: FlopCount) -> float:
    if count.unknown_loops:
        raise RuntimeError(
            f"the step has {count.unknown_loops} loops that cannot be counted; this is a bug"
        )
    return count.flops


def _tokens(blueprint: Blueprint) -> int:
    return blueprint.config.train.batch_size * blueprint.config.train.max_length


def _inputs(blueprint: Blueprint, path: Path) -> int:
    """Returns a kernel's number of input vectors per step; a classifier's head has one per row."""
    model = blueprint.model
    if isinstance(model, SequenceClassifier) and path in model.head_leaves:
        return blueprint.config.train.batch_size
    return _tokens(blueprint)


def _base(blueprint: Blueprint) -> float:
    """Counts two or three products of each kernel: 2 x kernel size x tokens each.

    Of experts' kernels, only those count that a token chooses.
    """
    flat = flatten(blueprint.params)
    trained = set(blueprint.spec.targets(blueprint.params).trained)
    flops = 0.0
    for path, leaf in flat.items():
        if path[-1] == "kernel" or _is_tied_head(blueprint, path):
            products = 3 if path in trained else 2
            active = blueprint.model.active_share(path)
            size = active * math.prod(kernel_shape(leaf))
            flops += 2.0 * size * products * _inputs(blueprint, path)
    return flops


def _is_tied_head(blueprint: Blueprint, path: Path) -> bool:
    tied = getattr(blueprint.model.config, "tie_word_embeddings", False)
    return tied and path[-1] == "embedding" and not is_stacked(path)


def _attention(blueprint: Blueprint) -> float:
    """Counts attention scores and weighted values, once forward and twice backward."""
    config: Any = blueprint.model.config
    pairs = _tokens(blueprint) * blueprint.config.train.max_length
    if isinstance(config, DecoderConfig):
        dims = sum(sum(config.head_dims(kind)) for kind in config.layers)
    else:
        dims = 2 * config.head_dim * config.num_layers
    return 6.0 * pairs * config.num_heads * dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utilization:
    """Operations per second of a run, and their share of the peak.

    Attributes:
      flops_per_second: `StepArithmetic.total` per second, over all devices.
      share_of_peak: Share of the vendor's bfloat16 peak rate; None if it is unknown.
    """

    flops_per_second: float
    share_of_peak: float | None


def measure_utilization(flops: float, seconds: float, devices: Sequence[jax.Device]) -> Utilization:
    """Returns the utilization of steps with this number of operations and seconds."""
    rate = flops / seconds
    chip = find_chip(devices[0].device_kind)
    share = None if chip is None else rate / (chip.flops * len(devices))
    return Utilization(flops_per_second=rate, share_of_peak=share)
