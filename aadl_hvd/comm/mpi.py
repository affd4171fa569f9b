"""Ranks of an MPI communicator, through mpi4py, on host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, Values


class MpiCommunicator(Communicator):
    """All of the seam's operations on an mpi4py intra-communicator.

    With Horovod on MPI it carries the tiny reductions: about a microsecond in place of the
    millisecond that Horovod's negotiation takes.

    Args:
        ranks: processes of MPI's world, in the order of this communicator's ranks. Collective
            over these and nobody else. `world_rank` must not be None on any of them.
    """

    def __init__(self, ranks: list[int]) -> None:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        # A communicator of its own: its messages cannot meet those of the user or of Horovod.
        self._comm = world.Create_group(world.Get_group().Incl(ranks))
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    @staticmethod
    def world_rank() -> int | None:
        """This process in MPI's world; None where MPI cannot be used from here.

        That is: mpi4py is not installed, MPI is not running (mpi4py is kept from starting it: that
        is Horovod's part), or it does not allow calls from several threads.
        """
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError):
            return None
        if not MPI.Is_initialized() or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return None
        return int(MPI.COMM_WORLD.Get_rank())

    def allgather_object(self, item: Any) -> list[Any]:
        return list(self._comm.allgather(item))

    def _allreduce_sum(self, values: Values) -> Values:
        # MPI only recommends that Allreduce gives all ranks the same bits; this ensures it.
        from mpi4py import MPI

        return self._reduce(values, MPI.SUM)

    def _allreduce_max(self, values: Values) -> Values:
        from mpi4py import MPI

        return self._reduce(values, MPI.MAX)

    def _reduce(self, values: Values, op: Any) -> Values:
        result = np.empty_like(values)
        self._comm.Reduce(values, result, op=op, root=0)
        self._comm.Bcast(result, root=0)
        return result

    def _broadcast(self, values: Values) -> Values:
        result = values.copy()
        self._comm.Bcast(result, root=0)
        return result

    def _allgather(self, block: Tensor) -> Tensor:
        host = block.cpu()
        result = torch.empty(self.size * host.numel(), dtype=host.dtype)
        self._comm.Allgather(host.numpy(), result.numpy())
        return result.to(block.device)

    def _deliver(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
        if data is not None:
            self._comm.Send(data.numpy(), dest=to)
        if out is not None:
            self._comm.Recv(out.numpy(), source=source)

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        from mpi4py import MPI

        host = tensor.cpu().numpy()
        result = np.empty_like(host)
        self._comm.Reduce(host, result, op=MPI.SUM, root=0)
        self._comm.Bcast(result, root=0)
        return torch.from_numpy(result).to(tensor.device)
