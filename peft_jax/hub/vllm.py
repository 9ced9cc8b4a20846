"""Says how vLLM loads an adapter in Hugging Face PEFT's format, or why it does not.

The conditions are those of vLLM's `PEFTHelper` and `LoRAConfig`. It reads one rank and one alpha
for all modules, and no `rank_pattern` or `alpha_pattern`.
"""

from collections.abc import Mapping
from typing import Any

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`, without 1."""


def vllm_note(config: Mapping[str, Any]) -> str:
    """Returns one sentence on vLLM for the content of an `adapter_config.json`.

    Example:
      >>> lora = {"peft_type": "LORA", "r": 24, "lora_alpha": 24}
      >>> vllm_note(lora)
      'vLLM loads it with --enable-lora --max-lora-rank=32.'
      >>> vllm_note(lora | {"modules_to_save": ["lm_head"]})
      'vLLM does not load it, because lm_head is trained in full; serve the merged model.'
      >>> vllm_note(lora | {"target_parameters": ["mlp.experts.down_proj"]}).split(" depends")[0]
      'Whether vLLM loads an adapter of experts or routers'
      >>> vllm_note({"peft_type": "BOFT"})
      'vLLM does not load it, because it has no BOFT; --format=lora writes a LoRA near it.'
    """
    if config["peft_type"] != "LORA":
        reason, instead = f"it has no {config['peft_type']}", "--format=lora writes a LoRA near it"
    elif config.get("use_dora"):
        reason, instead = "it has no DoRA", "--format=lora writes a LoRA near it"
    elif saved := config.get("modules_to_save"):
        reason, instead = f"{', '.join(saved)} is trained in full", "serve the merged model"
    elif config.get("rank_pattern") or config.get("alpha_pattern"):
        return (
            "vLLM would compute something else, because it ignores rank_pattern and alpha_pattern;"
            " --format=lora with the largest rank writes the same adapter without them."
        )
    elif config.get("target_parameters"):
        return (
            "Whether vLLM loads an adapter of experts or routers depends on the model and on vLLM's"
            " version; all serve the merged model."
        )
    elif config["r"] > RANKS[-1]:
        reason, instead = f"its rank is {config['r']}", f"{RANKS[-1]} is the largest"
    else:
        largest = next(rank for rank in RANKS if rank >= config["r"])
        return f"vLLM loads it with --enable-lora --max-lora-rank={largest}."
    return f"vLLM does not load it, because {reason}; {instead}."
