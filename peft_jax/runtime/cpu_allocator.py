"""The memory of a step's temporaries on a CPU: had once, used by every step.

XLA takes what a step needs for its temporaries from malloc and frees it after the step. Blocks of
that size glibc returns to the kernel, and the next step's are made anew, page by page, each cleared
first. Two settings end it, and neither has a meaning beyond a CPU.
"""

import ctypes
import sys

import jax

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_LARGEST = 2**31 - 1


def dispatch_inline() -> None:
    """Has computations on one CPU device run in the thread that asks for them.

    glibc keeps freed blocks of any size in its main arena only, which is the main thread's.
    Computations over several devices, and on others than CPUs, are dispatched as before. It must
    come before JAX's first use of a device; later it changes nothing.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next one who asks, where the devices are CPUs.

    It is for after loading and compiling, whose blocks are of other sizes and are taken once.

    Returns:
      Whether it was done: not on other devices, nor with another C library.
    """
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No block is mapped by itself, and the end of the heap is not given back.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
