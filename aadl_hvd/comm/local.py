"""A group of one rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aadl_hvd.comm.base import Communicator, Values


class LocalCommunicator(Communicator):
    """P = 1: every operation returns its argument."""

    rank = 0
    size = 1

    def allgather_object(self, item: Any) -> list[Any]:
        return [item]

    def _allreduce_sum(self, values: Values) -> Values:
        return values

    def _allreduce_max(self, values: Values) -> Values:
        return values

    def _broadcast(self, values: Values) -> Values:
        return values

    def _allgather(self, block: Tensor) -> Tensor:
        return block

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        return tensor
