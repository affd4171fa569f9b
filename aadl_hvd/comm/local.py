"""A group of one rank, and ranks that have yet to meet."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from aadl_hvd.comm.base import Communicator, Values
from aadl_hvd.errors import UnsupportedError


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

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        return data

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        return tensor


class PendingCommunicator(Communicator):
    """Ranks of an elastic job before they have met: a new one must not wait for the others yet.

    Every operation raises `UnsupportedError`.
    """

    rank = 0
    size = 1

    def _refuse(self, *_: Any) -> NoReturn:
        raise UnsupportedError(
            "Invalid use of an optimizer in an elastic job, whose ranks have not met. Must be "
            "given to aadl_hvd.elastic.TorchState first, and used inside the function that "
            "hvd.elastic.run wraps."
        )

    allgather_object: Any = _refuse
    _allreduce_sum: Any = _refuse
    _allreduce_max: Any = _refuse
    _broadcast: Any = _refuse
    _allgather: Any = _refuse
    _alltoall: Any = _refuse
    _sum_tensor: Any = _refuse
