"""The one small allreduce of an acceleration step, and the protocol of what travels in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.solve import Vector
from aadl_hvd.stats import Stats

COMPARED = 4  # numbers that say whether all ranks have the same one
_HALF = 2**18


class Payload(Protocol):
    """What one module sends in the reduction.

    A payload has the same length on every rank, whatever the rank knows: a rank that knows nothing
    sends zeros, and says so by a number of its own.

    Attributes:
        part: the part of a step that the time of `pending` is counted under, see `Stats.seconds`.
    """

    part: str

    def pending(self) -> Sequence[Tensor]:
        """Tensors whose numbers `pack` needs. They are still on the device."""

    def pack(self, numbers: list[Vector]) -> Vector:
        """The payload of this rank, of the numbers of the tensors that `pending` returned."""

    def unpack(self, sums: Vector, size: int) -> None:
        """Takes in the sums of the payloads over `size` ranks."""


def reduce_payloads(
    payloads: Sequence[Payload],
    collectives: Collectives,
    stats: Stats,
    send: Callable[[Vector], Vector] | None = None,
) -> None:
    """Sums all payloads over the ranks in one message. Collective.

    The numbers of all payloads are read in one synchronization with the device.

    Args:
        payloads: in the order in which they lie in the message.
        collectives: of the ranks that train together.
        stats: timers.
        send: which of the collectives; None: `reduction`.
    """
    pending = []
    for payload in payloads:
        with stats.timed(payload.part):
            pending.append(list(payload.pending()))
    numbers = iter(numbers_of([tensor for own in pending for tensor in own]))
    packed = [
        payload.pack([next(numbers) for _ in own])
        for payload, own in zip(payloads, pending, strict=True)
    ]
    sums = (send or collectives.reduction)(np.concatenate(packed))
    for payload, own in zip(payloads, _cut(sums, map(len, packed)), strict=True):
        payload.unpack(own, collectives.size)


def numbers_of(tensors: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """The numbers of each tensor, a float64 vector on the host; one synchronization a device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    found: dict[int, NDArray[np.float64]] = {}
    for own in by_device.values():
        vectors = [tensors[i].detach().reshape(-1).double() for i in own]
        joined = torch.cat(vectors) if len(vectors) > 1 else vectors[0]
        sizes = [tensors[i].numel() for i in own]
        host = joined.cpu()
        if host is joined and len(vectors) == 1:  # a copy here too: its memory may be used again
            host = host.clone()
        found |= zip(own, _cut(host.numpy(), sizes), strict=True)
    return [found[i] for i in range(len(tensors))]


def _cut(vector: Vector, lengths: Iterable[int]) -> Iterator[Vector]:
    """Pieces of a vector, one after the other. `numpy.split` takes ten times as long."""
    end = 0
    for length in lengths:
        start, end = end, end + length
        yield vector[start:end]


def compared(number: int) -> Vector:
    """[COMPARED] float64 to be summed over ranks, of a number below 2^36; see `equal`."""
    halves = np.array(divmod(number, _HALF), dtype=np.float64)
    return np.concatenate([halves, halves**2])


def equal(sums: Vector, size: int) -> bool:
    """Whether all of `size` ranks had the same numbers, from sums of numbers and their squares."""
    first, squares = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    return bool((squares * size == first**2).all())  # no variance; both sides round alike
