"""Base class of models: architecture, parameters, logical axes and checkpoint names."""

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwix import QArray

from peft_jax.core import (
    FORMATS,
    STACKED,
    VIRTUAL,
    Path,
    Tree,
    abstract_quantized,
    flatten,
    format_of,
    is_experts,
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
from peft_jax.models.trainable import TrainableModel, raise_leaf_mismatch

_Model = TypeVar("_Model", bound="Model")

_MAX_DRAW = 2**27
"""Number of random float32 values drawn at once: 512 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(TrainableModel):
    """A static, hashable description of a model, computed by Flax NNX modules.

    Parameters are nested dictionaries of arrays, kept outside the model. The leaves of transformer
    blocks are under "layers", stacked [layers, ...]. A leaf called "kernel" may be an
    `AdaptedKernel`; under "layers" it may also be a quantized array. `CausalLM` and
    `SequenceClassifier` add the forward pass.

    Attributes:
      family: Reader, module and checkpoint names of the model's family.
      config: Architecture.
      execution: Execution settings; they do not change the function.
      hf_json: Text of the `config.json` that the model was built from. Ignored by equality, so
        models that differ only there (in token ids, for example) are equal.
      origin: Folder that the parameters were read from; empty if unknown. Ignored by equality.
    """

    family: Family
    config: ModelConfig
    execution: ExecutionSettings
    hf_json: str = dataclasses.field(repr=False, compare=False)
    origin: str = dataclasses.field(default="", repr=False, compare=False)

    @property
    def model_type(self) -> str:
        """`model_type` of the model's `config.json`."""
        return self.family.model_type

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return self.config.num_layers

    @property
    def hf_config(self) -> dict[str, Any]:
        """The parsed `config.json` that the model was built from."""
        return json.loads(self.hf_json)

    def with_execution(self: _Model, execution: ExecutionSettings) -> _Model:
        """Returns the same model with other execution settings."""
        return dataclasses.replace(self, execution=execution)

    def abstract_params(
        self, dtype: Any = jnp.float32, quantization: str = "none", platform: str = ""
    ) -> Tree:
        """Returns the shapes of all parameters, as `jax.ShapeDtypeStruct`s.

        Args:
          dtype: Parameter dtype; for quantized kernels, the dtype of their scales. The router's
            corrections of DeepSeek are always float32.
          quantization: Format of the blocks' kernels, one of `peft_jax.core.FORMATS`.
            Quantized leaves are `qwix.QArray`s.
          platform: Platform of the devices that hold them; see `abstract_quantized`.

        Raises:
          ValueError: The format is unknown, or a kernel cannot be quantized.
        """
        check_choice("quantization", quantization, FORMATS)
        dtype = jnp.dtype(dtype)
        shapes: dict[Path, Any] = {}
        for path, variable in self._variables.items():
            leaf = jax.ShapeDtypeStruct(variable.get_value().shape, _dtype_of(variable, dtype))
            if quantization != "none" and is_quantized_leaf(path):
                try:
                    leaf = abstract_quantized(leaf, quantization, platform)
                except ValueError as error:
                    raise ValueError(f"{join_path(path)}: {error}") from error
            shapes[path] = leaf
        return unflatten(shapes)

    def logical_axes(self, quantization: str = "none") -> Tree:
        """Returns the logical name of every axis of every parameter.

        The names are "layers", "vocab", "embed", "heads", "kv_heads", "mlp", "experts" and "norm",
        or None for an axis that is never sharded.

        Args:
          quantization: See `abstract_params`; the tree has the same structure.
        """
        named: dict[Path, Any] = {}
        for path, variable in self._variables.items():
            axes = (STACKED, *variable.axes) if is_stacked(path) else variable.axes
            if quantization != "none" and is_quantized_leaf(path):
                axes = quantized_axes(axes, quantization)
            named[path] = axes
        return unflatten(named)

    def shardable_sizes(self) -> dict[str, int]:
        """Returns the size of each logical axis that a mesh must divide to shard it.

        Attention is sharded by whole heads, so "heads" and "kv_heads" count heads. "vocab" is
        absent: an array whose vocabulary is not divisible is replicated.
        """
        sizes: dict[str, int] = {}
        for path, variable in self._variables.items():
            shape = variable.get_value().shape[is_stacked(path) :]
            for axis, size in zip(variable.axes, shape, strict=True):
                # Arrays may name axes of several sizes alike, such as those of a fused map.
                sizes[axis] = math.gcd(sizes.get(axis, 0), size)
        counts = getattr(self.config, "kv_head_counts", (self.config.num_kv_heads,))
        heads = {"heads": self.config.num_heads, "kv_heads": math.gcd(*counts)}
        return {axis: sizes[axis] for axis in ("embed", "mlp", "experts") if axis in sizes} | heads

    def active_share(self, path: Path) -> float:
        """Returns the share of the leaf at `path` that a token's products use.

        It is below one for experts, of which a token chooses a few.
        """
        routing = getattr(self.config, "routing", None)
        if routing is None or not is_experts(path):
            return 1.0
        return routing.experts_per_token / routing.num_experts

    def init_params(
        self, key: jax.Array, dtype: Any = jnp.float32, quantization: str = "none"
    ) -> Tree:
        """Returns random parameters: kernels and embeddings normal, scales one, biases zero.

        Args:
          key: Random key.
          dtype: Parameter dtype.
          quantization: See `abstract_params`. The same values are drawn, then quantized.
        """
        return quantize_params(_init_params(self, key, jnp.dtype(dtype)), quantization)

    def init_leaves(
        self, key: jax.Array, paths: Iterable[Path], dtype: Any = jnp.float32
    ) -> dict[Path, jax.Array]:
        """Returns random values for some leaves, drawn from the distributions of `init_params`.

        The values of a leaf depend on `key` and its path only.
        """
        drawn = {}
        for path in paths:
            variable = self._variables[path]
            own = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
            noise = jax.random.normal(own, variable.get_value().shape, jnp.float32)
            values = variable.mean + variable.stddev * noise
            drawn[path] = values.astype(_dtype_of(variable, jnp.dtype(dtype)))
        return drawn

    def hf_names(self) -> dict[Path, HFTensor]:
        """Returns the Hugging Face tensor of every leaf."""
        naming = self.family.naming
        return {
            path: dataclasses.replace(naming.tensor(path), layers=variable.layers)
            for path, variable in self._variables.items()
        }

    def layers_of(self, path: Path) -> Sequence[int]:
        """Returns the layer of each row of the stacked leaf at `path`."""
        return self._variables[path].layers or range(self.num_layers)

    def module_name(self, path: Path, layer: int | None = None) -> str:
        """Returns the Hugging Face name of the module that holds the leaf at `path`.

        Raises:
          ValueError: The leaf is stacked and `layer` is None.
        """
        return self.family.naming.module(path, layer)

    @property
    def _variables(self) -> dict[Path, nnx.Variable]:
        return _template(self.family, self.config, self.execution)[1]

    def _bind(self, params: Tree) -> Any:
        """Returns the module with `params` bound.

        Raises:
          ValueError: A leaf is missing or unknown.
        """
        graphdef, variables = _template(self.family, self.config, self.execution)
        self.check_virtual(params)
        leaves = {path: leaf for path, leaf in flatten(params).items() if path != (VIRTUAL,)}
        if leaves.keys() != variables.keys():
            raise_leaf_mismatch(set(leaves), set(variables))
        state = {path: variable.replace(leaves[path]) for path, variable in variables.items()}
        return nnx.merge(graphdef, nnx.State(unflatten(state)))


def quantize_params(params: Tree, quantization: str) -> Tree:
    """Quantizes the kernels of the transformer blocks.

    Args:
      params: Parameters, as arrays.
      quantization: One of `peft_jax.core.FORMATS`.

    Raises:
      ValueError: The format is unknown, or a kernel cannot be quantized.
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
    """Returns the storage format of the kernels in `params`, such as "nf4"; "none" for arrays."""
    return next(
        (format_of(leaf) for leaf in flatten(params).values() if isinstance(leaf, QArray)), "none"
    )


_quantize = jax.jit(quantize, static_argnums=1)


@functools.lru_cache(maxsize=64)
def _template(
    family: Family, config: ModelConfig, execution: ExecutionSettings
) -> tuple[Any, dict[Path, nnx.Variable]]:
    """Returns the module's structure and its variables by path, without arrays."""
    module = nnx.eval_shape(lambda: family.decoder(config, execution))
    graphdef, state = nnx.split(module)
    return graphdef, {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _dtype_of(variable: nnx.Variable, dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if variable.wide else dtype


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init_params(model: Model, key: jax.Array, dtype: jnp.dtype) -> Tree:
    """Draws many leaves at once, since compiling a draw costs more than drawing a small leaf."""
    variables = model._variables
    drawn = dict.fromkeys(variables)
    for group in _groups(variables, _MAX_DRAW):
        key, subkey = jax.random.split(key)
        ends = np.cumsum([variable.get_value().size for variable in group.values()])
        numbers = jax.random.normal(subkey, (int(ends[-1]),), jnp.float32)
        for (path, variable), part in zip(
            group.items(), jnp.split(numbers, ends[:-1]), strict=True
        ):
            values = variable.mean + variable.stddev * part
            values = values.reshape(variable.get_value().shape)
            drawn[path] = values.astype(_dtype_of(variable, dtype))
    return unflatten(drawn)


def _groups(variables: dict[Path, nnx.Variable], size: int) -> Iterator[dict[Path, nnx.Variable]]:
    """Yields the variables in order, grouped up to `size` values; a larger one is alone."""
    group: dict[Path, nnx.Variable] = {}
    total = 0
    for path, variable in variables.items():
        total += variable.get_value().size
        if group and total > size:
            yield group
            group, total = {}, variable.get_value().size
        group[path] = variable
    yield group
