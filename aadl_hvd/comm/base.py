"""The seam between the algorithm and the machine: what a group of ranks can do together.

Every operation is collective: all ranks of the group call it, in the same order, with arguments
of the same length and dtype. The base class checks and normalises; a backend implements only the
bare operations. Conformance is tested for all backends by one suite.
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

REDUCTIONS = ("sum", "max")
_MESSAGE = 2**28  # bytes; MPI and Horovod count in 32 bits
TENSOR_DTYPES = (torch.float32, torch.float64)

# At the end of errors about ranks that do different things.
ADVICE = (
    "All ranks must call step(), averaged_weights() and whatever else of the optimizer is "
    "collective equally often and in the same order: look for a call that only some ranks make, "
    "as in `if hvd.rank() == 0` or after `continue`."
)


class Communicator(ABC):
    """A group of `size` ranks, this one being `rank`.

    Small float64 vectors on the host are used to decide, large tensors on the device to update.
    """

    rank: int
    size: int

    def allreduce(self, values: Values, op: str = "sum") -> Values:
        """Reduces a small vector over all ranks; the result has the same bits on every rank.

        Args:
            values: [k] float64, k the same on every rank.
            op: "sum" or "max". NaN on any rank gives NaN on every rank, for both.
        """
        if op not in REDUCTIONS:
            raise CommunicationError(f"Invalid op={op!r}. Must be one of {REDUCTIONS}.")
        values = _checked_values(values)
        if op == "sum":
            return self._allreduce_sum(values)
        # A maximum may drop a NaN on its way; it travels as a flag of its own.
        flagged = np.append(np.where(np.isnan(values), -np.inf, values), np.isnan(values).any())
        result = self._allreduce_max(flagged.astype(np.float64))
        return np.full_like(values, np.nan) if result[-1] else result[:-1]

    def broadcast(self, values: Values) -> Values:
        """The vector [k] float64 of rank 0, on every rank."""
        return self._broadcast(_checked_values(values))

    def allgather(self, block: Tensor) -> Tensor:
        """Blocks of all ranks, one after the other by rank.

        Args:
            block: [k] float32 or float64, k the same on every rank.

        Returns:
            [size * k]; may share memory with `block` where size is 1.
        """
        return self._allgather(checked_tensor(block))

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        """As `allgather`, for a result that is used as it comes: in pieces, where that is faster.

        Args:
            block: [k] float32 or float64, k the same on every rank.

        Yields:
            Number of the first row of a piece, and the piece's rows of all blocks, [size, rows],
            by rank. Good until the next one. To be closed where it is not used up.
        """
        if block.numel():
            yield 0, self.allgather(block).view(self.size, -1)

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum over ranks of a large tensor [k] float32 or float64; may overwrite it."""
        return self._sum_tensor(checked_tensor(tensor))

    def send(self, data: Tensor | None, source: int, to: int) -> Tensor | None:
        """Hands bytes of one rank to another; no third one sees them.

        Args:
            data: [k] uint8 on the host, on rank `source`; None on the others.
            source: the rank that has them.
            to: the rank that is to have them.

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
        """Hands bytes from every rank to any others, all at once.

        Args:
            outgoing: by destination, [k] uint8 on the host; may differ between ranks, or be empty.
            most: bytes that go to one rank at a time.

        Returns:
            What came, by source. What has no bytes does not arrive.
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
        """May wait for something collective that other ranks, in error, do not enter.

        Called once by every rank whenever they wait for each other outside of this communicator:
        for gradients. Where a rank can know that another one waits for it meanwhile, here or for
        gradients of a later step, so that neither would ever go on, it raises.

        Args:
            done: whether there is no more to wait for.
        """

    def explain(self, error: Exception) -> None:  # noqa: B027
        """Adds to an error of the transport what is known of ranks that have left, as notes."""

    @abstractmethod
    def allgather_object(self, item: Any) -> list[Any]:
        """A picklable object of every rank, by rank. Slow: for set-up and checkpoints only."""

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
        raise NotImplementedError  # a rank alone delivers to itself

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        """Bytes by destination to bytes by source."""
        raise NotImplementedError

    @abstractmethod
    def _sum_tensor(self, tensor: Tensor) -> Tensor: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # a connection to other ranks cannot be copied, only shared


@dataclasses.dataclass(frozen=True)
class ShardGroup:
    """Of the ranks that train together, those that share one history with this one.

    Ranks that train together are split into groups of the same size; each holds a whole history.

    Args:
        comm: the group.
        count: number of groups.
        index: this group's, 0 <= index < count.
    """

    comm: Communicator
    count: int = 1
    index: int = 0


def _checked_values(values: Values) -> Values:
    array = np.asarray(values)
    if array.dtype != np.float64 or array.ndim != 1:
        raise CommunicationError(
            f"Invalid values of dtype {array.dtype} and shape {array.shape}. "
            "Must be a float64 vector."
        )
    return np.ascontiguousarray(array)


def checked_tensor(tensor: Tensor) -> Tensor:
    """The tensor in one piece of memory; an error where it is none that can be sent."""
    if tensor.dtype not in TENSOR_DTYPES or tensor.dim() != 1:
        raise CommunicationError(
            f"Invalid tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)}. "
            "Must be a float32 or float64 vector (no collective of Horovod takes bfloat16)."
        )
    return tensor.detach().contiguous()
