"""Frees compiled programs before a process runs out of memory maps.

On a CPU, each object of a compiled program takes three memory maps. Linux allows a process 65,530
by default (`vm.max_map_count`). Beyond that, the compiler crashes with a segmentation fault. A
process that compiles thousands of programs, such as a study or a test suite, comes that far.
"""

import gc
from pathlib import Path

import jax

_OWN_MAPS = Path("/proc/self/maps")
_MOST_MAPS = Path("/proc/sys/vm/max_map_count")


def free_compiled_programs(*, share: float = 0.25) -> bool:
    """Frees JAX's compiled programs if the process uses much of its limit of memory maps.

    They are compiled again when they are needed. Call this where few of them are, between two runs.

    Args:
      share: Share of the limit from which programs are freed.

    Returns:
      Whether they were freed. False where the system has no such limit.
    """
    try:
        used = _OWN_MAPS.read_bytes().count(b"\n")
        limit = int(_MOST_MAPS.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    if used <= share * limit:
        return False
    jax.clear_caches()
    gc.collect()
    return True
