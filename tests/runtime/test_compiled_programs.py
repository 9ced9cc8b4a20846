"""Tests that memory maps of compiled programs are given back."""

import jax
import jax.numpy as jnp
import pytest

from peft_jax.runtime import compiled_programs
from peft_jax.runtime.compiled_programs import free_compiled_programs


@pytest.mark.slow
@pytest.mark.skipif(not compiled_programs._OWN_MAPS.exists(), reason="only Linux lists its maps")
def test_programs_are_freed_once_they_take_their_share():
    @jax.jit
    def double(x):
        return x * 2

    double(jnp.ones(3))
    assert double._cache_size() == 1
    assert not free_compiled_programs(share=1.0)
    assert double._cache_size() == 1
    assert free_compiled_programs(share=0.0)
    assert double._cache_size() == 0
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]


def test_nothing_is_freed_where_there_is_no_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled_programs, "_MOST_MAPS", tmp_path / "absent")
    assert not free_compiled_programs(share=0.0)
