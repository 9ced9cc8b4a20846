"""The names that `import peft_jax` offers."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import peft_jax


@pytest.mark.parametrize("name", [name for name in peft_jax.__all__ if name != "__version__"])
def test_every_name_is_what_its_home_has(name):
    value = getattr(peft_jax, name)
    assert callable(value)
    home = importlib.import_module(f"peft_jax.{peft_jax._HOME[name]}")
    assert value is getattr(home, name)


def test_no_name_is_a_subpackage():
    modules = {module.name for module in pkgutil.iter_modules(peft_jax.__path__)}
    assert not modules & set(peft_jax.__all__)


def test_the_names_are_listed_once_and_described():
    assert sorted(peft_jax._HOME) == sorted(set(peft_jax.__all__) - {"__version__"})
    assert set(peft_jax.__all__) <= set(dir(peft_jax))
    missing = [name for name in peft_jax._HOME if f"`{name}`" not in (peft_jax.__doc__ or "")]
    assert not missing


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Lora'"):
        peft_jax.Lora  # noqa: B018


def test_names_outlive_the_import_of_every_submodule():
    """A subpackage sets an attribute of its parent, which must not shadow a name."""
    program = """
import pkgutil, importlib, sys
import peft_jax
assert "jax" not in sys.modules, "a bare import brings JAX along"
for module in pkgutil.walk_packages(peft_jax.__path__, "peft_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in peft_jax.__all__:
    value = getattr(peft_jax, name)
    assert isinstance(value, str) if name == "__version__" else callable(value), name
from jax._src import xla_bridge
assert not xla_bridge._backends, "an import starts a back end"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
