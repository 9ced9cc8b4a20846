"""Loads the adapter that a run starts from instead of a new one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.adapters import AdapterSpec, AdapterState, Targets
from peft_jax.core import Path, Tree, flatten, join_path, unflatten
from peft_jax.hub import find_folder, load_adapter
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.prepare import Job

_OF_TRAINING = frozenset(
    {
        "dropout",
        "rotation_dropout",
        "direction",
        "init_scale",
        "gamma",
        "convention",
        "gradient_init",
        "start",
        "start_tokens",
    }
)
"""Settings of methods that do not change what an adapter computes."""

_NAMED_AT_MOST = 4


def load_start(job: Job) -> AdapterState:
    """Loads the adapter that a run starts from, ours or Hugging Face PEFT's.

    Args:
      job: Job of the run, whose configuration names the adapter.

    Returns:
      Arrays of the adapter on the first local device, in the dtypes of training.

    Raises:
      RefusedError: There is no such adapter, or its method, modules or base model are not the
        run's.
    """
    settings = job.config.adapter
    try:
        folder = find_folder(settings.path, revision=settings.revision or None)
        spec, state = load_adapter(folder, job.model, job.params)
    except (ValueError, OSError) as error:
        raise RefusedError(f"adapter.path: {error}") from error
    _check_same(spec, job.spec, job.params, where=settings.path)
    return AdapterState(
        trainable=_as_trained(state.trainable, job.state.trainable),
        constant=_as_trained(state.constant, job.constant),
    )


def _as_trained(tree: Tree, abstract: Tree) -> Tree:
    """Returns arrays in the dtypes of training."""
    return jax.tree.map(
        lambda x, leaf: jnp.asarray(x).astype(leaf.dtype), unflatten(flatten(tree)), abstract
    )


def _check_same(given: AdapterSpec, wanted: AdapterSpec, params: Tree, *, where: str) -> None:
    """Rejects an adapter that differs from the one the run trains."""
    theirs, ours = given.targets(params), wanted.targets(params)
    of_method = _other_settings(given.method, wanted.method)
    if given.share_experts != wanted.share_experts:
        of_method.append(
            f"method.share_experts is {wanted.share_experts}, but the adapter's is"
            f" {given.share_experts}"
        )
    faults = of_method or [
        *_other_modules(theirs, ours),
        *_other_kernels(theirs, ours),
        *_other_layers(theirs, ours),
    ]
    if faults:
        raise RefusedError(
            f"adapter.path is {where}, which differs from what this run trains:"
            f" {'; '.join(faults)}. Give the adapter's method and modules"
        )


def _other_settings(given: Any, wanted: Any) -> list[str]:
    """Returns the relevant settings in which two methods differ, as text."""
    if given.name != wanted.name:
        return [f"method.name is {wanted.name!r}, but the adapter's is {given.name!r}"]
    return [
        f"method.{field.name} is {getattr(wanted, field.name)!r}, but the adapter's is"
        f" {getattr(given, field.name)!r}"
        for field in dataclasses.fields(wanted)
        if field.name not in _OF_TRAINING
        and getattr(given, field.name) != getattr(wanted, field.name)
    ]


def _other_modules(theirs: Targets, ours: Targets) -> list[str]:
    """Returns the modules that only one of two targets has, as text."""
    faults = []
    for what, one, other in (
        ("adapts", set(theirs.adapted), set(ours.adapted)),
        ("trains in full", set(theirs.trained), set(ours.trained)),
    ):
        if only := one - other:
            faults.append(f"the adapter {what} {_listing(only)}, but the run does not")
        if only := other - one:
            faults.append(f"the run {what} {_listing(only)}, but the adapter does not")
    return faults


def _other_kernels(theirs: Targets, ours: Targets) -> list[str]:
    """Returns how the methods of single kernels differ, as text."""
    return [
        f"at {join_path(path[:-1])} {fault}"
        for path in sorted(set(theirs.adapted) & set(ours.adapted))
        for fault in _other_settings(theirs.adapted[path].of_one, ours.adapted[path].of_one)
    ][:_NAMED_AT_MOST]


def _other_layers(theirs: Targets, ours: Targets) -> list[str]:
    """Returns the modules whose layers differ between two targets, as text."""
    faults = []
    for path in sorted({*theirs.by_layer, *ours.by_layer} & {*theirs.adapted} & {*ours.adapted}):
        count = len(theirs.by_layer.get(path) or ours.by_layer[path])
        pairs = zip(theirs.layers(path, count), ours.layers(path, count), strict=True)
        if any(
            (given is None) != (wanted is None)
            or (given and wanted and _other_settings(given.of_one, wanted.of_one))
            for given, wanted in pairs
        ):
            faults.append(f"the layers of {join_path(path[:-1])} are not the adapter's")
    return faults


def _listing(paths: set[Path]) -> str:
    names = sorted({join_path(path) for path in paths})
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
