"""How many things to do at once, so that they fit into memory together."""

import os
from pathlib import Path

SHARE = 0.6  # of the memory that is free now


def available() -> int:
    """Bytes that this process may still take: free on the machine, and allowed by its container."""
    free = [8 << 30]  # where nothing can be asked
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [int(fields["MemAvailable"].split()[0]) << 10]
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass
    return max(min(free), 0)


def budget() -> float:
    return SHARE * available()


def workers(bytes_each: float) -> int:
    """One for each core, if there is memory for that; at least one."""
    return max(min(os.cpu_count() or 1, int(budget() / max(bytes_each, 1))), 1)
