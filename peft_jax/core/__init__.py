"""What every other part stands on: kernels that know how to multiply, and trees addressed by path.

- [`activations`][peft_jax.core.activations]: how activations lie on a mesh, for kernels.
- [`kernel`][peft_jax.core.kernel]: `AdaptedKernel`, `linear`.
- [`trees`][peft_jax.core.trees]: nested dictionaries of arrays as flat paths, and back.
- [`suggest`][peft_jax.core.suggest]: the nearest known name, for error messages.
"""

from peft_jax.core.kernel import AdaptedKernel, Kernel, Method, linear
from peft_jax.core.suggest import did_you_mean
from peft_jax.core.trees import (
    STACKED,
    Path,
    Tree,
    flatten,
    is_stacked,
    join_path,
    unflatten,
)

__all__ = [
    "STACKED",
    "AdaptedKernel",
    "Kernel",
    "Method",
    "Path",
    "Tree",
    "did_you_mean",
    "flatten",
    "is_stacked",
    "join_path",
    "linear",
    "unflatten",
]
