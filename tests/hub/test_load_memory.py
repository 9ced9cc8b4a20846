"""Loading needs memory for the model and one tensor, not for two copies of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("peak memory is read from Linux's /proc", allow_module_level=True)

MIB = 2**20
LAYERS, WIDTH, INNER = 4, 1024, 4096

# getrusage reports a peak inherited from the parent process, while the one in /proc can be reset.
MEASURE = """
import re, sys
import jax, jax.numpy as jnp
import peft_jax.hub
jnp.zeros(1).block_until_ready()

def resident(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
_, params = peft_jax.hub.load_model(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(params)
print(resident("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a Llama checkpoint of 260 MiB in float32, in two files."""
    import jax

    from peft_jax.hub import save_model
    from peft_jax.models import build_model

    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
    }
    model = build_model(config)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract_params())
    folder = tmp_path_factory.mktemp("large")
    save_model(folder, model, zeros, max_shard_bytes=150 * MIB)
    return folder


@pytest.mark.fast("bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_model_and_one_tensor(folder, dtype):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURE, str(folder), dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, size = map(int, result.stdout.split())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert size == index["metadata"]["total_size"] // (1 if dtype == "float32" else 2)
    largest_tensor = WIDTH * INNER * 4
    assert peak > 0.95 * size
    assert peak < size + largest_tensor + 48 * MIB
