"""Implements prefix tuning: keys and values of virtual tokens are trained in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.peft_form import PeftForm, PeftSettings
from peft_jax.adapters.virtual_form import TENSOR, VirtualForm
from peft_jax.adapters.virtual_method import Dimensions, VirtualMethod, torch_uniform
from peft_jax.core import Tree, VirtualTokens, linear
from peft_jax.core.validation import check_choice, check_count

STARTS = ("random", "zeros")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(VirtualMethod):
    """Prefix tuning: in every layer, all tokens attend to n trainable keys and values.

    Keys are trained as attention uses them, after rotary embedding. With a projection, a network
    P[i] = W₂ tanh(W₁ E[i] + b₁) + b₂ computes the keys and values of all layers from an embedding
    E [n, kv_width], and both are trained.

    Trainable arrays: `keys` and `values` [layers, n, kv_width]; or with a projection `embedding`
    [n, kv_width], `first` [kv_width, h], `first_bias` [h], `second` [h, layers, 2, kv_width] and
    `second_bias` [layers, 2, kv_width].

    Attributes:
      num_virtual_tokens: Number n of virtual tokens.
      start: Start of the keys and values, or of what the network's last layer adds: "random" is
        standard normal (with a projection, torch's linear layers), and "zeros" zero, with which
        each virtual token only takes its share of the attention.
      projection: Number h of hidden features of the network; 0 for none.

    Source: Li and Liang, 2021, arXiv 2101.00190, sections 4.2 and 4.3.
    """

    name: ClassVar[str] = "prefix_tuning"
    learning_rate: ClassVar[float] = 1e-2
    no_decay: ClassVar[tuple[str, ...]] = ("keys", "values", "embedding")

    start: str = "random"
    projection: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, STARTS)
        check_count("projection", self.projection)

    def init(self, key: jax.Array, params: Tree) -> dict[str, Array]:
        """Returns the initial keys and values, or the network's arrays."""
        sizes, n, hidden = Dimensions.of(params), self.num_virtual_tokens, self.projection
        draw = _zeros if self.start == "zeros" else jax.random.normal
        keys = jax.random.split(key, 5)
        if not hidden:
            shape = (sizes.layers, n, sizes.kv_width)
            return {"keys": draw(keys[0], shape), "values": draw(keys[1], shape)}
        last = _zeros if self.start == "zeros" else torch_uniform(hidden)
        of_all = (sizes.layers, 2, sizes.kv_width)
        return {
            "embedding": jax.random.normal(keys[0], (n, sizes.kv_width), jnp.float32),
            "first": torch_uniform(sizes.kv_width)(keys[1], (sizes.kv_width, hidden)),
            "first_bias": torch_uniform(sizes.kv_width)(keys[2], (hidden,)),
            "second": last(keys[3], (hidden, *of_all)),
            "second_bias": last(keys[4], of_all),
        }

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Returns axes that shard keys and values as the model's."""
        if not self.projection:
            return dict.fromkeys(("keys", "values"), ("layers", None, "kv_heads"))
        return {
            "embedding": (None, None),
            "first": (None, None),
            "first_bias": (None,),
            "second": (None, "layers", None, "kv_heads"),
            "second_bias": ("layers", None, "kv_heads"),
        }

    def virtual_tokens(self, arrays: Mapping[str, Array]) -> VirtualTokens:
        """Returns the keys and values, computed by the network if there is one."""
        if not self.projection:
            return VirtualTokens(keys=arrays["keys"], values=arrays["values"])
        hidden = jnp.tanh(linear(arrays["embedding"], arrays["first"]) + arrays["first_bias"])
        both = jnp.einsum("nh,hlsw->slnw", hidden, arrays["second"].astype(hidden.dtype))
        both = both + jnp.swapaxes(arrays["second_bias"], 0, 1)[:, :, None]
        return VirtualTokens(keys=both[0], values=both[1])

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        if type(self) is not PrefixTuning:
            return None
        return ProjectedPrefixForm(self) if self.projection else PrefixTuningForm(self)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of prefix tuning."""
        return (PrefixTuningForm,)


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    del key
    return jnp.zeros(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class PrefixTuningForm(VirtualForm):
    """`prompt_embeddings` [n, layers 2 kv_width]: keys, then values, layer by layer.

    A network that has computed them is not in the file.
    """

    method: PrefixTuning
    peft_type = "PREFIX_TUNING"
    exact = True
    understood = PeftSettings(
        read=VirtualForm.understood.read,
        irrelevant=frozenset(
            {
                *VirtualForm.understood.irrelevant,
                *("encoder_hidden_size", "init_weights", "prefix_projection"),
            }
        ),
        fixed=VirtualForm.understood.fixed,
        compared=VirtualForm.understood.compared,
    )

    @classmethod
    def read_virtual(cls, config: Mapping[str, Any], count: int) -> PrefixTuning:
        """Returns prefix tuning with a number of virtual tokens."""
        del config
        return PrefixTuning(num_virtual_tokens=count)

    def settings(self) -> dict[str, Any]:
        """Returns PEFT's settings, without the projection: the method has no network."""
        return {**super().settings(), "prefix_projection": False}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Joins the keys and values of all layers."""
        both = np.stack([arrays["keys"], arrays["values"]], axis=1)  # [layers, 2, n, kv_width]
        return {TENSOR: np.moveaxis(both, 2, 0).reshape(both.shape[2], -1)}

    def restore_virtual(self, tensor: np.ndarray, sizes: Dimensions) -> dict[str, np.ndarray]:
        """Splits the tensor."""
        both = np.moveaxis(tensor.reshape(-1, sizes.layers, 2, sizes.kv_width), 0, 2)
        return {"keys": both[:, 0], "values": both[:, 1]}

    def virtual_shape(self, sizes: Dimensions) -> tuple[int, int]:
        """Returns [n, layers 2 kv_width]."""
        return (self.method.num_virtual_tokens, sizes.layers * 2 * sizes.kv_width)

    def token_dim(self, sizes: Dimensions) -> int:
        """Returns the number of features of a token's keys."""
        return sizes.kv_width


@dataclasses.dataclass(frozen=True)
class ProjectedPrefixForm(PrefixTuningForm):
    """Stores the keys and values that a network has computed, without the network."""

    exact = False

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Joins the keys and values that the network computes."""
        found = self.method.virtual_tokens({k: jnp.asarray(v) for k, v in arrays.items()})
        return super().export({"keys": np.asarray(found.keys), "values": np.asarray(found.values)})
