"""What a tree of processes takes, as the kernel counts it."""

from pathlib import Path

_COUNTED = ("VmRSS", "VmSwap", "VmPTE")


def memory_of_tree(pid: int) -> int:
    """Returns the memory of a process and all that come of it, in bytes; 0 when they are gone.

    It is what is resident, what was swapped out, and the tables of its pages.
    """
    total, waiting = 0, [pid]
    while waiting:
        process = Path("/proc", str(waiting.pop()))
        try:
            for line in (process / "status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in _COUNTED:
                    total += int(value.split()[0]) << 10
            for thread in (process / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (OSError, IndexError, ValueError):
            continue  # It ended while it was looked at.
    return total
