"""Chooses the methods and the forms of embeddings, which are looked up instead of multiplied."""

import dataclasses

from peft_jax.adapters.lora import LoRA, LoRAForm
from peft_jax.adapters.lora_embedding import LoRAEmbedding, LoRAEmbeddingForm
from peft_jax.adapters.method import AdapterMethod
from peft_jax.adapters.peft_form import PeftForm


def method_of_embedding(method: AdapterMethod, module: str) -> AdapterMethod:
    """Returns a method for an embedding [vocab, embed].

    Args:
      method: Method of the specification.
      module: Name of the embedding, for messages.

    Raises:
      ValueError: The method cannot adapt embeddings.
    """
    if method.maps_tokens:
        return method
    if type(method) is LoRA:
        return LoRAEmbedding(**dataclasses.asdict(method))
    raise ValueError(
        f"target_modules selects {module}, which is an embedding and not a linear map, and"
        f" {method.name} cannot adapt it; train it with modules_to_save"
    )


def form_of_embedding(form: type[PeftForm]) -> type[PeftForm] | None:
    """Returns the form of an embedding in adapters of a form; None if they have none."""
    if form.of_embeddings:
        return form
    return LoRAEmbeddingForm if issubclass(form, LoRAForm) else None
