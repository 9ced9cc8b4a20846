"""What a program may take."""

import dataclasses

from peft_jax.core.checks import check_positive, check_positive_int

_LEAST_MEMORY = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a program may take, with all processes that it starts.

    Attributes:
      seconds: of time, from start to end.
      memory_mib: of memory, of a process and of all together.
      processes: how many processes and threads there may be at a time, the program's own included.
      file_mib: the size of a file, and of all files together.
      output_kib: what is written to the standard output and error.

    Raises:
      ValueError: a limit that cannot be.
    """

    seconds: float = 10.0
    memory_mib: int = 1024
    processes: int = 16
    file_mib: int = 16
    output_kib: int = 64

    def __post_init__(self) -> None:
        check_positive("seconds", self.seconds)
        for name in ("memory_mib", "processes", "file_mib", "output_kib"):
            check_positive_int(name, getattr(self, name))
        if self.memory_mib < _LEAST_MEMORY:
            raise ValueError(
                f"memory_mib is {self.memory_mib}; Python itself wants {_LEAST_MEMORY} to start"
            )
