"""What a program may take."""

import dataclasses

from peft_jax.core.validation import check_positive, check_positive_int

_LEAST_MEMORY, _MOST_MEMORY = 64, 1 << 24
"""In MiB; the most is 16 TiB, which kernels can still be asked for."""

_MOST_SECONDS = 86_400.0


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
        if self.seconds > _MOST_SECONDS:
            raise ValueError(f"seconds is {self.seconds:g}; a program gets a day at most, 86400")
        for name in ("memory_mib", "processes", "file_mib", "output_kib"):
            check_positive_int(name, getattr(self, name))
        if self.memory_mib < _LEAST_MEMORY:
            raise ValueError(
                f"memory_mib is {self.memory_mib}; Python itself wants {_LEAST_MEMORY} to start"
            )
        for name in ("memory_mib", "file_mib"):
            if getattr(self, name) > _MOST_MEMORY:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at most {_MOST_MEMORY}, 16 TiB"
                )
