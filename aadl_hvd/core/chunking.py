"""Long vectors, a chunk of rows at a time.

On a processor a chunk of a float32 vector, 256 KB, stays in the second-level cache while the
columns pass by. A chunk of all columns, 5 MB, stays in the third-level cache where it is read more
than once. On a GPU few kernel launches matter more. In both cases the sums in float32 stay short.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Rows in a chunk.
CHUNK = 2**16
CHUNK_GPU = 2**21
# The most rows for which columns are converted to a wider dtype. The converted columns take 4 m
# bytes a row, beside a history whose purpose is to be small.
CHUNK_WIDE = 2**19


def chunk_rows(device: torch.device, widened: bool = False) -> int:
    """Rows in a chunk.

    Args:
        device: where the vectors are.
        widened: whether columns are converted to a wider dtype, a chunk at a time.
    """
    rows = CHUNK if device.type == "cpu" else CHUNK_GPU
    return min(rows, CHUNK_WIDE) if widened else rows


def chunks(
    vector: Tensor, part: slice = slice(None), widened: bool = False, vectors: int = 1
) -> Iterable[slice]:
    """The rows of a vector, a chunk at a time.

    Args:
        vector: [rows]; only its length and its device matter.
        part: only these rows.
        widened: see `chunk_rows`.
        vectors: how many are computed at a time: together they stay in the cache.
    """
    size = chunk_rows(vector.device, widened) // vectors
    first, end, _ = part.indices(vector.numel())
    if first < end <= first + size:  # steps with few rows ask often
        return [slice(first, end)]
    return [slice(lo, min(lo + size, end)) for lo in range(first, end, size)]


def part_of(vectors: Tensor, rows: slice) -> Tensor:
    """A chunk of vectors [..., rows]: a view of it, or the vectors themselves where it is all.

    With few rows calls of torch take the time, and a view is one.
    """
    whole = rows.start == 0 and rows.stop == vectors.shape[-1]
    return vectors if whole else vectors[..., rows]


def chunked_dot(a: Tensor, b: Tensor, part: slice = slice(None)) -> Tensor:
    """a . b over the rows `part` of two vectors [rows], as a float64 tensor [] on the device.

    The product of each chunk is computed in the dtype of the vectors, the sum of the chunks in
    float64. The result is nearly as accurate as one in float64, at the speed of float32.
    """
    found = [torch.dot(part_of(a, rows), part_of(b, rows)) for rows in chunks(a, part)]
    return total(found, a)


def total(numbers: list[Tensor], like: Tensor) -> Tensor:
    """Sum in float64 of tensors [], as a tensor [] on the device of `like`; 0 for none."""
    if not numbers:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    if len(numbers) == 1:
        return numbers[0].double()
    return torch.stack(numbers).sum(dtype=torch.float64)
