"""Runtime services that every command uses.

- [`errors`][peft_jax.runtime.errors]: errors that end a command, with their exit codes.
- [`exits`][peft_jax.runtime.exits]: one message in place of a traceback.
- [`flags`][peft_jax.runtime.flags]: command-line flags.
- [`files`][peft_jax.runtime.files]: atomic writes of files and folders.
- [`progress`][peft_jax.runtime.progress]: messages and progress on the terminal.
- [`clock`][peft_jax.runtime.clock]: seconds by phase, and rates.
- [`pending`][peft_jax.runtime.pending]: metrics collected without blocking dispatch.
- [`processes`][peft_jax.runtime.processes]: multi-process runs.
- [`interruption`][peft_jax.runtime.interruption]: signals that ask a run to stop.
- [`cpu_allocator`][peft_jax.runtime.cpu_allocator]: malloc settings for training on a CPU.

This module imports nothing, so that a command can report errors before it imports JAX.
"""
