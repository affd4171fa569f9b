"""A group of one rank, and a stand-in for ranks that do not know each other yet."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from aadl_hvd.comm.base import Communicator, Values
from aadl_hvd.errors import UnsupportedError


class LocalCommunicator(Communicator):
    """A group of one rank: every operation returns its argument."""

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

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        return data

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        return tensor


class PendingCommunicator(Communicator):
    """Stands for the ranks of an elastic job before their first `sync()`.

    A new rank must not wait for the others before that, so every operation raises
    `UnsupportedError`.
    """

    rank = 0
    size = 1

    def _refuse(self, *_: Any) -> NoReturn:
        raise UnsupportedError(
            "Invalid use of an optimizer in an elastic job before the ranks have met. Give the "
            "optimizer to aadl_hvd.elastic.TorchState first, and use it only inside the function "
            "that hvd.elastic.run wraps."
        )

    allgather_object: Any = _refuse
    _allreduce_sum: Any = _refuse
    _allreduce_max: Any = _refuse
    _broadcast: Any = _refuse
    _allgather: Any = _refuse
    _alltoall: Any = _refuse
    _sum_tensor: Any = _refuse
