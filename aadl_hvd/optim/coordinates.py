"""Numbers of a few tensors that stand for those of all, drawn and read with few calls of torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A GPU starts something for each tensor whose numbers are read before it is reduced over ranks.
TENSORS = 8
# The most numbers that are read where there are more. A few of them are kept for some steps.
NUMBERS = 2**16
# A tensor is drawn in proportion to its size to this power. See docs/algorithm.md, Noise gate.
POWER = 0.5
_SEED = 20211014  # any number that is the same on every rank


@dataclasses.dataclass(frozen=True)
class Piece:
    """Numbers of one tensor, at equal distances in its memory.

    Attributes:
        index: of the tensor.
        start: offset of the first number.
        stride: distance between two.
        count: how many they are.
        weight: how many numbers of all tensors each of them stands for.
    """

    index: int
    start: int
    stride: int
    count: int
    weight: float

    def of(self, tensor: Tensor) -> Tensor:
        """These numbers of a tensor, [count]: a view, where the tensor fills a range of memory.

        To be called under `torch.no_grad`.
        """
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(
            memory_format=torch.channels_last
        )
        if not channels_last:
            tensor = tensor.contiguous()
        first = tensor.storage_offset() + self.start
        return tensor.as_strided((self.count,), (self.stride,), first)


def draw(sizes: Sequence[int], rank: int = 0, ranks: int = 1, seed: int = _SEED) -> list[Piece]:
    """Draws a rank's pieces: a sum over all numbers is the mean over draws of the weighted sum.

    Up to `TENSORS` tensors are all met, and if they have at most `NUMBERS` numbers in all, each
    number is. Of more tensors, places at equal distances are taken on a line on which each tensor
    is as long as its size to the power of `POWER`. The places of all ranks together are at equal
    distances, too: the more ranks, the more tensors are met.

    Args:
        sizes: number of elements of each tensor.
        rank: which of the draws.
        ranks: how many belong together.
        seed: the same on every rank.

    Returns:
        At most one piece of each tensor, at most `TENSORS` in all, in the order of the tensors.
    """
    lengths = np.array(sizes, dtype=np.float64) ** POWER
    count = np.count_nonzero(lengths)
    if count == 0:
        return []
    if count <= TENSORS:
        hits = (lengths > 0.0).astype(np.intp)
        expected = hits.astype(np.float64)
    else:
        ends = np.cumsum(lengths)
        distance = ends[-1] / TENSORS
        offset = (np.random.default_rng(seed).random() + rank / ranks) % 1.0
        places = (np.arange(TENSORS) + offset) * distance
        hits = np.bincount(np.searchsorted(ends, places, "right"), minlength=len(sizes))
        expected = lengths / distance
    most = NUMBERS // hits.sum()  # of a place
    starts = np.random.default_rng([seed, rank])
    pieces = []
    for index in map(int, np.flatnonzero(hits)):
        size = sizes[index]
        stride = 1 if sum(sizes) <= NUMBERS else _stride(size, int(most * hits[index]))
        start = int(starts.integers(stride))
        weight = stride * float(hits[index] / expected[index])
        pieces.append(Piece(index, start, stride, len(range(start, size, stride)), weight))
    return pieces


def _stride(size: int, most: int) -> int:
    """A distance at which at most `most` numbers are read.

    It has no factor in common with the size: else all might be of a few columns of a matrix.
    """
    stride = -(-size // most)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
