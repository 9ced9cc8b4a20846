"""The arithmetic of a training step, and what share of the devices' peak a run makes of it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from peft_jax.adapters.sketch import kernel_shape
from peft_jax.core import Path, flatten, is_stacked
from peft_jax.cost import FlopCount, count_flops, count_jaxpr, find_chip
from peft_jax.models import SequenceClassifier
from peft_jax.models.attention import choose_attention
from peft_jax.training.blueprint import Blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepArithmetic:
    """Floating-point operations of one step, over all devices together.

    What the model and its gradient take, counted once: nothing that is computed again to save
    memory. Attention counts every pair of tokens, as is usual (Chowdhery et al., 2022, arXiv
    2204.02311, appendix B), though a causal one needs half of them.

    Attributes:
      base: products with the model's kernels, the head's included. A frozen kernel takes part in
        two, forwards and for the gradient of its input; a trained one in a third.
      attention: products of queries, keys, weights and values.
      adapters: everything else: the adapters' products, decompositions and transforms.
      computed: what a step computes all in all, with what it computes again for the backward pass.
    """

    base: float
    attention: float
    adapters: float
    computed: float

    @property
    def total(self) -> float:
        """All that the model and its gradient take."""
        return self.base + self.attention + self.adapters


def count_step(blueprint: Blueprint) -> StepArithmetic:
    """The arithmetic of one step, counted from its program; nothing is compiled.

    Raises:
      RuntimeError: the program has loops whose number of rounds it computes, which cannot be
        counted.
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
    """Returns `StepArithmetic.total` alone, for a run that has traced its step anyway.

    Args:
      blueprint: the run's.
      traced: the step's program; where it is the plain one, it is what is counted.
      say: told why nothing could be counted.

    Returns:
      The operations, or None where they could not be counted: a run does not depend on them.
    """
    try:
        if _is_plain(blueprint):
            return _known(count_jaxpr(traced.jaxpr.jaxpr))
        return _count(blueprint, remat="none")
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        say(
            "the operations of a step were not counted, so the summary has neither a rate nor a"
            f" utilization: {type(error).__name__}: {reason}"
        )
        return None


def _is_plain(blueprint: Blueprint) -> bool:
    """Whether a step's program computes nothing twice, on one device, and has countable loops."""
    execution, tokens = blueprint.model.execution, blueprint.config.train.max_length
    # A fused kernel is no product that could be counted.
    fused = blueprint.mesh.devices.flat[0].platform == "gpu"
    attention = choose_attention(
        execution.attention,
        tokens=tokens,
        keys=tokens,
        why_not_fused=None if fused else "this is no GPU",
    )
    dense = attention == "dense"
    return dense and execution.remat == "none" and blueprint.mesh.size == 1


def _count(blueprint: Blueprint, *, remat: str) -> float:
    # Dense attention: of the chunked kind's loops nobody knows how often they run.
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
    """How many vectors a kernel is multiplied by in a step; a classifier's head takes one a row."""
    if isinstance(blueprint.model, SequenceClassifier) and not is_stacked(path):
        return blueprint.config.train.batch_size
    return _tokens(blueprint)


def _base(blueprint: Blueprint) -> float:
    """Two or three products for each kernel: its numbers times the tokens times two."""
    flat = flatten(blueprint.params)
    trained = set(blueprint.spec.targets(blueprint.params).trained)
    flops = 0.0
    for path, leaf in flat.items():
        if path[-1] == "kernel" or _is_tied_head(blueprint, path):
            products = 3 if path in trained else 2
            flops += 2.0 * math.prod(kernel_shape(leaf)) * products * _inputs(blueprint, path)
    return flops


def _is_tied_head(blueprint: Blueprint, path: Path) -> bool:
    tied = getattr(blueprint.model.config, "tie_word_embeddings", False)
    return tied and path[-1] == "embedding" and not is_stacked(path)


def _attention(blueprint: Blueprint) -> float:
    """Scores and weighted values, forwards and twice backwards."""
    config: Any = blueprint.model.config
    pairs = _tokens(blueprint) * blueprint.config.train.max_length
    return 12.0 * pairs * config.num_heads * config.head_dim * config.num_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utilization:
    """How much a run computes a second.

    Attributes:
      flops_per_second: of `StepArithmetic.total`, over all devices.
      share_of_peak: of what the devices' makers state for bfloat16; None where that is not known.
    """

    flops_per_second: float
    share_of_peak: float | None


def measure_utilization(flops: float, seconds: float, devices: Sequence[jax.Device]) -> Utilization:
    """What steps of so many FLOPs and seconds make of the devices they run on."""
    rate = flops / seconds
    chip = find_chip(devices[0].device_kind)
    share = None if chip is None else rate / (chip.flops * len(devices))
    return Utilization(flops_per_second=rate, share_of_peak=share)
