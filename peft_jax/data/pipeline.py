"""Builds the training stream and the held-out set from settings."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from peft_jax.data.chat import ChatRenderer
from peft_jax.data.encode import Encoder
from peft_jax.data.eval_data import EvalData
from peft_jax.data.labeled import LabeledEncoder
from peft_jax.data.recipes import Recipe, get_recipe
from peft_jax.data.recipes.columns import warn_of_unread_columns
from peft_jax.data.row_reader import RowReader
from peft_jax.data.settings import DataSettings
from peft_jax.data.sources import Sources, open_sources
from peft_jax.data.tables import MemoryTable
from peft_jax.data.train_data import TrainData

_log = logging.getLogger(__name__)


def build_data(
    settings: DataSettings,
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    labeled: bool = False,
    say: Callable[[str], None] = _log.info,
) -> tuple[TrainData, EvalData]:
    """Builds the training stream and the held-out set of a run.

    With several processes, each builds the whole stream and gives its devices their rows of every
    batch. So batches and stream positions are the same for any number of processes and any mesh.
    Each process tokenizes all rows, in a background thread.

    Args:
      settings: Data settings.
      tokenizer: A transformers tokenizer; a copy is used in a background thread.
      batch_size: B, number of rows per batch over all devices and processes.
      max_length: T, number of positions per row.
      seed: Seed of the order of rows.
      labeled: Whether to build `LabeledBatch`es, for an encoder with a head. A row then holds one
        text or pair of texts, is never packed, and is truncated by default if it is too long.
      say: Called with a message if the check of rows takes long.

    Returns:
      The training stream, an endless iterator of `Batch`es [B, T] with a state; and the held-out
      batches of the same shape, a sequence that is empty if there are no held-out rows.

    Raises:
      ValueError: Settings do not fit the data or each other, or bad rows are an error.
      FileNotFoundError: A path does not exist.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    recipe = get_recipe(settings.recipe).configured(settings)
    sources = open_sources(settings, recipe, seed=seed)
    warn_of_unread_columns(recipe, sources.train)
    # A background thread tokenizes, and a fast tokenizer may fail if two threads use it.
    own_tokenizer = copy.deepcopy(tokenizer)
    encoder: Encoder | LabeledEncoder
    if labeled:
        encoder = LabeledEncoder(own_tokenizer, settings, max_length=max_length)
        settings = dataclasses.replace(settings, packing=False)
    else:
        encoder = _make_encoder(settings, recipe, own_tokenizer, max_length)
    reader = RowReader(recipe, encoder, settings)
    held_out = EvalData(
        MemoryTable([], "no held-out rows") if sources.held_out is None else sources.held_out,
        reader,
        origin=sources.held_out_origin,
        fallback_advice=_without_held_out(settings, sources),
        packing=settings.packing,
        batch_size=batch_size,
    )
    train = TrainData(
        sources.train,
        reader,
        settings,
        origin=sources.train_origin,
        batch_size=batch_size,
        seed=seed,
        say=say,
    )
    return train, held_out


def _without_held_out(settings: DataSettings, sources: Sources) -> str:
    """Returns advice on how to avoid the held-out rows of a run."""
    instead = "evaluate on rows taken from the training rows, set data.hold_out=0.05"
    for name in ("eval_path", "eval_split"):
        if getattr(settings, name):
            return f"To {instead} and leave data.{name} empty."
    train, held_out = sources.train_origin, sources.held_out_origin
    if (train.name, train.split) != (held_out.name, held_out.split):
        return f"To {instead}."
    return "To train without evaluating on held-out rows, set data.hold_out=0."


def _make_encoder(
    settings: DataSettings, recipe: Recipe, tokenizer: Any, max_length: int
) -> Encoder:
    renderer = None
    asked = settings.chat or settings.chat_template or settings.system_prompt
    if asked or recipe.makes_conversations:
        renderer = ChatRenderer(
            tokenizer,
            chat_template=settings.chat_template,
            system_prompt=settings.system_prompt,
            split_special_tokens=settings.split_special_tokens,
        )
    return Encoder(
        tokenizer,
        max_length=max_length,
        completion_only=recipe.completion_only,
        too_long=recipe.too_long,
        renderer=renderer,
        split_special_tokens=settings.split_special_tokens,
    )
