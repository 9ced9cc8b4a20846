"""The models and batches that training steps are compared on: Llamas of random parameters.

"small" has 32 million parameters and is for CPUs; "large" has 1.2 billion, so that a GPU is busy.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

_SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_LARGE = _SMALL | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
      config: as in a `config.json`.
      batch_size: rows.
      length: tokens of a row.
    """

    config: dict[str, Any]
    batch_size: int
    length: int


SIZES = {"small": Size(_SMALL, 8, 256), "large": Size(_LARGE, 8, 1024)}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a worker is told.

    Attributes:
      method: what is trained.
      size: one of `SIZES`.
      dtype: of the model.
      kernels: the implementation of our products.
    """

    method: str
    size: Size
    dtype: str
    kernels: str


def parse(arguments: Sequence[str]) -> Options:
    """METHOD [--size=small] [--dtype=float32] [--kernels=auto]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernels", choices=["auto", "xla", "pallas"], default="auto")
    given = parser.parse_args(arguments)
    return Options(given.method, SIZES[given.size], given.dtype, given.kernels)


LEARNING_RATE = 1e-4
RANK = 8
BLOCK_SIZE = 8
N_BUTTERFLY_FACTORS = 2
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
