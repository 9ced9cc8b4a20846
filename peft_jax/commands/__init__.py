"""The commands of the console script `peft-jax`, the topmost room.

- [`main`][peft_jax.commands.main]: `peft-jax`, which runs one of them.
- [`train`][peft_jax.commands.train]: fine-tunes a model; `train.py` is the same.
- [`plan`][peft_jax.commands.plan]: plans a run on devices that need not be there.
- [`export`][peft_jax.commands.export]: writes an adapter as a whole model, or for PEFT.
- [`config_flags`][peft_jax.commands.config_flags]: --config, and settings as flags.

The other commands are in the rooms whose work they do.
"""
