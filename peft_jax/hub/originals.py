"""Reads single kernels of a checkpoint, as they are before they are quantized."""

from pathlib import Path as FilePath

import numpy as np
from jaxtyping import Float

from peft_jax.adapters.quantization_error import Originals
from peft_jax.core import Path, flatten
from peft_jax.hub.load import open_sources
from peft_jax.models import Model, TrainableModel


def original_kernels(model: TrainableModel) -> Originals:
    """Returns a function that reads single kernels of a model's checkpoint, in float32.

    Args:
      model: Model whose parameters were loaded, such as `load_model` returns it.

    Raises:
      ValueError: The files of the model are not known.
    """
    if not isinstance(model, Model) or not model.origin:
        raise ValueError(
            "the checkpoint of the model is not known, so its kernels before they were quantized"
            " cannot be read; load the model with load_model, or give the parameters themselves"
        )
    sources = open_sources(FilePath(model.origin), model, new_head=True)
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract_params()).items()}

    def read(path: Path, place: tuple[int, ...]) -> Float[np.ndarray, "d_in d_out"]:
        d_in, d_out = shapes[path][-2:]
        kernel = np.empty((*[1] * len(place), d_in, d_out), np.float32)
        at = [(index, index + 1) for index in place]
        sources[path].read_into(kernel, (*at, (0, d_in), (0, d_out)))
        return kernel.reshape(d_in, d_out)

    return read
