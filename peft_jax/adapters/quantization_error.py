"""Finds the errors of quantized kernels, one kernel at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float
from qwix import QArray

from peft_jax.adapters.gradient_products import kernel_shape
from peft_jax.adapters.method import AdapterMethod, ErrorFactors
from peft_jax.core import Path, Tree, dense, flatten, join_path

Originals = Callable[[Path, tuple[int, ...]], Float[np.ndarray, "d_in d_out"]]
"""A function of a kernel's path, and of its place among the layers and the experts, to the kernel
before it was quantized, in float32."""


def quantization_errors(
    params: Tree, methods: Mapping[Path, AdapterMethod], originals: Tree | Originals | None
) -> dict[Path, ErrorFactors]:
    """Returns the factors of W - Q from which methods start, for quantized kernels Q.

    Args:
      params: Parameters, some of whose kernels are quantized.
      methods: Methods that correct quantization, by path of the kernel.
      originals: Kernels W before they were quantized: parameters, or a function; see `Originals`.

    Raises:
      ValueError: No kernel is quantized, a kernel has no error, or `originals` is None or lacks a
        kernel; the message names the method or the kernel.
    """
    flat = flatten(params)
    quantized = {path: m for path, m in methods.items() if isinstance(flat[path], QArray)}
    name = next(iter(methods.values())).name
    if not quantized:
        raise ValueError(
            f"{name} starts from the errors of quantized kernels, but none that it adapts is"
            " quantized; set model.quantization, or use lora"
        )
    if originals is None:
        raise ValueError(
            f"{name} starts from the errors of quantized kernels; give originals, the parameters"
            " before they were quantized"
        )
    find = originals if callable(originals) else _in_tree(originals)
    found = {}
    for path, method in quantized.items():
        *stack, _, _ = kernel_shape(flat[path])
        own = [
            _factors(_on_host(_error(find(path, place), flat[path], place)), method)
            for place in np.ndindex(*stack)
        ]
        factors = jax.tree.map(lambda *parts: np.stack(parts), *own)
        if not factors.s.max():
            raise ValueError(
                f"{join_path(path[:-1])} has no error of quantization to correct, because the"
                " kernels were quantized before; use lora"
            )
        found[path] = jax.tree.map(
            lambda part, stack=tuple(stack): part.reshape(*stack, *part.shape[1:]), factors
        )
    return found


@jax.jit
def _error(
    original: Float[Array, "d_in d_out"], kernel: QArray, place: tuple[Any, ...]
) -> Float[Array, "d_in d_out"]:
    """Returns the error of one of the kernels in a stack."""
    return original - dense(_take(kernel, place)).astype(jnp.float32)


@jax.jit
def _take(kernel: Array | QArray, place: tuple[Any, ...]) -> Any:
    """Returns one of the kernels in a stack; another place compiles nothing again."""
    return jax.tree.map(lambda part: part[place], kernel)


def _on_host(array: jax.Array) -> np.ndarray:
    """Returns an array that may lie on the devices of several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _factors(error: Float[np.ndarray, "d_in d_out"], method: AdapterMethod) -> ErrorFactors:
    """Returns the factors of one kernel's error, on the host.

    A run may have set a mesh, on which every device would decompose the same kernel.
    """
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], ("device",))):
        return jax.tree.map(np.asarray, _decompose(error, method))


@functools.partial(jax.jit, static_argnums=1)
def _decompose(error: Float[Array, "d_in d_out"], method: AdapterMethod) -> ErrorFactors:
    return method.error_factors(error)


def _in_tree(params: Tree) -> Originals:
    """Returns a function that finds kernels in a tree of parameters."""
    flat = flatten(params)

    def find(path: Path, place: tuple[int, ...]) -> Float[np.ndarray, "d_in d_out"]:
        if path not in flat or isinstance(flat[path], QArray):
            state = "is quantized too" if path in flat else "is missing"
            raise ValueError(
                f"{join_path(path)} {state} in originals; give the parameters before they were"
                " quantized"
            )
        return np.asarray(_take(flat[path], place), np.float32)

    return find
