"""Kernels for a GPU: one pass over memory where torch's own operations take several.

They compute products with the columns of R, the update, running averages, and the checksum of the
weights. torch's matrix products reach a fifth and a half of the memory bandwidth at the shapes of
the first two. For the others torch starts a kernel for each parameter or chunk, and each start
costs the host more time than the GPU needs for the work.

The kernels are written in Triton, see `source`. Where there is no Triton, or where it cannot
compile (it needs a C compiler), `usable` says so and the callers use torch's operations.

Each lane of each program adds up products in the dtype of the vectors. The sums of the lanes are
added up in float64.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform
    triton = None
else:
    from aadl_hvd.kernels import source

# The most programs for a sum. It is the same on every GPU, so that sums do not depend on the GPU.
PROGRAMS = 1056
COLUMNS = 32  # columns of R that a program multiplies
ROWS = 1024  # rows that a program works on, where it needs no more than one pass
TILE = 256  # of products: rows times columns that a program works on at a time
AT_ONCE = 7  # columns that are multiplied with all in one pass, beside a vector
WORDS = 2**14  # numbers of a parameter that a program of the checksum adds up
_ONE_THREAD = threading.RLock()  # Triton's interpreter, in tests without a GPU, is not thread-safe


@functools.cache
def usable(
    device: torch.device, work: torch.dtype = torch.float32, stored: torch.dtype = torch.float32
) -> bool:
    """Whether these kernels work on a device. They are tried out once, on a few numbers.

    A warning says why, if they do not work on a GPU.

    Args:
        device: any.
        work: dtype of vectors.
        stored: dtype of columns.
    """
    if triton is None or device.type != "cuda":
        return False
    try:
        if _tried(device, work, stored):
            return True
        raise ArithmeticError("wrong results")
    except Exception as error:  # of any kind: of the compiler, its cache or the driver
        warnings.warn(
            f"Triton does not work here ({type(error).__name__}: {str(error)[:200]}): acceleration "
            "goes on with torch's own operations, which take longer.",
            stacklevel=2,
        )
        return False


def _tried(device: torch.device, work: torch.dtype, stored: torch.dtype) -> bool:
    """Runs all kernels on a few numbers, and says whether the results are right."""
    x = torch.arange(1.0, 7.0, device=device, dtype=work).reshape(2, 3)
    (v, w), every, columns = x, slice(0, 3), x.to(stored)
    half, out = torch.full((2,), 0.5, device=device, dtype=work), torch.empty_like(v)
    table, square = inner(columns, [1], v, every)
    slope = update(v, half, columns, half, every, out, start=w)
    found = [*table.flatten(), square, slope, *out]
    means = x.clone()
    add_to_means(w, v, [means], [0.5])
    found += [*means.flatten(), *gains(v, w, [means], every)]
    prime = 2**36 - 5
    number = Checksum([6], device).of([x], prime)
    right = [*(32.0, 77.0, 14.0, 32.0, 14.0), *(-16.0, 3.0, 3.75, 4.5)]
    right += [2.5, 3.5, 4.5, 2.5, 3.5, 4.5, 38.25]
    words = x.cpu().view(torch.int64 if work == torch.float64 else torch.int32)
    bits = int(words.to(torch.int64).sum().remainder(prime))
    found = torch.stack([value.double() for value in found]).tolist()
    return bool(found == right and int(number) == bits)


def inner(
    columns: Tensor, indices: Sequence[int], vector: Tensor, summed: slice
) -> tuple[Tensor, Tensor]:
    """[C_indices, v] C^T and v . v over some rows, in one pass over C for each `AT_ONCE` indices.

    Args:
        columns: C [m, rows], of any floating-point dtype, contiguous.
        indices: of the columns that are multiplied with all columns.
        vector: v [rows], float32 or float64.
        summed: the rows that count.

    Returns:
        [len(indices) + 1, m] and [], float64, on the device.
    """
    m = len(columns)
    rows = summed.stop - summed.start
    found: list[Tensor] = []
    squares = vector.new_zeros(1)
    for first in range(0, max(len(indices), 1), AT_ONCE):
        some = tuple(indices[first : first + AT_ONCE])
        together = _power_of_two(len(some) + 1)
        block = max(TILE // together, 32)
        programs = max(1, min(PROGRAMS, -(-rows // (4 * block))))
        parts = vector.new_empty((programs, len(some) + 1, m))
        squares = vector.new_empty(programs)
        with _on(vector):
            source.inner[(programs, max(-(-m // COLUMNS), 1))](
                *(columns, columns.stride(0), vector, _constants(some or (0,), vector.device)),
                *(parts, squares, summed.start, summed.stop, -(-rows // programs), m),
                K=len(some),
                TOGETHER=together,
                COLUMNS=COLUMNS,
                BLOCK=block,
            )
        total = parts.sum(dim=0, dtype=torch.float64)
        found.append(total[:-1])
    return torch.cat([*found, total[-1:]]), squares.sum(dtype=torch.float64)


def update(
    r: Tensor,
    in_y: Tensor,
    y: Tensor,
    factors: Tensor,
    counted: slice,
    out: Tensor,
    *,
    in_r: Tensor | None = None,
    columns: Tensor | None = None,
    weight: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Writes u = M (f r - R c_R) - Y c_Y, or w + beta u, into `out`, and returns u . r.

    Args:
        r: [rows], float32 or float64.
        in_y: c_Y [m], of the dtype of r.
        y: Y [m, rows], of any floating-point dtype, contiguous.
        factors: f and beta, [2], of the dtype of r.
        counted: the rows that count in u . r.
        out: [rows], of the dtype of r; it overlaps none of the other tensors.
        in_r: c_R [m], of the dtype of r; None: zeros.
        columns: R [m, rows], as Y; needed where `in_r` is given.
        weight: the diagonal of M, [rows], of the dtype of r; None: ones.
        start: w [rows], of the dtype of r, for w + beta u; None: for u.

    Returns:
        u . r, [], float64, on the device.
    """
    m, rows = y.shape
    programs = max(-(-rows // ROWS), 1)
    slopes = r.new_empty(programs)
    with _on(r):
        source.update[(programs,)](
            *(r, y, r if columns is None else columns, y.stride(0)),
            *(r if weight is None else weight, r if start is None else start),
            *(in_y, in_y if in_r is None else in_r, factors, out, slopes),
            *(rows, m, counted.start, counted.stop),
            HAS_R=in_r is not None,
            HAS_WEIGHT=weight is not None,
            HAS_START=start is not None,
            BLOCK=ROWS,
        )
    return slopes.sum(dtype=torch.float64)


def gains(w: Tensor, r: Tensor, averages: Sequence[Tensor], counted: slice) -> Tensor:
    """(avg r + r) . (avg w - w) for each of some running averages, in one pass over all.

    Args:
        w: [rows], float32 or float64.
        r: [rows], of the dtype of w.
        averages: the mean of w and that of r, [2, rows] each, of the dtype of w, contiguous.
        counted: the rows that count.

    Returns:
        [len(averages)] float64, on the device.
    """
    count, block = len(averages), 256
    rows = counted.stop - counted.start
    programs = max(1, min(PROGRAMS, -(-rows // block)))
    parts = w.new_empty((programs, count))
    with _on(w):
        source.gains[(programs,)](
            *(w, r, _addresses(averages, w.device), parts),
            *(w.numel(), counted.start, counted.stop, -(-rows // programs), count),
            COUNT=_power_of_two(count),
            BLOCK=block,
        )
    return parts.sum(dim=0, dtype=torch.float64)


def add_to_means(
    w: Tensor, r: Tensor, averages: Sequence[Tensor], weights: Sequence[float]
) -> None:
    """Adds w and r to running means in place, in one pass over all: mean += weight (new - mean).

    Args:
        w: [rows], float32 or float64.
        r: [rows], of the dtype of w.
        averages: the mean of w and that of r, [2, rows] each, of the dtype of w, contiguous.
        weights: weight of w and r in each pair of means.
    """
    block, count = 256, len(averages)
    with _on(w):
        source.add_to_means[(max(-(-w.numel() // block), 1),)](
            *(w, r, _addresses(averages, w.device), _moved(weights, w), w.numel(), count),
            COUNT=_power_of_two(count),
            BLOCK=block,
        )


class Checksum:
    """A number below 2^36 from the bits of tensors. Any bit that differs changes it.

    One kernel for each dtype reads the tensors in the order of their memory. So the numbers of
    two ranks can be compared only if their tensors have the same strides.

    Args:
        sizes: number of elements of each tensor.
        device: where the tensors are.

    Attributes:
        sizes, device: see the arguments.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.device = tuple(sizes), device
        firsts = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, WORDS)]
        table = [(i, first, sizes[i]) for i, first in firsts]
        self._blocks = torch.tensor(table or [(0, 0, 0)], device=device).T.contiguous()
        # The factors are odd and differ, so that exchanged blocks change the sum.
        self._factors = torch.arange(1, 2 * len(firsts), 2, device=device)

    def of(self, tensors: Sequence[Tensor], prime: int) -> Tensor:
        """The checksum, int64 [], on the device.

        Args:
            tensors: of the sizes that were announced, on the device.
            prime: the checksum is the remainder of a division by it.
        """
        if not len(self._factors):
            return torch.zeros((), dtype=torch.int64, device=self._blocks.device)
        # A tensor with gaps is copied.
        tensors = [t.detach() if _dense(t) else t.detach().contiguous() for t in tensors]
        dtypes, blocks = list(dict.fromkeys(t.dtype for t in tensors)), len(self._factors)
        sums = self._factors.new_empty((len(dtypes), blocks))
        for dtype, to in zip(dtypes, sums, strict=True):
            own = [t if t.dtype == dtype else None for t in tensors]
            with _on(sums):
                source.sum_bits[(blocks,)](
                    *(_addresses(own, sums.device), self._blocks, to, blocks),
                    next(t for t in own if t is not None),  # for its dtype
                    WORD=tl.int64 if dtype == torch.float64 else tl.int32,
                    BLOCK=ROWS,
                    WORDS=WORDS,
                )
        return (sums * self._factors).sum().remainder(prime)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor fills a range of memory, in an order that follows from its shape."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _power_of_two(k: int) -> int:
    return 1 << max(k - 1, 0).bit_length()


def _addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    numbers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return torch.tensor(numbers, device="cpu").to(device, non_blocking=True)


def _moved(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)


@functools.lru_cache(maxsize=4096)
def _constants(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device="cpu").to(device)


def _on(tensor: Tensor) -> Any:
    """A context in which Triton starts kernels on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _ONE_THREAD
