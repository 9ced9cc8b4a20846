"""Computes digests of an adapter's arrays and settings, to detect damage and edits."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peft_jax.hub.tensors import StoredTensor

DIGESTS = "digests"
"""Key of the digests in `peft_jax_adapter.json`."""


def digest_arrays(stored: Mapping[str, StoredTensor]) -> str:
    """Returns the digest of all names, dtypes, shapes and bytes of some tensors.

    Args:
      stored: Tensors of a file, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for _, values in tensor.pieces(dtype=tensor.stored_dtype):
            digest.update(values.reshape(-1).view("uint8").data)
    return f"sha256:{digest.hexdigest()}"


def digest_settings(settings: Mapping[str, Any]) -> str:
    """Returns the digest of settings, independent of key order and number format.

    Example:
      >>> digest_settings({"rank": 4, "alpha": 16.0}) == digest_settings({"alpha": 16, "rank": 4})
      True
    """
    text = json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _plain(value: Any) -> Any:
    """Returns a JSON value with integral floats as integers, so that 16.0 equals 16."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
