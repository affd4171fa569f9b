"""How much memory there is and how much is needed: a history that does not fit is refused early."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import torch

from aadl_hvd.comm.base import Communicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.blocks import DEPTH, VECTORS
from aadl_hvd.core.gram import matrix_bytes
from aadl_hvd.core.products import working_bytes
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.errors import HistoryMemoryError

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


def history_bytes(config: AndersonConfig, sharding: Sharding, work: torch.dtype) -> int:
    """Bytes at most of history and averages on this rank.

    Args:
        config: settings.
        sharding: this rank's rows and columns.
        work: dtype of pairs and averages.
    """
    if not config.enabled:
        return 0
    lo, hi = sharding.rows
    stored, pairs = 2 * len(sharding.slots), 4
    if config.hands_over or config.method == "subspace":  # one method's memory at a time
        stored, pairs = max(stored, 2 * DEPTH), VECTORS + 1
    others = pairs + (config.average_window or 0) + 2 * len(config.averages)
    column = stored * (config.history_dtype or work).itemsize
    return (hi - lo) * (column + others * work.itemsize)


def forecast(
    config: AndersonConfig, sharding: Sharding, work: torch.dtype, device: torch.device, ranks: int
) -> dict[torch.device, int]:
    """Bytes at most of all that grows with the depth, by device: what stays and what steps use.

    Args:
        config: settings.
        sharding: this rank's rows and columns.
        work: dtype of pairs and averages.
        device: of the weights.
        ranks: how many train together.
    """
    if not config.enabled:
        return {}
    # Columns that are stored between two acceleration steps are multiplied with all others.
    fresh = min(config.history_depth, config.frequency // config.store_every + 1)
    needed = {device: history_bytes(config, sharding, work)}
    if config.averages and (config.hands_over or config.method == "subspace"):
        lo, hi = sharding.rows  # the diagonal of weight decay, and the residual with it
        needed[device] += 2 * (hi - lo) * work.itemsize
    if config.overlap and (config.hands_over or config.method == "subspace"):
        lo, hi = sharding.rows  # a jump: this rank's rows, and when they have arrived all
        needed[device] += (hi - lo + sharding.n) * work.itemsize
    needed[device] += working_bytes(sharding, config.history_dtype or work, work, device, fresh)
    host = torch.device("cpu")
    needed[host] = needed.get(host, 0) + matrix_bytes(config.history_depth, ranks)
    return needed


def check_fits(needed: dict[torch.device, int], depth: int, comm: Communicator) -> None:
    """Compares what all ranks need with what is free. Collective.

    Args:
        needed: what `forecast` returned.
        depth: m, for the message.
        comm: the ranks that train together.

    Raises:
        HistoryMemoryError: on every rank, if the history of any does not fit, or what the steps
            compute from it.
    """
    here = [(own, free_bytes(device), place(device)) for device, own in needed.items()]
    total: dict[str, int] = {}
    free: dict[str, float] = {}
    everybody = [
        (rank, *entry)
        for rank, entries in enumerate(comm.allgather_object(here))
        for entry in entries
    ]
    for _, own, left, where in everybody:
        total[where] = total.get(where, 0) + own
        free[where] = min(free.get(where, math.inf), math.inf if left is None else left)
    for rank, own, _, where in everybody:
        if total[where] > free[where]:
            raise HistoryMemoryError(
                f"The history would take {own / 1e9:.3g} GB on rank {rank}, "
                f"{total[where] / 1e9:.3g} GB with all ranks on {where}, where "
                f"{free[where] / 1e9:.3g} GB are free. Lower history_depth={depth}, or choose "
                "history_dtype='bfloat16', averages=() or average_window=None; with "
                "layout='rows' and shard_group='world' each of P ranks holds one P-th."
            )


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
