"""What is trained, as a table by kernel group."""

import dataclasses
import math
from typing import Any

import jax
from qwix import QArray

from peft_jax.adapters.sketch import kernel_shape
from peft_jax.adapters.spec import AdapterSpec, AdapterState
from peft_jax.core import Tree, flatten, is_stacked, join_path


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """How many numbers are trained, and how many there are.

    Attributes:
      trainable: trained numbers.
      total: the model's and the adapter's trained ones together; what is trained itself counts
        once.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trained numbers in a hundred."""
        return 100.0 * self.trainable / self.total


def count_parameters(spec: AdapterSpec, params: Tree, state: AdapterState) -> ParameterCount:
    """Trained and total numbers, as Hugging Face PEFT's `print_trainable_parameters` counts them.

    Args:
      spec: what is adapted.
      params: the model's parameters, with the leaves that are trained themselves; may be abstract.
      state: the adapter's arrays, or abstract ones.
    """
    trainable = _size(state.trainable)
    return ParameterCount(trainable, _size(spec.frozen(params)) + trainable)


def trainable_table(spec: AdapterSpec, params: Tree, state: AdapterState) -> str:
    """What is trained: a line a kernel group, and the sums.

    A group is one name over all layers, since layers are stacked.

    Args:
      spec: what is adapted.
      params: the model's parameters, with the leaves that are trained themselves; may be abstract.
      state: the adapter's arrays, or abstract ones.

    Returns:
      Lines of: module, number and shape of its kernels, method, trained numbers.
    """
    targets = spec.targets(params)
    flat = flatten(params)
    paths = [*targets.adapted, *targets.trained]
    learned = flatten(state.trainable, is_leaf=lambda path, _: path in set(paths))
    rows = [("module", "kernels", "method", "trained")]
    for path in paths:
        shape = kernel_shape(flat[path])
        one = list(shape[1:] if is_stacked(path) else shape)
        kernels = f"{shape[0]} x {one}" if is_stacked(path) else str(one)
        name = join_path(path[:-1] if path in targets.adapted else path)
        method = _label(targets.adapted[path]) if path in targets.adapted else "trained itself"
        rows.append((name, kernels, method, f"{_size(learned[path]):,}"))
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


def _label(method: Any) -> str:
    rank = f" r={method.rank}" if hasattr(method, "rank") else ""
    blocks = ""
    if hasattr(method, "block_size") and getattr(method, "rotation", "boft") == "boft":
        blocks = f" b={method.block_size} m={method.n_butterfly_factors}"
    turned = " +unitary" if getattr(method, "rotation", "boft") == "unitary" else ""
    return f"{method.name}{rank}{blocks}{turned}"


def _size(tree: Any) -> int:
    """How many numbers there are; a quantized kernel's scales are not among them.

    Example:
      >>> from peft_jax.core import abstract_quantized
      >>> kernel = jax.ShapeDtypeStruct((64, 32), "bfloat16")
      >>> _size({"kernel": abstract_quantized(kernel, "nf4"), "bias": jax.numpy.ones(32)})
      2080
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QArray))
    return sum(math.prod(leaf.shape) for leaf in leaves)
