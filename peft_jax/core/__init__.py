"""The base of the package: adapted and quantized kernels, parameter trees and typed settings.

- [`activation_axes`][peft_jax.core.activation_axes]: mesh axes that shard activations.
- [`typed_settings`][peft_jax.core.typed_settings]: mappings to frozen dataclasses and back.
- [`kernel`][peft_jax.core.kernel]: `AdaptedKernel`, `linear`, `take_rows`.
- [`grouped`][peft_jax.core.grouped]: `grouped_linear`, by the kernel of each row's group.
- [`patterns`][peft_jax.core.patterns]: users' regular expressions, matched with a time limit.
- [`product_names`][peft_jax.core.product_names]: names of products, for rematerialization.
- [`quantized`][peft_jax.core.quantized]: frozen kernels in 8 or 4 bits, `quantize`, `dequantize`.
- [`trees`][peft_jax.core.trees]: nested dictionaries of arrays as flat paths, and back.
- [`virtual_tokens`][peft_jax.core.virtual_tokens]: `VirtualTokens`, trained in place of kernels.
- [`scopes`][peft_jax.core.scopes]: `part`, which marks the parts of a training step.
- [`suggest`][peft_jax.core.suggest]: near matches of an unknown name, for error messages.
- [`validation`][peft_jax.core.validation]: range checks of settings.
"""

from peft_jax.core.grouped import GroupedMethod, grouped_linear, kernel_of_groups
from peft_jax.core.kernel import (
    AdaptedKernel,
    Kernel,
    Method,
    ShardedMethod,
    dense,
    linear,
    take_rows,
)
from peft_jax.core.product_names import LINEAR_OUTPUT, name_product, named_products
from peft_jax.core.quantized import (
    FORMATS,
    abstract_quantized,
    bytes_of,
    dequantize,
    format_of,
    forward_format,
    is_quantized_leaf,
    quantize,
    quantized_axes,
    storage_dtype,
)
from peft_jax.core.suggest import did_you_mean
from peft_jax.core.trees import (
    EMBEDDING,
    KERNEL,
    LOW_RANK,
    ROTATION,
    SHARED,
    STACKED,
    TABLE,
    UNTRAINED,
    Path,
    Tree,
    flatten,
    has_experts_axis,
    is_experts,
    is_router,
    is_stacked,
    join_path,
    names_of,
    unflatten,
)
from peft_jax.core.virtual_tokens import VIRTUAL, VirtualTokens

__all__ = [
    "EMBEDDING",
    "FORMATS",
    "KERNEL",
    "LINEAR_OUTPUT",
    "LOW_RANK",
    "ROTATION",
    "SHARED",
    "STACKED",
    "TABLE",
    "UNTRAINED",
    "VIRTUAL",
    "AdaptedKernel",
    "GroupedMethod",
    "Kernel",
    "Method",
    "Path",
    "ShardedMethod",
    "Tree",
    "VirtualTokens",
    "abstract_quantized",
    "bytes_of",
    "dense",
    "dequantize",
    "did_you_mean",
    "flatten",
    "format_of",
    "forward_format",
    "grouped_linear",
    "has_experts_axis",
    "is_experts",
    "is_quantized_leaf",
    "is_router",
    "is_stacked",
    "join_path",
    "kernel_of_groups",
    "linear",
    "name_product",
    "named_products",
    "names_of",
    "quantize",
    "quantized_axes",
    "storage_dtype",
    "take_rows",
    "unflatten",
]
