"""Digests of an adapter's arrays and settings, by which damage and edits are noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peft_jax.hub.tensors import StoredTensor

DIGESTS = "digests"
"""The key in `peft_jax_adapter.json`."""


def digest_arrays(stored: Mapping[str, StoredTensor]) -> str:
    """Returns the digest of named tensors: of every name, dtype, shape and byte.

    Args:
      stored: The tensors of a file, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for _, values in tensor.pieces():
            digest.update(values.reshape(-1).view("uint8").data)
    return f"sha256:{digest.hexdigest()}"


def digest_settings(settings: Mapping[str, Any]) -> str:
    """Returns the digest of settings as JSON holds them, in whatever order and spelling.

    Example:
      >>> digest_settings({"rank": 4, "alpha": 16.0}) == digest_settings({"alpha": 16, "rank": 4})
      True
    """
    text = json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _plain(value: Any) -> Any:
    """A value of JSON with whole numbers written in one way: 16.0 and 16 are the same setting."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
