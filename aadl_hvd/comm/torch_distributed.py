"""Ranks of a process group of torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aadl_hvd.comm.base import (
    ADVICE,
    Communicator,
    Gathering,
    ShardGroup,
    Values,
    checked_tensor,
)
from aadl_hvd.comm.hosts import Hosts
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.errors import CommunicationError, ConfigError

LET_GO = 0.1
"""Seconds at a program's end in which Gloo's threads let go of the last collective's tensors. For
that they need Python's lock. When Python ends, it gives the lock to no other thread: one that still
waits for it aborts the process, whose program has ended well. Plain torch does so, too."""


class TorchCommunicator(Communicator):
    """Small vectors and bytes go through a host's transport (Gloo), tensors through their device's.

    Where the group has no transport for host memory, as on NCCL, a Gloo group of all ranks is made
    for it. The constructor is collective over the group. A part of the ranks cannot have one:
    torch numbers new groups on each rank, and a group that some ranks make alone puts the numbers
    of the others out of step, so that the next `new_group` waits for ever. Small vectors go through
    the GPU there.

    Args:
        group: a process group that includes this rank.
    """

    def __init__(self, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group: Any = group
        self._host: Any = group
        self._device = torch.device("cpu")
        if "cpu:" not in dist.get_backend_config(group):
            if self.size == dist.get_world_size() and dist.is_gloo_available():
                self._host = dist.new_group(backend="gloo", timeout=_timeout(group))
            else:
                self._device = torch.device("cuda", torch.cuda.current_device())
        self._hosts = Hosts(self.allgather_object)
        atexit.unregister(_let_go)  # once, whatever the number of communicators
        atexit.register(_let_go)

    def parts(self, groups: list[list[int]]) -> list[Any]:
        """New groups of ranks of the world. Collective over this group.

        Raises:
            ConfigError: this group is a part of the world; see the class.
        """
        if self.size < dist.get_world_size():
            raise ConfigError(
                "Invalid shard_group='node' with a process_group of some of the ranks: all ranks "
                "must make its groups. Must be the process group itself, made before by "
                "torch.distributed.new_group on all ranks."
            )
        settings: Any = {
            "backend": dist.get_backend_config(self._group),
            "timeout": _timeout(self._group),
        }
        return [dist.new_group(ranks, **settings) for ranks in groups]

    def explain(self, error: Exception) -> None:
        self._hosts.explain(error)
        error.add_note("If another rank has left or was killed, its own output says why.")

    def allgather_object(self, item: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._explained():
            dist.all_gather_object(found, item, group=self._host)
        return found

    def _allreduce_sum(self, values: Values) -> Values:
        return self._reduce(values, dist.ReduceOp.SUM)

    def _allreduce_max(self, values: Values) -> Values:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Values, op: Any) -> Values:
        # Gloo and NCCL reduce each number on one rank, which sends the result to the others. So all
        # have the same bits. DDP relies on that for its gradients.
        reduced = self._sent(torch.from_numpy(values.copy()))
        if len(values):
            with self._explained():
                dist.all_reduce(reduced, op, group=self._host)
        return np.asarray(reduced.cpu())

    def _broadcast(self, values: Values) -> Values:
        sent = self._sent(torch.from_numpy(values.copy()))
        if len(values):
            with self._explained():
                dist.broadcast(sent, group_src=0, group=self._host)
        return np.asarray(sent.cpu())

    def _allgather(self, block: Tensor) -> Tensor:
        sent, group = self._sent_by(block)
        out = sent.new_empty(self.size * block.numel())
        if block.numel():
            with self._explained():
                dist.all_gather_into_tensor(out, sent, group=group)
        return out.to(block.device)

    def gather_later(self, block: Tensor) -> Gathering:
        sent, group = self._sent_by(checked_tensor(block))
        out = sent.new_empty(self.size * block.numel())
        work: Any = None
        if block.numel():
            with self._explained():
                work = dist.all_gather_into_tensor(out, sent, group=group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                with self._explained():
                    work.wait()
            return out.to(block.device).view(self.size, -1)

        return Gathering(finish)

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        sent, group = self._sent_by(tensor)
        if tensor.numel():
            with self._explained():
                dist.all_reduce(sent, group=group)
        return sent.to(tensor.device)

    def _send(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
        with self._explained():
            if data is not None:
                dist.send(self._sent(data), group_dst=to, group=self._host)
            if out is not None:
                received = torch.empty_like(out, device=self._device)
                dist.recv(received, group_src=source, group=self._host)
                out.copy_(received)

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        leaving = [len(part) for part in data]
        arriving = torch.empty(self.size, dtype=torch.int64, device=self._device)
        with self._explained():
            dist.all_to_all_single(arriving, torch.tensor(leaving).to(arriving), group=self._host)
            lengths: list[int] = arriving.tolist()
            out = torch.empty(sum(lengths), dtype=torch.uint8, device=self._device)
            sent = self._sent(torch.cat(data))
            dist.all_to_all_single(out, sent, lengths, leaving, group=self._host)
        return [*torch.split_with_sizes(out.cpu(), lengths)]

    def _sent(self, data: Tensor) -> Tensor:
        """Data of the host where small messages are sent from."""
        return data.to(self._device)

    def _sent_by(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """A tensor where it is sent from, and the group that sends it."""
        if tensor.device.type == "cpu":
            return self._sent(tensor), self._host
        return tensor, self._group

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's DistError is one
            failed = CommunicationError(f"torch.distributed: {error}. {ADVICE}")
            self.explain(failed)
            raise failed from error


def torch_communicator(process_group: Any) -> Communicator:
    """The communicator of a process group. Collective over its ranks.

    Args:
        process_group: a `torch.distributed.ProcessGroup` or a `DeviceMesh` of one dimension; None:
            the default group.

    Raises:
        ConfigError: it is something else, or leaves this rank out.
    """
    group = checked_group("process_group", process_group)
    if dist.get_world_size(group) == 1:
        return LocalCommunicator()
    return TorchCommunicator(group)


def checked_group(name: str, value: Any) -> Any:
    """The process group that an argument names, which must include this rank.

    Raises:
        ConfigError: the value is no process group, or leaves this rank out.
    """
    mesh = hasattr(value, "get_group") and hasattr(value, "ndim")
    if mesh and value.ndim != 1:
        raise ConfigError(
            f"Invalid {name}={value!r} of {value.ndim} dimensions. Must have one: take a part of "
            "it by its name, as in mesh['shard']."
        )
    group = dist.group.WORLD if value is None else value.get_group() if mesh else value
    if group is dist.GroupMember.NON_GROUP_MEMBER or not isinstance(group, dist.ProcessGroup):
        raise ConfigError(
            f"Invalid {name}={value!r}. Must be a process group of torch.distributed that includes "
            "this rank, or a DeviceMesh of one dimension."
        )
    return group


def _let_go() -> None:
    time.sleep(LET_GO)


def shard_group(comm: Communicator, wanted: Any) -> ShardGroup:
    """The ranks that share one history with this rank. Collective over `comm`.

    Args:
        comm: of the ranks that train together.
        wanted: `AndersonConfig.shard_group`, of the same kind on all ranks.

    Raises:
        ConfigError: on every rank, if the ranks cannot be split in this way.
    """
    if comm.size == 1 or (isinstance(wanted, str) and wanted == "world"):
        return ShardGroup(comm)
    me = dist.get_rank()
    if isinstance(wanted, str):  # "node"
        hosts = comm.allgather_object((platform.node(), me))
        mine = [rank for host, rank in hosts if host == platform.node()]
    else:
        mine = _members(wanted)
    found = comm.allgather_object((me, mine))
    everyone = sorted(rank for rank, _ in found)
    groups = sorted({tuple(ranks) for _, ranks in found})
    if any(rank not in ranks for rank, ranks in found) or everyone != sorted(sum(groups, ())):
        raise ConfigError(
            f"Invalid shard_group: groups of ranks {[list(ranks) for ranks in groups]}. Each of "
            f"the ranks that train together, {everyone}, must be in exactly one of them."
        )
    if len(sizes := sorted({len(ranks) for ranks in groups})) > 1:
        raise ConfigError(
            f"Invalid shard_group={wanted!r}: groups of {sizes} ranks. All groups must have the "
            "same size, so that they divide the history in the same way."
        )
    index = groups.index(tuple(mine))
    if len(groups) == 1:
        return ShardGroup(comm)
    if isinstance(wanted, str):
        assert isinstance(comm, TorchCommunicator)
        wanted = comm.parts([list(ranks) for ranks in groups])[index]
    return ShardGroup(torch_communicator(wanted), len(groups), index)


def _members(wanted: Any) -> list[int]:
    """The ranks of a group that a user gave, in the world; none where it leaves this rank out."""
    try:
        return sorted(dist.get_process_group_ranks(checked_group("shard_group", wanted)))
    except ConfigError:
        return []


def _timeout(group: Any) -> datetime.timedelta | None:
    """How long a group waits for a rank; None where torch does not tell: then as long as torch's.

    There is no public way to read it, and a new group would not have it.
    """
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):  # no such device
            found: datetime.timedelta = group._get_backend(torch.device(device)).options._timeout
            return found
    return None
