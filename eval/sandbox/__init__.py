"""Where generated code is run: a process that can reach nothing and lasts no longer than it may.

- [`limits`][eval.sandbox.limits]: `SandboxLimits`.
- [`api`][eval.sandbox.api]: `Sandbox`, `Outcome`, `IsolationError`.
- [`programs`][eval.sandbox.programs]: `TestedProgram`, whose test is out of its reach.
- [`jail`][eval.sandbox.jail]: what runs in the process, before the code and around it.
- [`system_calls`][eval.sandbox.system_calls]: the system calls that the code may not make.
- [`values`][eval.sandbox.values]: what goes between a program and its test.
- [`standard_library`][eval.sandbox.standard_library]: the files that the code has.
- [`usage`][eval.sandbox.usage]: what a tree of processes takes.
"""

from .api import IsolationError, Outcome, Sandbox
from .limits import SandboxLimits
from .programs import TestedProgram

__all__ = ["IsolationError", "Outcome", "Sandbox", "SandboxLimits", "TestedProgram"]
