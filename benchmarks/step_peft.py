"""Serves a training step of PEFT, as a worker: `python -m benchmarks.step_peft METHOD`."""

import sys
import warnings

import torch
from peft import BOFTConfig, LoraConfig, OFTConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import small_llama as setup
from benchmarks.worker import await_turn, serve

CONFIGS = {
    "full": None,
    "lora": lambda: LoraConfig(
        r=setup.RANK, lora_alpha=16, target_modules=setup.LINEARS, lora_dropout=0.0
    ),
    "dora": lambda: LoraConfig(
        r=setup.RANK,
        lora_alpha=16,
        target_modules=setup.LINEARS,
        lora_dropout=0.0,
        use_dora=True,
    ),
    # Its blocks come from the same truncated series as ours.
    "oft": lambda: OFTConfig(
        oft_block_size=setup.OFT_BLOCK_SIZE, r=0, target_modules=setup.LINEARS
    ),
    # Without its CUDA extension PEFT sets the number of factors to 1.
    "boft": lambda: BOFTConfig(
        boft_block_size=setup.BLOCK_SIZE,
        boft_n_butterfly_factor=setup.N_BUTTERFLY_FACTORS,
        target_modules=setup.LINEARS,
    ),
}


def make_model(options: setup.Options) -> torch.nn.Module:
    """Builds a random model on the GPU, or on the CPU without a GPU."""
    torch.manual_seed(0)
    config = dict(options.size.config)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config),
            dtype=getattr(torch, options.dtype),
        )


def main(options: setup.Options) -> None:
    """Builds the step of one method and serves it."""
    method, size = options.method, options.size
    warnings.filterwarnings("ignore")
    model = make_model(options)
    device = model.device
    model.config.use_cache = False
    if CONFIGS[method] is not None:
        model = get_peft_model(model, CONFIGS[method]())
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setup.LEARNING_RATE, weight_decay=0.0)
    tokens = torch.randint(
        0, size.config["vocab_size"], (size.batch_size, size.length), device=device
    )

    await_turn()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    count = sum(p.numel() for p in trained)
    serve(
        run,
        device_peak=lambda: torch.cuda.max_memory_allocated() or None,
        trainable=count,
        library="Hugging Face PEFT",
        method=method,
    )


if __name__ == "__main__":
    main(setup.parse(sys.argv[1:]))
