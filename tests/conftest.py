"""Settings every test runs under: eight virtual devices, strict dtypes, checked array types."""

import atexit
import fnmatch
import gc
import importlib.metadata
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX is imported anywhere: tests run on the CPU, as eight devices, whatever else is there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Programs here run for milliseconds and compile for seconds, so the compiler optimizes little.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
_given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*_given, *(flag for flag in _FLAGS if flag not in _given)])


def _share_compiled_programs() -> None:
    """Keeps compiled programs for the run: for its workers, and for commands that tests start."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # The user's, or that of the process that started this worker.
    folder = tempfile.mkdtemp(prefix="peft_jax_compiled_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


_share_compiled_programs()

from jaxtyping import install_import_hook

# Array annotations are checked at every call while the tests run.
install_import_hook(["peft_jax", "kernels_pallas"], "beartype.beartype").__enter__()

import hypothesis
import jax
import pytest
from stand_in import make_stand_in

from kernels_pallas import dispatch
from peft_jax.runtime.compiled_programs import free_compiled_programs

jax.config.update("jax_numpy_dtype_promotion", "strict")


def _compile_without_fusion_emitters() -> None:
    """Sets a flag that jaxlib 0.10 has, where the compilers of later versions and of TPUs exit."""
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags = os.environ["XLA_FLAGS"]
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
        jax.jit(lambda: 0)()  # Flags are read once, by the first program.
        os.environ["XLA_FLAGS"] = flags


_compile_without_fusion_emitters()

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Looking for doctests in them would import several modules by the one name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


def pytest_collection_finish() -> None:
    """Keeps what was imported from the garbage collector, which is slow over so much."""
    gc.collect()
    gc.freeze()


_tests = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Frees compiled programs now and then, before the compiler would crash."""
    if next(_tests) % 20 == 0:
        free_compiled_programs()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks a test's variants as slow, except those that its marker `fast` names."""
    by_test: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("fast") and hasattr(item, "callspec"):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, variants in by_test.items():
        names = [item.callspec.id for item in variants]
        patterns = variants[0].get_closest_marker("fast").args
        for pattern in patterns:
            # Of a test that was not chosen as a whole, the named variants may be missing.
            if len(names) > len(patterns) and not fnmatch.filter(names, pattern):
                raise pytest.UsageError(f"{test} has no variant {pattern!r}, but {names}")
        for item, name in zip(variants, names, strict=True):
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def kernel_log() -> Iterator[list[str]]:
    """Lines that the kernels log during the test, including those already logged before."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("kernels_pallas")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    dispatch.log_once.cache_clear()
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def _published() -> Path | None:
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PEFT_JAX_SHARED_DATA", beside))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The folder of published data sets, which are not part of the project."""
    folder = _published()
    if folder is None:
        pytest.skip("it checks published data sets themselves: set PEFT_JAX_SHARED_DATA to a copy")
    return folder


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published data sets; where they are not at hand, rows of our own in their form."""
    return _published() or make_stand_in(tmp_path_factory.mktemp("data_of_our_own"))
