"""A causal language model as pure functions of its parameters.

B batch, T tokens, D embed, V vocab.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core import (
    FORMATS,
    STACKED,
    Kernel,
    Path,
    Tree,
    abstract_quantised,
    did_you_mean,
    flatten,
    is_quantised_leaf,
    is_stacked,
    join_path,
    linear,
    quantise,
    quantised_axes,
    unflatten,
)
from peft_jax.core.checks import check_choice
from peft_jax.models.cache import KVCache
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.family import Decoder, Family, ModelConfig
from peft_jax.models.naming import HFTensor

_DRAWN_AT_ONCE = 2**27
"""How many random numbers are drawn in one go: 512 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A handle on a model: static and hashable, with Flax NNX modules inside.

    Parameters are plain nested dictionaries of arrays; the leaves of transformer blocks stand under
    "layers", stacked [layers, ...]. A leaf called "kernel" may be an `AdaptedKernel`, and under
    "layers" a quantised array.

    Attributes:
      family: how the model is built and what its tensors are called.
      config: the architecture.
      execution: how it is computed.
      hf_json: the `config.json` it was built from, as text; models that differ in it only (in
        token ids, say) are equal.
    """

    family: Family
    config: ModelConfig
    execution: ExecutionSettings
    hf_json: str = dataclasses.field(repr=False, compare=False)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The `config.json` the model was built from."""
        return json.loads(self.hf_json)

    def with_execution(self, execution: ExecutionSettings) -> "CausalLM":
        """The same model, computed in another way."""
        return dataclasses.replace(self, execution=execution)

    # Parameters.

    def abstract_params(self, dtype: Any = jnp.float32, quantization: str = "none") -> Tree:
        """The shapes of all parameters, as `jax.ShapeDtypeStruct`s of `dtype`.

        Args:
          dtype: of the parameters; of quantised kernels' scales.
          quantization: "none", or what the blocks' kernels are held as: "int8", "nf4". Their leaves
            are `qwix.QArray`s then.

        Raises:
          ValueError: the format is not known, or a kernel cannot be quantised.
        """
        check_choice("quantization", quantization, FORMATS)
        dtype = jnp.dtype(dtype)
        shapes: dict[Path, Any] = {}
        for path, variable in self._variables.items():
            leaf = jax.ShapeDtypeStruct(variable.get_value().shape, dtype)
            if quantization != "none" and is_quantised_leaf(path):
                try:
                    leaf = abstract_quantised(leaf, quantization)
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
            if quantization != "none" and is_quantised_leaf(path):
                axes = quantised_axes(axes, quantization)
            named[path] = axes
        return unflatten(named)

    def init_params(
        self, key: jax.Array, dtype: Any = jnp.float32, quantization: str = "none"
    ) -> Tree:
        """Random parameters: kernels and embeddings normal, scales one, biases zero.

        Args:
          key: a random key.
          dtype: of the parameters.
          quantization: as for `abstract_params`; the same numbers are drawn, and then rounded.
        """
        return quantise_params(_init_params(self, key, jnp.dtype(dtype)), quantization)

    def hf_names(self) -> dict[Path, HFTensor]:
        """The Hugging Face tensor of every leaf, and whether it is stored transposed."""
        return {path: self.family.naming.tensor(path) for path in self._variables}

    def module_name(self, path: Path, layer: int | None = None) -> str:
        """The Hugging Face name of the module that holds the leaf at `path`.

        Raises:
          ValueError: the leaf is stacked and `layer` is not given.
        """
        return self.family.naming.module(path, layer)

    # Computation.

    def hidden_states(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], KVCache | None]:
        """The hidden states after the final norm.

        Args:
          params: the parameters.
          tokens: [B, T].
          positions: [B, T], for rotary embeddings or ALiBi; by default they count from 0 at every
            segment's start or, with a cache, go on from each row's last token.
          segment_ids: [B, T]: 0 is padding, 1 and up are sequences packed in a row, which do not
            see each other; by default a row is one sequence.
          cache: the earlier tokens' keys and values; the tokens are written after them. It is for
            the caller to see that there are slots left.

        Returns:
          [B, T, D] in the compute dtype; and the cache with these tokens, or None without one.

        Raises:
          ValueError: the parameters are not this model's, or more tokens than slots in the cache.
        """
        if cache is not None:
            if tokens.shape[1] > cache.slots:
                raise ValueError(f"{tokens.shape[1]} tokens do not fit a cache of {cache.slots}")
            if segment_ids is None:
                segment_ids = jnp.ones_like(tokens)
            if positions is None:
                positions = cache.following_positions(segment_ids)
            cache = cache.admit(positions, segment_ids)
        elif positions is None:
            positions = default_positions(tokens, segment_ids)
        return self._bound(params)(tokens, positions, segment_ids, cache)

    def head_kernel(self, params: Tree) -> Kernel:
        """The map from hidden states to logits, [D, V]; if tied, the transposed embedding."""
        return self._bound(params).head_kernel()

    def logits(
        self, params: Tree, hidden: Float[Array, "*batch embed"]
    ) -> Float32[Array, "*batch vocab"]:
        """The logits of hidden states, in float32."""
        kernel = self.head_kernel(params)
        if isinstance(kernel, jax.Array):
            kernel = kernel.astype(hidden.dtype)
            return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return linear(hidden, kernel).astype(jnp.float32)

    def __call__(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float32[Array, "batch tokens vocab"]:
        """The logits of `tokens`; arguments as for `hidden_states`."""
        hidden, _ = self.hidden_states(params, tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(params, hidden)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache for `batch` rows of up to `length` tokens."""
        config = self.config
        return KVCache.empty(
            layers=config.num_layers,
            batch=batch,
            slots=length,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=jnp.dtype(dtype),
        )

    @property
    def _variables(self) -> dict[Path, nnx.Variable]:
        return _template(self.family, self.config, self.execution)[1]

    def _bound(self, params: Tree) -> Decoder:
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


def quantise_params(params: Tree, quantization: str) -> Tree:
    """Parameters with the blocks' kernels in 8 or 4 bits a number.

    Args:
      params: the parameters, as arrays.
      quantization: "none", "int8" or "nf4".

    Raises:
      ValueError: the format is not known, or a kernel cannot be quantised.
    """
    check_choice("quantization", quantization, FORMATS)
    if quantization == "none":
        return params
    return unflatten(
        {
            path: _quantise(leaf, quantization) if is_quantised_leaf(path) else leaf
            for path, leaf in flatten(params).items()
        }
    )


_quantise = jax.jit(quantise, static_argnums=1)


def default_positions(
    tokens: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"] | None
) -> Int[Array, "batch tokens"]:
    """Positions that count from 0 at the start of the row or of each segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


@functools.lru_cache(maxsize=64)
def _template(
    family: Family, config: ModelConfig, execution: ExecutionSettings
) -> tuple[Any, dict[Path, nnx.Variable]]:
    """The module's structure, and its variables by path, without arrays."""
    module = nnx.eval_shape(lambda: family.decoder(config, execution))
    graphdef, state = nnx.split(module)
    return graphdef, {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init_params(model: CausalLM, key: jax.Array, dtype: jnp.dtype) -> Tree:
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
