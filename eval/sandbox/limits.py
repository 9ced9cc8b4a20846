"""Defines the resource limits of a program."""

import dataclasses

from peft_jax.core.validation import check_positive, check_positive_int

_MIN_MEMORY, _MAX_MEMORY = 64, 1 << 24
"""In MiB; the maximum is 16 TiB, which kernels accept as a limit."""

_MAX_SECONDS = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Resource limits of a program with all processes that it starts.

    Attributes:
      seconds: Run time.
      memory_mib: Memory of each process and of all together.
      processes: Number of processes and threads, including the program's own.
      file_mib: Size of each file and of all together.
      output_kib: Size of the standard output and error.

    Raises:
      ValueError: A limit is invalid.
    """

    seconds: float = 10.0
    memory_mib: int = 1024
    processes: int = 16
    file_mib: int = 16
    output_kib: int = 64

    def __post_init__(self) -> None:
        check_positive("seconds", self.seconds)
        if self.seconds > _MAX_SECONDS:
            raise ValueError(f"seconds is {self.seconds:g} but must be at most 86400, a day")
        for name in ("memory_mib", "processes", "file_mib", "output_kib"):
            check_positive_int(name, getattr(self, name))
        if self.memory_mib < _MIN_MEMORY:
            raise ValueError(
                f"memory_mib is {self.memory_mib} but must be at least {_MIN_MEMORY}, which Python"
                " needs to start"
            )
        for name in ("memory_mib", "file_mib"):
            if getattr(self, name) > _MAX_MEMORY:
                raise ValueError(
                    f"{name} is {getattr(self, name)} but must be at most {_MAX_MEMORY}, 16 TiB"
                )
