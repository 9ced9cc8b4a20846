"""Reads rows from files or the hub, formats them by recipes, and builds batches of tokens.

- [`settings`][peft_jax.data.settings]: `dataset` and `DataSettings`, which describe rows.
- [`pipeline`][peft_jax.data.pipeline]: `build_data` builds the training stream and held-out set.
- [`train_data`][peft_jax.data.train_data]: `TrainData`, the training stream.
- [`eval_data`][peft_jax.data.eval_data]: `EvalData`, the held-out batches.
- [`batch`][peft_jax.data.batch]: `Batch` and `LabeledBatch` hold a step's arrays.
- [`recipes`][peft_jax.data.recipes]: turn a row into a prompt and an answer.
- [`examples`][peft_jax.data.examples]: `Example`, a row as text.
- [`chat`][peft_jax.data.chat]: `ChatRenderer` renders conversations as text.
- [`encode`][peft_jax.data.encode]: `Encoder` tokenizes text.
- [`labeled`][peft_jax.data.labeled]: `LabeledEncoder` tokenizes labeled texts for encoders.
"""

from peft_jax.data.bad_rows import BadRowError, BadRows, UnusableRowsError
from peft_jax.data.batch import AnyBatch, Batch, LabeledBatch, abstract_batch, padding_share
from peft_jax.data.encode import Encoded, Encoder
from peft_jax.data.eval_data import EvalData
from peft_jax.data.examples import Conversation, Example, Piece
from peft_jax.data.labeled import LabeledEncoder
from peft_jax.data.pipeline import build_data
from peft_jax.data.recipes import RECIPES, Recipe, get_recipe
from peft_jax.data.settings import DataSettings, dataset
from peft_jax.data.train_data import TrainData

__all__ = [
    "RECIPES",
    "AnyBatch",
    "BadRowError",
    "BadRows",
    "Batch",
    "Conversation",
    "DataSettings",
    "Encoded",
    "Encoder",
    "EvalData",
    "Example",
    "LabeledBatch",
    "LabeledEncoder",
    "Piece",
    "Recipe",
    "TrainData",
    "UnusableRowsError",
    "abstract_batch",
    "build_data",
    "dataset",
    "get_recipe",
    "padding_share",
]
