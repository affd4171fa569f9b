"""Ranks of Horovod that share one history: all, those of a node, or those of a process set."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from typing import Any

import horovod.torch as hvd
from horovod.torch.mpi_ops import is_homogeneous

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.horovod import HorovodCommunicator
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.errors import ConfigError


def shard_group(comm: Communicator, process_set: Any, wanted: Any) -> ShardGroup:
    """The ranks that share one history with this rank. Collective over `comm`.

    Args:
        comm: `horovod_communicator(process_set)`.
        process_set: the ranks that train together.
        wanted: `AndersonConfig.shard_group`, of the same kind on all ranks.

    Raises:
        ConfigError: on every rank, if the ranks cannot be split in this way.
    """
    if comm.size == 1 or (isinstance(wanted, str) and wanted == "world"):
        return ShardGroup(comm)
    groups = _groups_of_nodes(comm) if wanted == "node" else _groups_of_sets(comm, wanted)
    mine = next(i for i, ranks in enumerate(groups) if hvd.rank() in ranks)
    if len(groups) == 1:
        return ShardGroup(comm)
    if len(groups[mine]) == 1:
        return ShardGroup(LocalCommunicator(), len(groups), mine)
    if wanted == "node":
        wanted = _registered(comm, process_set, groups)[mine]
    assert isinstance(comm, HorovodCommunicator)
    return ShardGroup(HorovodCommunicator(wanted, world=comm), len(groups), mine)


def _groups_of_nodes(comm: Communicator) -> list[list[int]]:
    if not is_homogeneous():
        raise ConfigError(
            "Invalid shard_group='node': the nodes of this job run different numbers of ranks. All "
            "nodes must run the same number, so that all groups divide the history in the same "
            "way. Otherwise use shard_group='world'."
        )
    nodes = defaultdict(list)
    for rank, host, cross in comm.allgather_object((hvd.rank(), platform.node(), hvd.cross_rank())):
        nodes[host].append((rank, cross))
    groups = []
    for ranks in nodes.values():
        # Several nodes may have the same name: then cross ranks tell them apart. Horovod numbers
        # cross ranks for each local rank separately, so they need not have the same order.
        named = defaultdict(list)
        for rank, cross in ranks:
            named[cross if len(ranks) > hvd.local_size() else None].append(rank)
        groups += list(named.values())
    groups.sort()
    _check_sizes("'node'", groups)
    return groups


def _groups_of_sets(comm: Communicator, wanted: Any) -> list[list[int]]:
    known = wanted.process_set_id is not None
    said = comm.allgather_object((hvd.rank(), list(wanted.ranks) if known else None))
    for rank, ranks in said:
        if ranks is None or rank not in ranks:
            raise ConfigError(
                f"Invalid shard_group on rank {rank}: its process set "
                + ("is not registered" if ranks is None else f"of ranks {ranks} leaves it out")
                + ". Must include this rank. Give the set to hvd.init or hvd.add_process_set first."
            )
    groups = sorted({tuple(ranks) for _, ranks in said})
    if sorted(rank for ranks in groups for rank in ranks) != sorted(rank for rank, _ in said):
        raise ConfigError(
            f"Invalid shard_group: process sets of ranks {[list(ranks) for ranks in groups]}. Each "
            "of the ranks that train together must be in exactly one of them."
        )
    _check_sizes("process set", groups)
    return [list(ranks) for ranks in groups]


def _check_sizes(wanted: str, groups: Any) -> None:
    sizes = sorted({len(ranks) for ranks in groups})
    if len(sizes) > 1:
        raise ConfigError(
            f"Invalid shard_group={wanted}: groups of {sizes} ranks. All groups must have the same "
            "size, so that they divide the history in the same way."
        )


def _registered(comm: Communicator, process_set: Any, groups: list[list[int]]) -> list[Any]:
    """Horovod's process sets of these ranks. Those that do not exist are added."""
    from horovod.common import process_sets

    # Horovod has no public way to find existing sets. The answer is the same on every rank.
    table = process_sets._basics._get_process_set_ids_and_ranks()
    known = {tuple(ranks): number for number, ranks in table.items()}
    missing = [ranks for ranks in groups if tuple(ranks) not in known]
    dynamic = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") not in ("", "0")
    if missing and not (all(comm.allgather_object(dynamic)) and comm.size == hvd.size()):
        raise ConfigError(
            f"Invalid shard_group='node': Horovod has no process sets of the ranks {missing}. "
            "Set HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment of all ranks. If the optimizer "
            "is on a process set, give the sets to hvd.init instead."
        )
    found = []
    for ranks in groups:
        if tuple(ranks) in known:
            known_set = hvd.ProcessSet(ranks)
            known_set.process_set_id = known[tuple(ranks)]
            found.append(known_set)
        else:
            found.append(hvd.add_process_set(ranks))
    return found
