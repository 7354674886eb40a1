"""Memory: how much is free, how many things fit into it together, and how running out of it is recognized."""

import os
import platform
import sys
from pathlib import Path

import torch

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


def grow_in_place() -> None:
    """Gaussians become more and more, and what they leave is too small for their successors: let PyTorch put
    pieces of GPU memory beside each other. To be called before it has any; who has settings keeps them."""
    able = sys.platform == "linux" and "microsoft" not in platform.release().lower()  # Windows cannot
    if able and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has its own error for GPUs; on the host it and C++ have others."""
    text = str(error)
    on_host = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)
    return on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def in_short(error: BaseException) -> str:
    """PyTorch says much about its memory; what to do is not among it."""
    what = str(error).partition(". ")[0] or "out of memory"
    return f"{what}; smaller photos (-r), or --data_device cpu, may help"
