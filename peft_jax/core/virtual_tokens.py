"""Holds virtual tokens: trainable positions before the tokens of every sequence.

A method that trains inputs in place of kernels binds one `VirtualTokens` at the root of a model's
parameters, under the key `VIRTUAL`. A causal language model takes it from there.
"""

from typing import Any

from flax import struct

VIRTUAL = "virtual_tokens"
"""Root key of a model's parameters at which virtual tokens are bound."""


@struct.dataclass
class VirtualTokens:
    """Virtual tokens, as embeddings or as keys and values of every layer; a pytree.

    Fields are typed `Any` because JAX also puts placeholders, shapes and shardings in place of
    arrays.

    Attributes:
      embeddings: Embeddings [n, embed], which pass through the blocks; None if there are keys.
      keys: Keys [layers, n, kv_width] of the virtual tokens, as attention uses them; None if there
        are embeddings.
      values: Values [layers, n, kv_width], or None.
    """

    embeddings: Any = None
    keys: Any = None
    values: Any = None

    @property
    def count(self) -> int:
        """Number n of virtual tokens."""
        array = self.keys if self.embeddings is None else self.embeddings
        return array.shape[-2]
