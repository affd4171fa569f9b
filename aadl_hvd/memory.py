"""How much memory there is, to say before a training starts that a history will not fit."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could still be allocated; None where nobody says.

    On a processor that is what this machine, its container or its batch job has left for all its
    processes.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    known = [found for found in (_available(), *map(_left, _groups())) if found is not None]
    return min(known) if known and device.type == "cpu" else None


def place(device: torch.device) -> str:
    """What memory `device` allocates from: the same text on two ranks that share it."""
    if device.type == "cuda":
        return f"{platform.node()}, GPU {torch.cuda.get_device_properties(device).uuid}"
    return platform.node()


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = dict(line.split(":") for line in lines)["MemAvailable"].split()[0]
    except (OSError, KeyError, ValueError):
        return None
    return 1024 * int(kilobytes)


def _groups() -> list[Path]:
    """This process's control group (version 2) and all that it is inside of: each may be limited.

    A batch system puts a job's processes into one of its own.
    """
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
        own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    path = Path(own.lstrip("/"))
    return [_CGROUPS / part for part in (path, *path.parents)]


def _left(group: Path) -> int | None:
    """The group's limit, less what is used but for cached files; None: no limit."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        files = int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, KeyError, ValueError):  # "max" is no number: no limit
        return None
    return max(limit - used + files, 0)
