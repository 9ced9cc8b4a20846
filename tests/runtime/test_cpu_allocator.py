"""Memory that a step has freed is there for the next step."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import jax
import jax.numpy as jnp
from peft_jax.runtime.cpu_allocator import dispatch_inline, keep_freed_memory

if "inline" in sys.argv:
    dispatch_inline()

LAYERS = 40

@jax.jit
@jax.grad
def step(x):
    y = x
    for _ in range(LAYERS):
        y = jnp.tanh(y @ x)
    return jnp.sum(y)

x = jax.block_until_ready(jnp.ones((512, 512)))
jax.block_until_ready(step(x))
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit("nothing was set")
jax.block_until_ready(step(x))

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(pages() for _ in range(12)))
"""
PAGES = 40 * 512 * 512 * 4 // 4096
"""Each layer's output is kept for the gradient."""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is asked")
def test_a_step_s_pages_are_made_once():
    """The kernel's count of pages made anew: all of a step's without the settings, few with.

    The step with the fewest is taken. Without the settings each step makes all its pages. With them
    none does in JAX 0.10, and in JAX 0.12 only those of threads that have not had a part of a step
    yet. On a busy machine these come late, and other programs add to single steps.
    """

    def pages(*settings):
        command = [sys.executable, "-c", PROGRAM, *settings]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout)

    before = pages()
    assert before > PAGES
    assert pages("inline", "keep") < 0.4 * before
