"""Ranks of a Horovod process set."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, Values
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.mpi import MpiCommunicator

_instances = itertools.count()


class HorovodCommunicator(Communicator):
    """Large tensors through Horovod, tiny reductions through `host` where there is one.

    Making one is collective over the process set.

    Args:
        process_set: a Horovod process set that includes this rank.
        host: a communicator of the same ranks in the same order for small vectors; None: they go
            through Horovod too, which costs about a millisecond of negotiation each.
    """

    def __init__(self, process_set: Any, host: Communicator | None = None) -> None:
        self._process_set = process_set
        self.rank = process_set.rank()
        self.size = process_set.size()
        self.host = host
        # A name that is new, and the same on every rank: those that were outside other process
        # sets, or joined later, have built fewer of these.
        built = torch.tensor([next(_instances)])
        newest = hvd.allreduce(built, op=hvd.Max, name="aadl_hvd.name", process_set=process_set)
        self._name = f"aadl_hvd.{int(newest)}"

    def allgather_object(self, item: Any) -> list[Any]:
        # hvd.allgather_object knows no process sets.
        data = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        name, process_set = f"{self._name}.object", self._process_set
        sizes = hvd.allgather(size, name=f"{name}.size", process_set=process_set)
        joined = hvd.allgather(data, name=name, process_set=process_set)
        return [pickle.loads(part.numpy().tobytes()) for part in joined.split(sizes.tolist())]

    def _allreduce_sum(self, values: Values) -> Values:
        if self.host is not None:
            return self.host.allreduce(values, "sum")
        return self._reduce(values, hvd.Sum, "sum")

    def _allreduce_max(self, values: Values) -> Values:
        if self.host is not None:
            return self.host.allreduce(values, "max")
        return self._reduce(values, hvd.Max, "max")

    def _reduce(self, values: Values, op: Any, name: str) -> Values:
        result = hvd.allreduce(
            torch.from_numpy(values),
            op=op,
            name=f"{self._name}.{name}.{values.size}",
            process_set=self._process_set,
        )
        return np.asarray(result)

    def _broadcast(self, values: Values) -> Values:
        if self.host is not None:
            return self.host.broadcast(values)
        result = hvd.broadcast(
            torch.from_numpy(values),
            root_rank=self._root,
            name=f"{self._name}.broadcast.{values.size}",
            process_set=self._process_set,
        )
        return np.asarray(result)

    def _allgather(self, block: Tensor) -> Tensor:
        return hvd.allgather(  # type: ignore[no-any-return]
            block, name=f"{self._name}.allgather.{block.numel()}", process_set=self._process_set
        )

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        return hvd.allreduce_(  # type: ignore[no-any-return]
            tensor,
            op=hvd.Sum,
            name=f"{self._name}.tensor.{tensor.numel()}",
            process_set=self._process_set,
        )

    @property
    def _root(self) -> int:
        ranks = self._process_set.ranks
        return int(ranks[0]) if ranks is not None else 0


def horovod_communicator(process_set: Any) -> Communicator:
    """The communicator of a process set. Collective over its ranks.

    A rank that is not in the set trains by itself, as with Horovod, and gets a group of one.
    """
    if not process_set.included() or process_set.size() == 1:
        return LocalCommunicator()
    through_horovod = HorovodCommunicator(process_set)
    return HorovodCommunicator(process_set, _mpi_communicator(process_set, through_horovod))


def _mpi_communicator(process_set: Any, agree: Communicator) -> MpiCommunicator | None:
    """mpi4py's view of the set, if every rank has it and it numbers the ranks as Horovod does."""
    if not (hvd.mpi_enabled() and hvd.mpi_threads_supported()):
        return None
    ranks = process_set.ranks
    ranks = list(range(hvd.size())) if ranks is None else list(ranks)
    ready = MpiCommunicator.world_rank() == hvd.rank()
    if not all(agree.allgather_object(ready)):
        return None
    return MpiCommunicator(ranks)
