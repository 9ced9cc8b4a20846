"""Returns the memory of devices, and the bytes that arrays take of it."""

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# A container's memory limit, in versions 2 and 1 of Linux control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory() -> int | None:
    """Returns the memory of one device in bytes; the host's for a CPU, None if unknown."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory() if device.platform == "cpu" else None


def host_memory() -> int:
    """Returns the memory of the host in bytes, or the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [Path(file).read_text().strip() for file in _LIMITS if Path(file).is_file()]
    return min([total, *(int(text) for text in texts if text.isdigit())])


def arrays_on_a_device(tree: Any) -> int:
    """Returns the bytes that a tree of shapes with shardings takes on one device.

    Example:
      >>> from peft_jax.parallel import MeshSettings, make_mesh
      >>> one = jax.NamedSharding(make_mesh(MeshSettings(devices=1)), jax.P())
      >>> arrays_on_a_device({"w": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=one)})
      24
    """
    return sum(
        bytes_of(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def check_fits(parts: dict[str, Any], hint: str) -> None:
    """Rejects arrays that cannot fit in memory together, before any of them is allocated.

    This is a lower bound: a step's temporaries need memory too.

    Args:
      parts: Trees of shapes with shardings, by name.
      hint: Advice for the message.

    Raises:
      ValueError: The arrays do not fit. The message states the size of each part and the memory.

    Example:
      >>> one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      >>> wide = jax.ShapeDtypeStruct((2**40, 2**10), jnp.float32, sharding=one)
      >>> check_fits({"the parameters": wide}, "take a smaller model")
      Traceback (most recent call last):
      ValueError: ... GiB of memory, too little for the parameters (4194304.0 GiB); take...
    """
    sizes = {name: arrays_on_a_device(tree) for name, tree in parts.items()}
    memory = device_memory()
    if memory is None:
        return
    where = "one device"
    if jax.local_devices()[0].platform == "cpu":
        # All CPU devices share the host's memory.
        where = "this host"
        leaves = [leaf for tree in parts.values() for leaf in jax.tree.leaves(tree)]
        local = max((len(leaf.sharding.addressable_devices) for leaf in leaves), default=1)
        sizes = {name: size * local for name, size in sizes.items()}
    if sum(sizes.values()) > memory:
        listing = ", ".join(f"{name} ({gib(size)})" for name, size in sizes.items())
        raise ValueError(f"{where} has {gib(memory)} of memory, too little for {listing}; {hint}")


def gib(size: int) -> str:
    """Returns a size in GiB.

    Example:
      >>> gib(3 * 2**29)
      '1.5 GiB'
    """
    return f"{size / 2**30:.1f} GiB"


def bytes_of(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes of an array; dtypes of less than eight bits are packed.

    Example:
      >>> bytes_of((4, 4), "bfloat16"), bytes_of((4, 4), "int4"), bytes_of((4,), "bool")
      (32, 8, 4)
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    else:
        bits = 8 * dtype.itemsize
    return math.ceil(math.prod(shape) * bits / 8)
