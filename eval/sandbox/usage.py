"""What a tree of processes takes, as the kernel counts it."""

import os
from pathlib import Path


def memory_of_tree(pid: int) -> int:
    """The resident memory of a process and all that come of it, in bytes; 0 when they are gone."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, waiting = 0, [pid]
    while waiting:
        process = Path("/proc", str(waiting.pop()))
        try:
            total += int((process / "statm").read_text().split()[1]) * page
            for thread in (process / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (OSError, IndexError, ValueError):
            continue  # It ended while it was looked at.
    return total
