"""The interface between the algorithm and the transport: operations of a group of ranks.

Every operation is collective. All ranks of the group call it, in the same order, with arguments of
the same length and dtype. The public methods of the base class check and normalise the arguments.
A subclass implements the protected methods, which may rely on that. A subclass that passes an
operation on to another communicator calls that one's public method. One test suite
(tests/conformance.py) checks all implementations.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aadl_hvd.errors import CommunicationError

Values = NDArray[np.float64]
_FLOAT64 = np.dtype(np.float64)  # it compares in half the time of np.float64

REDUCTIONS = ("sum", "max")
_MESSAGE = 2**28  # bytes in a message at most: MPI and Horovod count in 32 bits
TENSOR_DTYPES = (torch.float32, torch.float64)

# At the end of errors about ranks that do different things.
ADVICE = (
    "All ranks must call step(), averaged_weights() and the other collective methods of the "
    "optimizer equally often and in the same order. Look for a call that only some ranks make, as "
    "in `if rank == 0` or after `continue`."
)


class Communicator(ABC):
    """A group of ranks.

    Small float64 vectors on the host serve decisions. Large tensors on the device serve updates.

    Attributes:
        rank: this process in the group, 0 <= rank < size.
        size: number of ranks.
    """

    rank: int
    size: int

    def allreduce(self, values: Values, op: str = "sum") -> Values:
        """Reduces a small vector over all ranks. The result has the same bits on every rank.

        Args:
            values: [k] float64, k the same on every rank.
            op: "sum" or "max". NaN on any rank gives NaN on every rank, for both.

        Returns:
            [k] float64.

        Raises:
            CommunicationError: an argument is not allowed; or ranks are in different operations or
                have left, where the transport notices that.
        """
        if op not in REDUCTIONS:
            raise CommunicationError(f"Invalid op={op!r}. Must be one of {REDUCTIONS}.")
        values = _checked_values(values)
        if op == "sum":
            return self._allreduce_sum(values)
        # A transport's maximum may lose a NaN, so a flag says whether there is one.
        flagged = np.append(np.where(np.isnan(values), -np.inf, values), np.isnan(values).any())
        result = self._allreduce_max(flagged.astype(np.float64))
        return np.full_like(values, np.nan) if result[-1] else result[:-1]

    def broadcast(self, values: Values) -> Values:
        """The vector [k] float64 of rank 0, on every rank."""
        return self._broadcast(_checked_values(values))

    def allgather(self, block: Tensor) -> Tensor:
        """Concatenates the blocks of all ranks, in the order of ranks.

        Args:
            block: [k] float32 or float64, k the same on every rank.

        Returns:
            [size * k], of the same dtype. May share memory with `block` if `size` is 1.
        """
        return self._allgather(checked_tensor(block))

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        """As `allgather`, but the result comes in pieces, if that is faster.

        Args:
            block: [k] float32 or float64, k the same on every rank.

        Yields:
            Number of a piece's first row, and these rows of all blocks, [size, rows], by rank. The
            memory is valid until the next piece. Close the generator if you do not exhaust it.
        """
        if block.numel():
            yield 0, self.allgather(block).view(self.size, -1)

    def gather_later(self, block: Tensor) -> Gathering:
        """As `allgather`, but other work and other collectives may go on meanwhile.

        All ranks start it at the same place among the collectives. To wait for it is not
        collective. A transport that cannot gather in the background gathers at once.

        Args:
            block: [k] float32 or float64, k the same on every rank. It must not change before the
                wait is over.
        """
        block = checked_tensor(block)
        whole = block.new_empty(self.size, block.numel())
        for first, rows in self.gather_by_pieces(block):
            whole[:, first : first + rows.shape[1]] = rows
        return Gathering(lambda: whole)

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a large tensor [k] float32 or float64, which may be overwritten."""
        return self._sum_tensor(checked_tensor(tensor))

    def send(self, data: Tensor | None, source: int, to: int) -> Tensor | None:
        """Sends bytes from one rank to another. Collective, but no third rank receives them.

        Args:
            data: [k] uint8 on the host, on rank `source`; None on the others.
            source: the rank that sends.
            to: the rank that receives.

        Returns:
            The bytes on rank `to`, None on the others.
        """
        given = data is not None and data.dtype == torch.uint8 and data.dim() == 1
        if given != (self.rank == source):
            raise CommunicationError(
                f"Invalid data on rank {self.rank}. Must be a uint8 vector on rank {source} and "
                "None on all others."
            )
        if source == to:
            return data
        own_length = np.array([0.0 if data is None else float(len(data))])
        length = int(self.allreduce(own_length, "max")[0])
        result = torch.empty(length, dtype=torch.uint8, device="cpu") if self.rank == to else None
        for lo in range(0, length, _MESSAGE):
            hi = min(lo + _MESSAGE, length)
            own, out = (None if x is None else x[lo:hi].contiguous() for x in (data, result))
            self._send(own, out, hi - lo, source, to)
        return result

    def all_to_all(self, outgoing: Mapping[int, Tensor], most: int = _MESSAGE) -> dict[int, Tensor]:
        """Sends bytes from every rank to any others.

        Args:
            outgoing: by destination, [k] uint8 on the host. Any k, and any destinations; both may
                differ between ranks.
            most: bytes in one message at most. The same on every rank.

        Returns:
            By source, [k] uint8. Sources that sent no bytes to this rank are left out.
        """
        longest = max((len(data) for data in outgoing.values()), default=0)
        longest = int(self.allreduce(np.array([float(longest)]), "max")[0])
        arrived: dict[int, list[Tensor]] = {}
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        for lo in range(0, longest, most):
            data = [outgoing.get(rank, nothing)[lo : lo + most] for rank in range(self.size)]
            for source, part in enumerate(self._alltoall(data)):
                if len(part):
                    arrived.setdefault(source, []).append(part)
        return {source: torch.cat(parts) for source, parts in arrived.items()}

    def poll_until(self, done: Callable[[], bool]) -> None:  # noqa: B027
        """Waits for a collective outside of this communicator: the reduction of gradients.

        Every rank calls this once for each such wait. A subclass may return at once: then the
        caller waits by other means.

        Args:
            done: whether the wait is over.

        Raises:
            CommunicationError: another rank waits for this one meanwhile, in this communicator or
                for gradients of a later step. Neither could ever go on. Not all transports notice.
        """

    def explain(self, error: Exception) -> None:  # noqa: B027
        """Adds notes to an error of the transport: what is known of ranks that have left."""

    @abstractmethod
    def allgather_object(self, item: Any) -> list[Any]:
        """A picklable object of every rank, by rank. Slow: for set-up and checkpoints only."""

    # The operations without the checks. Only the methods above call them.

    @abstractmethod
    def _allreduce_sum(self, values: Values) -> Values: ...

    @abstractmethod
    def _allreduce_max(self, values: Values) -> Values: ...

    @abstractmethod
    def _broadcast(self, values: Values) -> Values: ...

    @abstractmethod
    def _allgather(self, block: Tensor) -> Tensor: ...

    def _send(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
        """Sends `length` bytes from `data` on rank `source` to `out` on rank `to`, two ranks."""
        raise NotImplementedError  # a group of one rank never calls it

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        """Bytes by destination, for every rank, to bytes by source."""
        raise NotImplementedError

    @abstractmethod
    def _sum_tensor(self, tensor: Tensor) -> Tensor: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # a connection to other ranks cannot be copied, only shared


class Gathering:
    """Blocks of all ranks that are on their way to this rank.

    Args:
        finish: waits for them and returns them, [size, k]; it is called once at most.
    """

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish
        self._blocks: Tensor | None = None

    def wait(self) -> Tensor:
        """The blocks [size, k], by rank, when they are here. They may be asked for again.

        Raises:
            CommunicationError: ranks are in different operations or have left, where the transport
                notices that.
        """
        if self._blocks is None:
            self._blocks = self._finish()
        return self._blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> Gathering:
        return self  # a message cannot be copied, only shared


@dataclasses.dataclass(frozen=True)
class ShardGroup:
    """The ranks that share one history with this rank.

    The ranks that train together are split into groups of the same size. Each group holds a whole
    history.

    Args:
        comm: this rank's group.
        count: number of groups.
        index: number of this group, 0 <= index < count.
    """

    comm: Communicator
    count: int = 1
    index: int = 0


def _checked_values(values: Values) -> Values:
    array = np.asarray(values)
    if array.dtype != _FLOAT64 or array.ndim != 1:
        raise CommunicationError(
            f"Invalid values of dtype {array.dtype} and shape {array.shape}. "
            "Must be a float64 vector."
        )
    return np.ascontiguousarray(array)


def checked_tensor(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and detached.

    Raises:
        CommunicationError: it is not a float32 or float64 vector.
    """
    if tensor.dtype not in TENSOR_DTYPES or tensor.dim() != 1:
        raise CommunicationError(
            f"Invalid tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)}. "
            "Must be a float32 or float64 vector: Horovod's collectives do not take bfloat16."
        )
    return tensor.detach().contiguous()
