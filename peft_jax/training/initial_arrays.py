"""Loads the base model's parameters, and initializes a run's adapter."""

from collections.abc import Callable

import jax

from peft_jax.adapters import AdapterState
from peft_jax.core import Tree
from peft_jax.data import AnyBatch
from peft_jax.hub import load_params
from peft_jax.training.prepare import Job

_ADAPTER_KEY, _BASE_KEY, _HEAD_KEY = range(3)
"""Numbers that are folded into the key of a run's seed."""


def load_base(job: Job, params: Tree | None = None) -> Tree:
    """Returns the base model's parameters, sharded over the devices.

    Args:
      job: A prepared run.
      params: Parameters that are loaded already. Default: those of the checkpoint, or random ones
        if `model.weights` is "random".
    """
    model = job.config.model
    if params is not None:
        return job.place_base(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, job.params)
    if model.weights == "checkpoint":
        return load_params(
            job.folder,
            job.model,
            dtype=model.dtype,
            quantization=model.quantization,
            sharding=shardings,
            head_key=_key(job, _HEAD_KEY) if job.new_head else None,
        )
    make = jax.jit(
        lambda key: job.model.init_params(key, model.dtype, model.quantization),
        out_shardings=shardings,
    )
    return make(_key(job, _BASE_KEY))


def initialize_adapter(
    job: Job,
    params: Tree,
    *,
    microbatches: Callable[[], list[AnyBatch]],
    say: Callable[[str], None],
) -> AdapterState:
    """Returns a new adapter, from the gradient or the inputs if the method needs them.

    Args:
      job: A prepared run.
      params: Parameters of the base model.
      microbatches: Reads the first microbatches of the run, if the method needs them.
      say: Is told what the adapter is initialized from.
    """
    batches = None
    method = job.config.spec.method
    if method.start_rank:
        batches = microbatches()
        what = "inputs" if method.input_rank else "gradient"
        say(f"initializing the adapter from the {what} of {len(batches)} microbatches")
    return job.initialize(_key(job, _ADAPTER_KEY), params, batches)


def _key(job: Job, number: int) -> jax.Array:
    """Returns a random key of the run."""
    return jax.random.fold_in(jax.random.key(job.config.seed), number)
