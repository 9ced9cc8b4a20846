"""What every model has: its architecture, its parameters, and the names of their tensors."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwix import QArray

from peft_jax.core import (
    FORMATS,
    STACKED,
    Path,
    Tree,
    abstract_quantized,
    did_you_mean,
    flatten,
    format_of,
    is_quantized_leaf,
    is_stacked,
    join_path,
    quantize,
    quantized_axes,
    unflatten,
)
from peft_jax.core.validation import check_choice
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.family import Family, ModelConfig
from peft_jax.models.naming import HFTensor

_Model = TypeVar("_Model", bound="Model")

_DRAWN_AT_ONCE = 2**27
"""How many random numbers are drawn in one go: 512 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A handle on a model: static and hashable, with Flax NNX modules inside.

    Parameters are plain nested dictionaries of arrays; the leaves of transformer blocks stand under
    "layers", stacked [layers, ...]. A leaf called "kernel" may be an `AdaptedKernel`, and under
    "layers" a quantized array. What is computed of them is the business of `CausalLM` and
    `SequenceClassifier`.

    Attributes:
      family: how the model is built and what its tensors are called.
      config: the architecture.
      execution: how it is computed.
      hf_json: the `config.json` it was built from, as text; models that differ in it only (in
        token ids, say) are equal.
      origin: the folder that its parameters were read from; empty if they were not, or not known.
        It makes no difference to equality.
    """

    family: Family
    config: ModelConfig
    execution: ExecutionSettings
    hf_json: str = dataclasses.field(repr=False, compare=False)
    origin: str = dataclasses.field(default="", repr=False, compare=False)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The `config.json` the model was built from."""
        return json.loads(self.hf_json)

    def with_execution(self: _Model, execution: ExecutionSettings) -> _Model:
        """The same model, computed in another way."""
        return dataclasses.replace(self, execution=execution)

    def abstract_params(
        self, dtype: Any = jnp.float32, quantization: str = "none", platform: str = ""
    ) -> Tree:
        """The shapes of all parameters, as `jax.ShapeDtypeStruct`s of `dtype`.

        Args:
          dtype: of the parameters; of quantized kernels' scales.
          quantization: "none", or what the blocks' kernels are held as: "int8", "nf4". Their leaves
            are `qwix.QArray`s then.
          platform: of the devices that hold them, as `abstract_quantized` takes it.

        Raises:
          ValueError: the format is not known, or a kernel cannot be quantized.
        """
        check_choice("quantization", quantization, FORMATS)
        dtype = jnp.dtype(dtype)
        shapes: dict[Path, Any] = {}
        for path, variable in self._variables.items():
            leaf = jax.ShapeDtypeStruct(variable.get_value().shape, dtype)
            if quantization != "none" and is_quantized_leaf(path):
                try:
                    leaf = abstract_quantized(leaf, quantization, platform)
                except ValueError as error:
                    raise ValueError(f"{join_path(path)}: {error}") from error
            shapes[path] = leaf
        return unflatten(shapes)

    def logical_axes(self, quantization: str = "none") -> Tree:
        """The name of every axis of every parameter.

        Names: "layers", "vocab", "embed", "heads", "kv_heads", "mlp", "norm".

        Args:
          quantization: as for `abstract_params`, whose tree this one is shaped like.
        """
        named: dict[Path, Any] = {}
        for path, variable in self._variables.items():
            axes = (STACKED, *variable.axes) if is_stacked(path) else variable.axes
            if quantization != "none" and is_quantized_leaf(path):
                axes = quantized_axes(axes, quantization)
            named[path] = axes
        return unflatten(named)

    def cut_sizes(self) -> dict[str, int]:
        """How many there are of what a mesh may cut, by logical axis; heads are never cut in two.

        The vocabulary is not among it: an array whose vocabulary does not come out even is held
        whole.
        """
        sizes = {
            axis: size
            for path, variable in self._variables.items()
            for axis, size in zip(
                variable.axes, variable.get_value().shape[is_stacked(path) :], strict=True
            )
        }
        heads = {"heads": self.config.num_heads, "kv_heads": self.config.num_kv_heads}
        return {axis: sizes[axis] for axis in ("embed", "mlp")} | heads

    def init_params(
        self, key: jax.Array, dtype: Any = jnp.float32, quantization: str = "none"
    ) -> Tree:
        """Random parameters: kernels and embeddings normal, scales one, biases zero.

        Args:
          key: a random key.
          dtype: of the parameters.
          quantization: as for `abstract_params`; the same numbers are drawn, and then rounded.
        """
        return quantize_params(_init_params(self, key, jnp.dtype(dtype)), quantization)

    def init_leaves(
        self, key: jax.Array, paths: Iterable[Path], dtype: Any = jnp.float32
    ) -> dict[Path, jax.Array]:
        """Some leaves as `init_params` begins them; each depends on the key and its own path."""
        drawn = {}
        for path in paths:
            variable = self._variables[path]
            own = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
            noise = jax.random.normal(own, variable.get_value().shape, jnp.float32)
            drawn[path] = (variable.mean + variable.stddev * noise).astype(jnp.dtype(dtype))
        return drawn

    def hf_names(self) -> dict[Path, HFTensor]:
        """The Hugging Face tensor of every leaf, and whether it is stored transposed."""
        return {path: self.family.naming.tensor(path) for path in self._variables}

    def module_name(self, path: Path, layer: int | None = None) -> str:
        """The Hugging Face name of the module that holds the leaf at `path`.

        Raises:
          ValueError: the leaf is stacked and `layer` is not given.
        """
        return self.family.naming.module(path, layer)

    def check_params(self, params: Tree, quantization: str = "none") -> None:
        """Rejects parameters that are not this model's.

        Args:
          params: The parameters, arrays or shapes.
          quantization: As for `abstract_params`.

        Raises:
          ValueError: A leaf is missing or unknown, or has another shape.
        """
        expected, found = flatten(self.abstract_params(quantization=quantization)), flatten(params)
        if found.keys() != expected.keys():
            _refuse_leaves(set(found), set(expected))
        for path, leaf in found.items():
            if tuple(leaf.shape) != tuple(expected[path].shape):
                raise ValueError(
                    f"the parameters are not this model's: {'.'.join(path)} has the shape"
                    f" {list(leaf.shape)}, and the model's has {list(expected[path].shape)}"
                )

    @property
    def _variables(self) -> dict[Path, nnx.Variable]:
        return _template(self.family, self.config, self.execution)[1]

    def _bound(self, params: Tree) -> Any:
        """The module with the parameters in it.

        Raises:
          ValueError: a leaf is missing or unknown.
        """
        graphdef, variables = _template(self.family, self.config, self.execution)
        leaves = flatten(params)
        if leaves.keys() != variables.keys():
            _refuse_leaves(set(leaves), set(variables))
        state = {path: variable.replace(leaves[path]) for path, variable in variables.items()}
        return nnx.merge(graphdef, nnx.State(unflatten(state)))


