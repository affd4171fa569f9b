"""How much memory there is, to say before a training starts that a history will not fit."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")

# By version of control groups: the files that hold limit and use, and of the use, by name in
# memory.stat, what the kernel takes back before it kills. That is cached files, those read more
# than once (active) like the others. Files in memory alone (tmpfs, shared memory) are in neither.
_FILES = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
    ),
    2: (
        ("memory.max", "memory.current"),
        ("inactive_file", "active_file", "slab_reclaimable"),
    ),
}


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could still be allocated; None where nobody says.

    On a processor that is what this machine, its container or its batch job has left for all its
    processes. Cached files count as free, as for the kernel.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    known = [found for found in (_available(), *_left_in_groups()) if found is not None]
    return min(known) if known and device.type == "cpu" else None


def place(device: torch.device) -> str:
    """What memory `device` allocates from: the same text on two ranks that share it."""
    if device.type == "cuda":
        return f"{platform.node()}, GPU {torch.cuda.get_device_properties(device).uuid}"
    return platform.node()


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        kilobytes = dict(line.split(":") for line in lines)["MemAvailable"].split()[0]
    except (OSError, KeyError, ValueError):
        return None
    return 1024 * int(kilobytes)


def _left_in_groups() -> list[int | None]:
    """What is left in this process's control group and in all that it is inside of.

    Each may be limited. A batch system puts a job's processes into one of its own.
    """
    try:
        lines = [line.split(":", 2) for line in _OWN_CGROUP.read_text().splitlines()]
        owns = {kinds: path for _, kinds, path in lines}
    except (OSError, ValueError):
        owns = {}
    memory = next((path for kinds, path in owns.items() if "memory" in kinds.split(",")), "/")
    places = [(1, _CGROUPS / "memory", memory), (2, _CGROUPS, owns.get("", "/"))]
    found = []
    for version, top, own in places:
        path = Path(own.lstrip("/"))
        found += [_left(version, top / part) for part in (path, *path.parents)]
    return found


def _left(version: int, group: Path) -> int | None:
    """The group's limit, less what is used and cannot be taken back; None: no limit."""
    names, reclaimable = _FILES[version]
    try:
        limit, used = (int((group / name).read_text()) for name in names)
        lines = (group / "memory.stat").read_text().splitlines()
        stat = {name: int(count) for name, count in map(str.split, lines)}
    except (OSError, ValueError):  # "max" is no number: no limit
        return None
    return max(limit - used + sum(stat.get(name, 0) for name in reclaimable), 0)
