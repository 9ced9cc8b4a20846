"""Lets training steps on a CPU reuse the memory of their temporaries.

XLA allocates a step's temporaries with malloc and frees them after the step. glibc returns blocks
of that size to the kernel, so the next step page-faults on fresh pages, each cleared first. Two
settings avoid this. They only concern CPUs.
"""

import ctypes
import sys

import jax

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_LARGEST = 2**31 - 1


def dispatch_inline() -> None:
    """Runs computations on one CPU device in the calling thread.

    glibc keeps large freed blocks only in the main thread's arena. Computations over several
    devices or on accelerators are dispatched as before. Call this before JAX first uses a device;
    later it has no effect.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for later allocations, if the devices are CPUs.

    Call this after loading and compiling, which allocate blocks of other sizes only once.

    Returns:
      Whether the setting was made. It is not on other devices or with another C library.
    """
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Disables mmap for single blocks, and never trims the end of the heap.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
