"""Counts and lists trainable parameters."""

import dataclasses
import math
from typing import Any

import jax
from qwix import QArray

from peft_jax.adapters.gradient_products import has_stack, kernel_shape
from peft_jax.adapters.spec import AdapterSpec, AdapterState
from peft_jax.adapters.target_settings import Targets
from peft_jax.adapters.virtual_method import virtual_arrays
from peft_jax.core import Path, Tree, flatten, is_stacked, join_path


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of trainable and of all parameters.

    Attributes:
      trainable: Number of trainable parameters.
      total: Number of parameters of model and adapter; a leaf trained in full counts once.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Percentage of parameters that are trainable."""
        return 100.0 * self.trainable / self.total


def count_parameters(spec: AdapterSpec, params: Tree, state: AdapterState) -> ParameterCount:
    """Counts parameters as Hugging Face PEFT's `print_trainable_parameters` does.

    Args:
      spec: Specification of the adapter.
      params: Model parameters, including leaves trained in full; arrays or shapes.
      state: State of the adapter; arrays or shapes.
    """
    targets = spec.targets(params)
    padding = sum(_padding(targets, path, params, state) for path in targets.by_layer)
    trainable = _size(state.trainable) - padding
    return ParameterCount(trainable, _size(spec.frozen(params)) + trainable)


def trainable_table(spec: AdapterSpec, params: Tree, state: AdapterState) -> str:
    """Returns a table of trainable parameters: one line per module, and the totals.

    A line covers a module of all layers, because layers are stacked.

    Args:
      spec: Specification of the adapter.
      params: Model parameters, including leaves trained in full; arrays or shapes.
      state: State of the adapter; arrays or shapes.

    Returns:
      Lines of module, number and shape of kernels, method and number of trainable parameters.
    """
    targets = spec.targets(params)
    flat = flatten(params)
    paths = [*targets.adapted, *targets.trained]
    learned = flatten(state.trainable, is_leaf=lambda path, _: path in set(paths))
    rows = [("module", "kernels", "method", "trainable")]
    for path in paths:
        shape = kernel_shape(flat[path])
        stacked = is_stacked(path) or (path in targets.adapted and has_stack(flat[path]))
        one = list(shape[1:] if stacked else shape)
        kernels = f"{shape[0]} x {one}" if stacked else str(one)
        name = join_path(path[:-1] if path in targets.adapted else path)
        method = _label(targets, path) if path in targets.adapted else "full"
        size = _size(learned[path]) - _padding(targets, path, params, state)
        rows.append((name, kernels, method, f"{size:,}"))
    for path, array in virtual_arrays(state.trainable).items():
        name, size = join_path(path), math.prod(array.shape)
        rows.append((name, str(list(array.shape)), spec.method.name, f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            cell.rjust(width) if column == 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    total = count_parameters(spec, params, state)
    lines.append(
        f"trainable params: {total.trainable:,} || all params: {total.total:,} ||"
        f" trainable%: {total.percent:.4f}"
    )
    return "\n".join(lines)


def _padding(targets: Targets, path: Path, params: Tree, state: AdapterState) -> int:
    """Returns the number of entries that no layer has, where layers differ."""
    if path not in targets.by_layer:
        return 0
    whole = flatten(state.trainable, is_leaf=lambda at, _: at == path)[path]
    d_in, d_out = kernel_shape(flatten(params)[path])[-2:]
    return _size(whole) - sum(
        _size(jax.eval_shape(lambda method=method: method.neutral((d_in, d_out))[0]))
        for method in targets.by_layer[path]
        if method is not None
    )


def _label(targets: Targets, path: Path) -> str:
    adapted = targets.adapted[path]
    method: Any = adapted.of_one
    layers = " shared" if adapted.spans_groups else ""
    if path in targets.by_layer:
        methods = targets.by_layer[path]
        count = sum(one is not None for one in methods)
        different = len({one for one in methods if one is not None}) > 1
        layers += f" in {count} of {len(methods)} layers" if count < len(methods) else ""
        layers += " (largest)" if different else ""
    rank = f" r={method.rank}" if hasattr(method, "rank") else ""
    blocks = ""
    if hasattr(method, "block_size") and getattr(method, "rotation", "boft") == "boft":
        factors = getattr(method, "n_butterfly_factors", 1)
        blocks = f" b={method.block_size} m={factors}"
    unitary = " +unitary" if getattr(method, "rotation", "boft") == "unitary" else ""
    return f"{method.name}{rank}{blocks}{unitary}{layers}"


def _size(tree: Any) -> int:
    """Returns the number of parameters, without a quantized kernel's scales.

    Example:
      >>> from peft_jax.core import abstract_quantized
      >>> kernel = jax.ShapeDtypeStruct((64, 32), "bfloat16")
      >>> _size({"kernel": abstract_quantized(kernel, "nf4"), "bias": jax.numpy.ones(32)})
      2080
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QArray))
    return sum(math.prod(leaf.shape) for leaf in leaves)
