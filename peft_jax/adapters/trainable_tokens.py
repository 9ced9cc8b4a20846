"""Implements trainable tokens: single rows of the embedding are trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.core import Kernel, linear, take_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(AdapterMethod):
    """Replaces the rows of some tokens in an embedding [vocab, embed].

    Lookups take the rows of the other tokens from the base, so neither gradients nor optimizer
    states have more rows than `token_indices`. A tied head has the replaced rows too. Trainable
    array: `tokens` [n, embed], initially the base's rows.

    Attributes:
      token_indices: Tokens whose rows are trained.
    """

    name: ClassVar[str] = "trainable_tokens"
    learning_rate: ClassVar[float] = 1e-3
    no_decay: ClassVar[tuple[str, ...]] = ("tokens",)
    uses_kernel: ClassVar[bool] = True
    maps_tokens: ClassVar[bool] = True

    token_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        indices = tuple(self.token_indices)
        object.__setattr__(self, "token_indices", indices)
        wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if wrong:
            raise ValueError(f"token_indices has {wrong[0]!r}; it must be token numbers from 0")
        if len(set(indices)) < len(indices):
            twice = next(index for index in indices if indices.count(index) > 1)
            raise ValueError(f"token_indices has {twice} more than once")

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if there are no tokens, or one is beyond the embedding."""
        if not self.token_indices:
            raise ValueError(f"token_indices is empty; give the tokens of {module} to train")
        if (last := max(self.token_indices)) >= shape[0]:
            raise ValueError(
                f"token_indices has {last}, but {module} has the rows 0 to {shape[0] - 1}"
            )

    def init(
        self,
        key: jax.Array,
        shape: tuple[int, int],
        gradient: GradientFactors | None = None,
        *,
        kernel: Kernel = None,
    ) -> tuple[Arrays, Arrays]:
        """Returns the base's rows; no constant arrays.

        Raises:
          ValueError: `kernel` is None.
        """
        del key, shape, gradient
        if kernel is None:
            raise ValueError(f"kernel must be given, because {self.name} is initialized from it")
        rows = take_rows(kernel, jnp.array(self.token_indices))
        return {"tokens": rows.astype(jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard rows as the embedding's."""
        del d_in
        return {"tokens": (None, d_out)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the rows."""
        del constant, dropout_key
        return dict(trainable)

    def lookup(
        self, tokens: Int[Array, "*batch"], base: Kernel, arrays: Arrays
    ) -> Float[Array, "*batch embed"]:
        """Returns the base's rows, and the trained ones in their place."""
        rows = take_rows(base, tokens)
        order = np.argsort(self.token_indices)
        ordered = jnp.array(np.array(self.token_indices)[order], tokens.dtype)
        place = jnp.minimum(jnp.searchsorted(ordered, tokens), len(order) - 1)
        own = arrays["tokens"][jnp.array(order)[place]].astype(rows.dtype)
        return jnp.where((ordered[place] == tokens)[..., None], own, rows)

    def project(
        self,
        x: Float[Array, "*batch vocab"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch embed"]:
        """Returns the product of weights of tokens with the embedding."""
        del dropout_key
        indices = jnp.array(self.token_indices)
        change = arrays["tokens"].astype(jnp.float32) - take_rows(base, indices)
        return linear(x, base) + linear(x[..., indices], change)

    def transposed_project(
        self, x: Float[Array, "*batch embed"], base: Kernel, arrays: Arrays
    ) -> Float[Array, "*batch vocab"]:
        """Returns the products with the base's rows, and the trained ones' in their place."""
        own = linear(x, arrays["tokens"].T)
        return linear(x, base).at[..., jnp.array(self.token_indices)].set(own)

    def merge(
        self, base: Float[Array, "vocab embed"], arrays: Arrays
    ) -> Float[Array, "vocab embed"]:
        """Returns the embedding with the trained rows."""
        rows = arrays["tokens"].astype(jnp.float32)
        return base.astype(jnp.float32).at[jnp.array(self.token_indices)].set(rows)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of an adapter that has tokens alone."""
        return (TrainableTokensForm,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensBesideAdapters(TrainableTokens):
    """Trainable tokens of an adapter of another method: its setting `trainable_token_indices`."""

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of tokens beside another method's tensors."""
        return (TokensBesideForm,)


@dataclasses.dataclass(frozen=True)
class TrainableTokensForm(PeftForm):
    """`trainable_tokens_delta` holds the rows themselves, and no differences."""

    method: TrainableTokens
    peft_type = "TRAINABLE_TOKENS"
    names: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)
    exact = True
    of_embeddings = True
    saves_modules = False
    understood = PeftSettings(
        read={"token_indices": tuple[int, ...]},
        irrelevant=frozenset({"init_weights"}),
        compared=("token_indices",),
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> TrainableTokens:
        """Returns the method with the tokens of the configuration."""
        del modules
        return TrainableTokens(token_indices=tuple(config.get("token_indices") or ()))

    def settings(self) -> dict[str, Any]:
        """Returns the tokens."""
        return {"init_weights": True, "token_indices": list(self.method.token_indices)}

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [n, embed]."""
        del d_in
        return {self.names[0]: (len(self.method.token_indices), d_out)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames the rows."""
        return {self.names[0]: arrays["tokens"]}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Renames the rows."""
        return {"tokens": tensors[self.names[0]]}, {}


@dataclasses.dataclass(frozen=True)
class TokensBesideForm(TrainableTokensForm):
    """Form of trained rows beside another method, where PEFT wraps the embedding."""

    names: ClassVar[tuple[str, ...]] = ("token_adapter.trainable_tokens_delta",)

    def settings(self) -> dict[str, Any]:
        """Returns the tokens, by the name of the other method's setting."""
        return {"trainable_token_indices": list(self.method.token_indices)}