def quantize_params(params: Tree, quantization: str) -> Tree:
    """Parameters with the blocks' kernels in 8 or 4 bits a number.

    Args:
      params: the parameters, as arrays.
      quantization: "none", "int8" or "nf4".

    Raises:
      ValueError: the format is not known, or a kernel cannot be quantized.
    """
    check_choice("quantization", quantization, FORMATS)
    if quantization == "none":
        return params
    return unflatten(
        {
            path: _quantize(leaf, quantization) if is_quantized_leaf(path) else leaf
            for path, leaf in flatten(params).items()
        }
    )


def quantization_of(params: Tree) -> str:
    """Returns what the kernels of some parameters are held as: "none", "int8" or "nf4"."""
    return next(
        (format_of(leaf) for leaf in flatten(params).values() if isinstance(leaf, QArray)), "none"
    )


_quantize = jax.jit(quantize, static_argnums=1)


@functools.lru_cache(maxsize=64)
def _template(
    family: Family, config: ModelConfig, execution: ExecutionSettings
) -> tuple[Any, dict[Path, nnx.Variable]]:
    """The module's structure, and its variables by path, without arrays."""
    module = nnx.eval_shape(lambda: family.decoder(config, execution))
    graphdef, state = nnx.split(module)
    return graphdef, {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init_params(model: Model, key: jax.Array, dtype: jnp.dtype) -> Tree:
    """Draws many leaves at a time: compiling a draw takes longer than drawing a small leaf."""
    variables = model._variables
    drawn = dict.fromkeys(variables)
    for group in _groups(variables, _DRAWN_AT_ONCE):
        key, subkey = jax.random.split(key)
        ends = np.cumsum([variable.get_value().size for variable in group.values()])
        numbers = jax.random.normal(subkey, (int(ends[-1]),), jnp.float32)
        for (path, variable), part in zip(
            group.items(), jnp.split(numbers, ends[:-1]), strict=True
        ):
            values = variable.mean + variable.stddev * part
            drawn[path] = values.reshape(variable.get_value().shape).astype(dtype)
    return unflatten(drawn)


def _groups(variables: dict[Path, nnx.Variable], size: int) -> Iterator[dict[Path, nnx.Variable]]:
    """The variables in order, in groups of at most `size` numbers or of one variable."""
    group: dict[Path, nnx.Variable] = {}
    total = 0
    for path, variable in variables.items():
        total += variable.get_value().size
        if group and total > size:
            yield group
            group, total = {}, variable.get_value().size
        group[path] = variable
    yield group


def _refuse_leaves(found: set[Path], expected: set[Path]) -> None:
    missing = sorted(".".join(path) for path in expected - found)
    unknown = sorted(".".join(path) for path in found - expected)
    parts = []
    if missing:
        parts.append(f"they lack {', '.join(missing)}")
    if unknown:
        parts.append(
            f"they have {', '.join(unknown)}, not known here"
            f"{did_you_mean(unknown[0], missing) if missing else ''}"
        )
    raise ValueError(f"the parameters are not this model's: {'; '.join(parts)}")
