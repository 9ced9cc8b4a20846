"""Defines commands of the console script `peft-jax`, in the topmost package.

- [`main`][peft_jax.commands.main]: Runs a command.
- [`train`][peft_jax.commands.train]: Fine-tunes a model; `train.py` is the same.
- [`plan`][peft_jax.commands.plan]: Plans a run for devices that need not be present.
- [`export`][peft_jax.commands.export]: Writes an adapter as a merged model, for PEFT, or as a LoRA.
- [`combine`][peft_jax.commands.combine]: Combines several adapters into one LoRA.
- [`config_flags`][peft_jax.commands.config_flags]: Parses --config, and settings as flags.

The other commands are in the packages of their subjects.
"""
