"""Whether all ranks still hold the same weights: a checksum, and what its sums over ranks say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.core.solve import Vector

# Numbers at a time: little memory, and few kernels (n is tens of millions).
CHUNK = 2**17
CHUNK_GPU = 2**22
PAYLOAD = 4
PRIME = 2**36 - 5  # two halves of 18 bits, whose squares sum up exactly over 2^16 ranks
_HALF = 2**18

# Rows [lo, hi) of the flat vector into memory [hi - lo], as `FixedPoint.read`.
Read = Callable[[int, int, Tensor], Tensor]


def checksum(read: Read, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number below 2^36 from the bits of a flat vector: int64, [], on the device.

    Any single bit that differs changes it. One pass over the weights, no wait for the device.

    Args:
        read: of the vector.
        n: its length.
        dtype: to read it in: float32 or float64, no narrower than what is read.
        device: where it is.
    """
    if n == 0:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    size = min(CHUNK if device.type == "cpu" else CHUNK_GPU, n + n % 2)
    buffer = torch.zeros(size, dtype=dtype, device=device)
    sums = []
    for lo in range(0, n, size):
        hi = min(lo + size, n)
        read(lo, hi, buffer[: hi - lo])
        if (hi - lo) % 2:  # two float32 make one int64
            buffer[hi - lo] = 0.0
        sums.append(buffer[: hi - lo + (hi - lo) % 2].view(torch.int64).sum())
    # Odd factors, or chunks could change places unseen.
    factors = torch.arange(1, 2 * len(sums), 2, device=device)
    return (torch.stack(sums) * factors).sum().remainder(PRIME)


def payload(number: int) -> Vector:
    """[PAYLOAD] float64 to be summed over ranks with others."""
    halves = np.array(divmod(number, _HALF), dtype=np.float64)
    return np.concatenate([halves, halves**2])


def equal(sums: Vector, size: int) -> bool:
    """Whether all of `size` ranks had the same checksum, from the sums of their payload."""
    first, squares = np.split(sums, 2)
    return bool((squares * size == first**2).all())  # no variance; both sides round alike


def outliers(checksums: Sequence[int]) -> tuple[int, list[int]]:
    """Of all ranks' checksums: a rank that holds what most do, and those that do not.

    Where no checksum is the most frequent, that of the lowest rank counts.
    """
    counts = Counter(checksums)
    most = max(counts.values())
    root = next(rank for rank, found in enumerate(checksums) if counts[found] == most)
    return root, [rank for rank, found in enumerate(checksums) if found != checksums[root]]
