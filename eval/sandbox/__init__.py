"""Runs generated code in isolated processes with resource limits.

- [`limits`][eval.sandbox.limits]: `SandboxLimits`.
- [`api`][eval.sandbox.api]: `Sandbox`, `Outcome`, `IsolationError`.
- [`programs`][eval.sandbox.programs]: `TestedProgram`, which cannot access its test.
- [`jail`][eval.sandbox.jail]: The script that isolates and runs a program.
- [`system_calls`][eval.sandbox.system_calls]: The filter of system calls.
- [`values`][eval.sandbox.values]: The encoding of values between a program and its test.
- [`standard_library`][eval.sandbox.standard_library]: The files that a program can read.
- [`usage`][eval.sandbox.usage]: The memory of a process tree.
"""

from .api import IsolationError, Outcome, Sandbox
from .limits import SandboxLimits
from .programs import TestedProgram

__all__ = ["IsolationError", "Outcome", "Sandbox", "SandboxLimits", "TestedProgram"]
