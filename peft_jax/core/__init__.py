"""What every other part stands on: kernels that know how to multiply, and trees addressed by path.

- [`activations`][peft_jax.core.activation_axes]: how activations lie on a mesh, for kernels.
- [`convert`][peft_jax.core.typed_settings]: mappings to frozen dataclasses and back.
- [`kernel`][peft_jax.core.kernel]: `AdaptedKernel`, `linear`.
- [`patterns`][peft_jax.core.patterns]: regular expressions of others, with an end to their time.
- [`quantized`][peft_jax.core.quantized]: frozen kernels in 8 or 4 bits, `quantize`, `dequantize`.
- [`trees`][peft_jax.core.trees]: nested dictionaries of arrays as flat paths, and back.
- [`suggest`][peft_jax.core.suggest]: the nearest known name, for error messages.
"""

from peft_jax.core.kernel import LINEAR_OUTPUT, AdaptedKernel, Kernel, Method, dense, linear
from peft_jax.core.quantized import (
    FORMATS,
    abstract_quantized,
    bytes_of,
    dequantize,
    format_of,
    is_quantized_leaf,
    quantize,
    quantized_axes,
    storage_dtype,
)
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
    "FORMATS",
    "LINEAR_OUTPUT",
    "STACKED",
    "AdaptedKernel",
    "Kernel",
    "Method",
    "Path",
    "Tree",
    "abstract_quantized",
    "bytes_of",
    "dense",
    "dequantize",
    "did_you_mean",
    "flatten",
    "format_of",
    "is_quantized_leaf",
    "is_stacked",
    "join_path",
    "linear",
    "quantize",
    "quantized_axes",
    "storage_dtype",
    "unflatten",
]
