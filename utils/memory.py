"""How much memory is free, and how many things to do at once so that they fit into it together."""

import os
from pathlib import Path

SHARE = 0.6  # of the memory that is free now
UNKNOWN = 8 << 30  # free bytes to count on where nothing can be asked
GROUPS = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that this process may still take: free on the machine, and allowed by its container. None: the
    system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        return None
    return max(min(free, _left_to_container(GROUPS) or free), 0)


def _left_to_container(group: Path) -> int | None:
    """Files that the system keeps in memory count as used there, but give way."""
    try:
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return max(limit - used + int(kept["inactive_file"]) + int(kept["active_file"]), 1)
    except (OSError, ValueError, KeyError):
        return None  # there is no limit


def budget() -> float:
    free = available()
    return SHARE * (UNKNOWN if free is None else free)


def workers(bytes_each: float) -> int:
    """One for each core, if there is memory for that; at least one."""
    return max(min(os.cpu_count() or 1, int(budget() / max(bytes_each, 1))), 1)
