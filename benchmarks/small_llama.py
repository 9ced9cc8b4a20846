"""Defines the random Llamas and batches on which training steps are compared.

"small" has 32 million parameters, and "smollm2" the dimensions of SmolLM2-135M, for CPUs. "large"
has 1.1 billion parameters, for GPUs. "8b" has the dimensions of Llama 3 8B.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

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
_SMOLLM2 = _SMALL | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
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


_8B = _LARGE | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
      config: Content of `config.json`.
      batch_size: Number of rows.
      length: Number of tokens of a row.
    """

    config: dict[str, Any]
    batch_size: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens of a step."""
        return self.batch_size * self.length

    def flops(self, *, trained: bool) -> float:
        """Returns the floating-point operations of a step, without those of adapters.

        A frozen kernel takes two products and a trainable one three. Attention is causal.

        Args:
          trained: Whether the kernels are trained.
        """
        config = self.config
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        kv_width = config["num_key_value_heads"] * head_dim
        layer = config["hidden_size"] * (
            2 * config["hidden_size"] + 2 * kv_width + 3 * config["intermediate_size"]
        )
        head = config["hidden_size"] * config["vocab_size"]
        kernels = config["num_hidden_layers"] * layer + head
        attention = 6.0 * self.length * config["hidden_size"] * config["num_hidden_layers"]
        return self.tokens * (2.0 * (3 if trained else 2) * kernels + attention)


SIZES = {
    "small": Size(_SMALL, 8, 256),
    "smollm2": Size(_SMOLLM2, 4, 128),
    "large": Size(_LARGE, 8, 1024),
    "8b": Size(_8B, 2, 2048),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a worker.

    Attributes:
      method: Fine-tuning method.
      size: One of `SIZES`.
      dtype: Dtype of the model.
      kernels: Implementation of our kernels.
      quantization: Quantization of our base model.
      scan_layers: Whether our layers are scanned.
    """

    method: str
    size: Size
    dtype: str
    kernels: str
    quantization: str
    scan_layers: bool


def parse(arguments: Sequence[str]) -> Options:
    """Parses METHOD and the flags that `--help` lists."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernels", choices=["auto", "xla", "pallas"], default="auto")
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"], default="none")
    parser.add_argument("--scan_layers", action="store_true")
    given = vars(parser.parse_args(arguments))
    return Options(**given | {"size": SIZES[given["size"]]})


def prompts(size: Size) -> np.ndarray:
    """Returns random prompts, int64 [rows, tokens]."""
    shape = (size.batch_size, PROMPT_TOKENS)
    return np.random.default_rng(1).integers(1, size.config["vocab_size"], shape)


PROMPT_TOKENS = 128
NEW_TOKENS = 128
"""Numbers of tokens of a prompt and of its continuation."""

LEARNING_RATE = 1e-4
RANK = 8
BLOCK_SIZE = 8
N_BUTTERFLY_FACTORS = 2
OFT_BLOCK_SIZE = 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
