"""Where generated code is run: a process that can reach nothing and lasts no longer than it may.

- [`limits`][eval.sandbox.limits]: `SandboxLimits`.
- [`api`][eval.sandbox.api]: `Sandbox`, `Outcome`, `IsolationError`.
- [`jail`][eval.sandbox.jail]: what runs in the process, before the code and around it.
- [`system_calls`][eval.sandbox.system_calls]: the system calls that the code may not make.
- [`usage`][eval.sandbox.usage]: what a tree of processes takes.
"""

from eval.sandbox.api import IsolationError, Outcome, Sandbox
from eval.sandbox.limits import SandboxLimits

__all__ = ["IsolationError", "Outcome", "Sandbox", "SandboxLimits"]
