"""Serves a training step of Tunix, as a worker: `python -m benchmarks.step_tunix METHOD`.

It runs in an environment of its own (`benchmarks.tunix_environment`), because Tunix requires an
older safetensors than transformers does. It takes no module of peft_jax.
"""

import sys
from typing import Any

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from benchmarks import small_llama as setup
from benchmarks.worker import await_turn, serve

ALPHA = 16.0


def make_model(config: dict[str, Any]) -> Llama3:
    """Returns a random model in float32."""
    heads = config["num_attention_heads"]
    return Llama3(
        ModelConfig(
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            num_heads=heads,
            head_dim=config["hidden_size"] // heads,
            num_kv_heads=config["num_key_value_heads"],
            rope_theta=int(config["rope_theta"]),
            norm_eps=config["rms_norm_eps"],
            weight_tying=config["tie_word_embeddings"],
        ),
        rngs=nnx.Rngs(0),
    )


def model_input(batch: TrainingInput) -> dict[str, Any]:
    """Returns the arguments of Tunix's own loss, as its examples make them."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def main(options: setup.Options) -> None:
    """Builds the step of one method and serves it."""
    size = options.size
    model = make_model(size.config)
    if options.method == "lora":
        modules = "|".join(setup.LINEARS)
        provider = qwix.LoraProvider(module_path=f".*({modules})", rank=setup.RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(
            model, provider, rngs=nnx.Rngs(1), **model.get_model_input()
        )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(setup.LEARNING_RATE, weight_decay=0.0)
    )
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=1_000_000))
    trainer = trainer.with_gen_model_input_fn(model_input)
    shape = (size.batch_size, size.length)
    tokens = np.random.default_rng(0).integers(0, size.config["vocab_size"], shape, np.int32)
    batch = jax.device_put(TrainingInput(input_tokens=tokens, input_mask=np.ones(shape, bool)))
    kind = nnx.LoRAParam if options.method == "lora" else nnx.Param
    trainable = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))

    await_turn()
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def run() -> float:
        loss, _, _ = step(batch)
        return float(loss)

    serve(run, trainable=trainable, library="Tunix", method=options.method)


if __name__ == "__main__":
    main(setup.parse(sys.argv[1:]))
