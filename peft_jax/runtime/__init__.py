"""What every command stands on, whatever it computes.

- [`errors`][peft_jax.runtime.errors]: errors that end a command, with their exit codes.
- [`exits`][peft_jax.runtime.exits]: one message in place of a traceback.
- [`flags`][peft_jax.runtime.flags]: the command line of a command.
- [`files`][peft_jax.runtime.files]: files and folders that are either whole or not there.
- [`progress`][peft_jax.runtime.progress]: messages and progress on the terminal.
- [`clock`][peft_jax.runtime.clock]: seconds by phase, and rates.
- [`pending`][peft_jax.runtime.pending]: metrics collected without blocking dispatch.
- [`processes`][peft_jax.runtime.processes]: several processes that form one run.
- [`interruption`][peft_jax.runtime.interruption]: signals that ask a run to stop.
- [`cpu_allocator`][peft_jax.runtime.cpu_allocator]: the C library's allocator, for steps on a CPU.

Nothing is imported here, so that a command's errors are there before JAX is.
"""
