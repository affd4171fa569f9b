"""Kernels for a GPU, in Triton: one pass over memory where torch's own operations take several.

A product of a few tall vectors with the columns of R, the update, the running averages, the
checksum, and samples of the gradient: torch has matrix products for the first two, which reach a
fifth and a half of the memory's bandwidth at these shapes, and a kernel for each parameter or chunk
for the others, each of which costs the host more time than the GPU. Where there is no Triton, or
it cannot compile (it needs a C compiler), all of it is done with torch's operations.

Products are summed up in the dtype of the vectors, by each lane of each program, and these sums in
float64.
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

# At most, for products; the same on every GPU, so that sums do not depend on which one it is.
PROGRAMS = 1056
COLUMNS = 32  # of R that a program multiplies
ROWS = 1024
_ONE_THREAD = threading.RLock()  # Triton's interpreter, in tests without a GPU, is for one
WORDS = 2**14  # of a parameter, that one program sums up
TILE = 256  # rows, times columns that are multiplied with all
AT_ONCE = 7  # columns that are multiplied with all, beside a vector; more in several passes


@functools.cache
def usable(
    device: torch.device, work: torch.dtype = torch.float32, stored: torch.dtype = torch.float32
) -> bool:
    """Whether these kernels work on a device: tried out once, on a few numbers.

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
    except Exception as error:  # whatever the compiler, its cache or the driver has to say
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
    chosen = torch.empty_like(half)
    table, square = inner(columns, [1], v, every)
    slope = update(v, half, columns, half, every, out, start=w)
    found = [*table.flatten(), square, slope, *out]
    sums = x.clone()
    take_in(w, v, [sums], [0.5])
    found += [*sums.flatten(), *gains(v, w, [sums], every)]
    places = torch.tensor([[0, 0], [5, 2]], device="cpu")
    Places(places[0], places[1], device).read([x], chosen)
    prime = 2**36 - 5
    number = Checksum([6], device).of([x], prime)
    right = [*(32.0, 77.0, 14.0, 32.0, 14.0), *(-16.0, 3.0, 3.75, 4.5)]
    right += [*(2.5, 3.5, 4.5, 2.5, 3.5, 4.5), *(38.25, 6.0, 3.0)]
    words = x.cpu().view(torch.int64 if work == torch.float64 else torch.int32)
    bits = int(words.to(torch.int64).sum().remainder(prime))
    found = torch.stack([value.double() for value in [*found, *chosen]]).tolist()
    return bool(found == right and int(number) == bits)


def inner(
    columns: Tensor, places: Sequence[int], vector: Tensor, summed: slice
) -> tuple[Tensor, Tensor]:
    """[C_places, v] C^T and v . v over some rows, in one pass over C for up to `AT_ONCE` places.

    Args:
        columns: C [m, rows], as stored, contiguous.
        places: of columns that are multiplied with all.
        vector: v [rows], float32 or float64.
        summed: the rows that count.

    Returns:
        [len(places) + 1, m] and [], float64, on the device.
    """
    m = len(columns)
    rows = summed.stop - summed.start
    found: list[Tensor] = []
    squares = vector.new_zeros(1)
    for first in range(0, max(len(places), 1), AT_ONCE):
        some = tuple(places[first : first + AT_ONCE])
        together = _power_of_two(len(some) + 1)
        block = max(TILE // together, 32)
        programs = max(1, min(PROGRAMS, -(-rows // (4 * block))))
        parts = vector.new_empty((programs, len(some) + 1, m))
        squares = vector.new_empty(programs)
        with _on(vector):
            _inner[(programs, max(-(-m // COLUMNS), 1))](
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
    """u = M (f r - R c_R) - Y c_Y into `out`, or w + beta u, and u . r.

    Args:
        r: [rows], float32 or float64.
        in_y: c_Y [m], dtype of r.
        y: Y [m, rows] as stored, contiguous.
        factors: f and beta, [2], dtype of r.
        counted: the rows that count in u . r.
        out: [rows], none of the others.
        in_r: c_R [m]; None: zeros.
        columns: R [m, rows], where there is an `in_r`.
        weight: the diagonal of M, [rows]; None: ones.
        start: w [rows]; None: what is wanted is u.

    Returns:
        u . r, [], float64, on the device.
    """
    m, rows = y.shape
    programs = max(-(-rows // ROWS), 1)
    slopes = r.new_empty(programs)
    with _on(r):
        _update[(programs,)](
            *(r, y, r if columns is None else columns, y.stride(0)),
            *(r if weight is None else weight, r if start is None else start),
            *(in_y, in_y if in_r is None else in_r, factors, out, slopes),
            *(rows, m, counted.start, counted.stop),
            HAS_R=in_r is not None,
            MIXED=weight is not None,
            HAS_START=start is not None,
            BLOCK=ROWS,
        )
    return slopes.sum(dtype=torch.float64)


def gains(w: Tensor, r: Tensor, averages: Sequence[Tensor], counted: slice) -> Tensor:
    """(avg r + r) . (avg w - w) of running averages, in one pass over all.

    Args:
        w: [rows].
        r: [rows], of the dtype of w, as all averages.
        averages: means of w and r, [2, rows] each, contiguous.
        counted: the rows that count.

    Returns:
        [len(averages)] float64, on the device.
    """
    kinds = len(averages)
    rows, block = counted.stop - counted.start, 256
    programs = max(1, min(PROGRAMS, -(-rows // block)))
    parts = w.new_empty((programs, kinds))
    with _on(w):
        _gains[(programs,)](
            *(w, r, _addresses(averages, w.device), parts),
            *(w.numel(), counted.start, counted.stop, -(-rows // programs), kinds),
            KINDS=_power_of_two(kinds),
            BLOCK=block,
        )
    return parts.sum(dim=0, dtype=torch.float64)


def take_in(w: Tensor, r: Tensor, averages: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Takes w and r into running means, in place, in one pass over all.

    Args:
        w: [rows].
        r: [rows].
        averages: [2, rows] each, of w and r, contiguous.
        weights: of w and r in each mean.
    """
    block = 256
    with _on(w):
        _take_in[(max(-(-w.numel() // block), 1),)](
            *(w, r, _addresses(averages, w.device), _moved(weights, w), w.numel(), len(averages)),
            KINDS=_power_of_two(len(averages)),
            BLOCK=block,
        )


class Places:
    """Numbers at chosen places of some tensors, read by one kernel.

    Args:
        tensors: place among the tensors, of each number, int64 [k], on the host.
        offsets: place in the memory of the tensor, of each number, int64 [k], on the host.
        device: where the tensors are.
    """

    def __init__(self, tensors: Tensor, offsets: Tensor, device: torch.device) -> None:
        self._tensors, self._offsets = tensors.to(device), offsets.to(device)

    def read(self, tensors: Sequence[Tensor | None], out: Tensor) -> bool:
        """Reads into `out` [k]; None reads as zeros.

        Returns:
            False where these tensors cannot be read so: nothing has been done then.
        """
        present = [tensor for tensor in tensors if tensor is not None]
        if len({t.dtype for t in present}) > 1 or not all(_dense(t) for t in present):
            return False
        if any(t.device != self._offsets.device for t in [*present, out]):
            return False
        if not present:
            out.zero_()
            return True
        k = len(self._tensors)
        with _on(out):
            _gather[(max(-(-k // ROWS), 1),)](
                *(_addresses(tensors, out.device), self._tensors, self._offsets, out, k),
                present[0],  # for its dtype
                BLOCK=ROWS,
            )
        return True


class Checksum:
    """A number below 2^36 from the bits of tensors; any bit that differs changes it.

    By one kernel for each dtype among them. In the order of the memory: only for ranks whose
    tensors have the same strides.

    Args:
        sizes: numbers of elements.
        device: where the tensors are.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.device = tuple(sizes), device
        firsts = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, WORDS)]
        table = [(i, first, sizes[i]) for i, first in firsts]
        self._blocks = torch.tensor(table or [(0, 0, 0)], device=device).T.contiguous()
        # Odd factors, or blocks could change places unseen.
        self._factors = torch.arange(1, 2 * len(firsts), 2, device=device)

    def of(self, tensors: Sequence[Tensor], prime: int) -> Tensor:
        """int64 [], on the device; the same on ranks whose tensors lie in memory alike."""
        if not len(self._factors):
            return torch.zeros((), dtype=torch.int64, device=self._blocks.device)
        # One with gaps is copied.
        tensors = [t.detach() if _dense(t) else t.detach().contiguous() for t in tensors]
        dtypes, blocks = list(dict.fromkeys(t.dtype for t in tensors)), len(self._factors)
        sums = self._factors.new_empty((len(dtypes), blocks))
        for dtype, to in zip(dtypes, sums, strict=True):
            own = [t if t.dtype == dtype else None for t in tensors]
            with _on(sums):
                _sum_bits[(blocks,)](
                    *(_addresses(own, sums.device), self._blocks, to, blocks),
                    next(t for t in own if t is not None),  # for its dtype
                    WORD=tl.int64 if dtype == torch.float64 else tl.int32,
                    BLOCK=ROWS,
                    WORDS=WORDS,
                )
        return (sums * self._factors).sum().remainder(prime)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers fill a piece of memory, in an order that its shape tells."""
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
    """Triton starts kernels on the current device, whichever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _ONE_THREAD


if triton is not None:

    @triton.jit(do_not_specialize=["first", "end", "span", "m"])
    def _inner(  # type: ignore[no-untyped-def]
        columns, stride, vector, places, parts, squares, first, end, span, m,
        K: tl.constexpr, TOGETHER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        lo = first + program * span
        hi = tl.minimum(lo + span, end)
        j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        i = tl.arange(0, TOGETHER)
        own = columns + j.to(tl.int64)[:, None] * stride
        place = tl.load(places + i, mask=i < K, other=0).to(tl.int64)
        others = columns + place[:, None] * stride
        total = tl.zeros([TOGETHER, COLUMNS, BLOCK], vector.dtype.element_ty)
        square = tl.zeros([BLOCK], vector.dtype.element_ty)
        for at in range(lo, hi, BLOCK):
            row = at + tl.arange(0, BLOCK)
            inside = row < hi
            v = tl.load(vector + row, mask=inside, other=0.0)
            both = (j < m)[:, None] & inside[None, :]
            c = tl.load(own + row[None, :], mask=both, other=0.0).to(v.dtype)
            square += v * v
            if K > 0:
                both = (i < K)[:, None] & inside[None, :]
                o = tl.load(others + row[None, :], mask=both, other=0.0).to(v.dtype)
                o = tl.where((i == K)[:, None], v[None, :], o)
                total += o[:, None, :] * c[None, :, :]
            else:
                total += (v[None, :] * c)[None, :, :]
        to = parts + program * (K + 1) * m + i[:, None] * m + j[None, :]
        tl.store(to, tl.sum(total, axis=2), mask=(i <= K)[:, None] & (j < m)[None, :])
        if tl.program_id(1) == 0:
            tl.store(squares + program, tl.sum(square, axis=0))

    @triton.jit(do_not_specialize=["rows", "m", "first", "end"])
    def _update(  # type: ignore[no-untyped-def]
        r, y, columns, stride, weight, start, in_y, in_r, factors, out, slopes,
        rows, m, first, end,
        HAS_R: tl.constexpr, MIXED: tl.constexpr, HAS_START: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row = program * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        v = tl.load(r + row, mask=inside, other=0.0)
        u = v * tl.load(factors)
        if HAS_R:
            at = columns + row
            for j in range(m):
                c = tl.load(at, mask=inside, other=0.0).to(v.dtype)
                u -= c * tl.load(in_r + j)
                at += stride
        if MIXED:
            u *= tl.load(weight + row, mask=inside, other=0.0)
        at = y + row
        for j in range(m):
            c = tl.load(at, mask=inside, other=0.0).to(v.dtype)
            u -= c * tl.load(in_y + j)
            at += stride
        counts = (row >= first) & (row < end)
        tl.store(slopes + program, tl.sum(tl.where(counts, u * v, 0.0), axis=0))
        if HAS_START:
            u = tl.load(start + row, mask=inside, other=0.0) + u * tl.load(factors + 1)
        tl.store(out + row, u, mask=inside)

    @triton.jit(do_not_specialize=["rows", "first", "end", "span", "kinds"])
    def _gains(  # type: ignore[no-untyped-def]
        w, r, addresses, parts, rows, first, end, span, kinds,
        KINDS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        lo = first + program * span
        hi = tl.minimum(lo + span, end)
        kind = tl.arange(0, KINDS)
        known = kind < kinds
        address = tl.load(addresses + kind, mask=known, other=0)
        sums = address.to(tl.pointer_type(w.dtype.element_ty))[:, None]
        far = tl.cast(rows, tl.int64)
        total = tl.zeros([KINDS, BLOCK], w.dtype.element_ty)
        for at in range(lo, hi, BLOCK):
            row = at + tl.arange(0, BLOCK)
            inside = row < hi
            here = row[None, :]
            v = tl.load(w + row, mask=inside, other=0.0)[None, :]
            left = tl.load(r + row, mask=inside, other=0.0)[None, :]
            both = known[:, None] & inside[None, :]
            mean_w = tl.load(sums + here, mask=both, other=0.0)
            mean_r = tl.load(sums + far + here, mask=both, other=0.0)
            total += tl.where(both, (mean_r + left) * (mean_w - v), 0.0)
        tl.store(parts + program * kinds + kind, tl.sum(total, axis=1), mask=known)

    @triton.jit(do_not_specialize=["rows", "kinds"])
    def _take_in(  # type: ignore[no-untyped-def]
        w, r, addresses, weights, rows, kinds, KINDS: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        kind = tl.arange(0, KINDS)
        known = kind < kinds
        address = tl.load(addresses + kind, mask=known, other=0)
        sums = address.to(tl.pointer_type(w.dtype.element_ty))[:, None] + row[None, :]
        weight = tl.load(weights + kind, mask=known, other=0.0)[:, None]
        both = known[:, None] & inside[None, :]
        for which in tl.static_range(2):
            if which == 0:
                v = tl.load(w + row, mask=inside, other=0.0)[None, :]
            else:
                v = tl.load(r + row, mask=inside, other=0.0)[None, :]
                sums += rows
            before = tl.load(sums, mask=both, other=0.0)
            tl.store(sums, before + weight * (v - before), mask=both)

    @triton.jit(do_not_specialize=["k"])
    def _gather(  # type: ignore[no-untyped-def]
        addresses, tensors, offsets, out, k, like, BLOCK: tl.constexpr
    ):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < k
        tensor = tl.load(tensors + i, mask=inside, other=0)
        address = tl.load(addresses + tensor, mask=inside, other=0)
        at = address.to(tl.pointer_type(like.dtype.element_ty))
        at += tl.load(offsets + i, mask=inside, other=0)
        found = tl.load(at, mask=inside & (address != 0), other=0.0)
        tl.store(out + i, found.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["blocks"])
    def _sum_bits(  # type: ignore[no-untyped-def]
        addresses, table, sums, blocks, like,
        WORD: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        tensor = tl.load(table + program)
        first = tl.load(table + blocks + program)
        size = tl.load(table + 2 * blocks + program)
        address = tl.load(addresses + tensor)
        size = tl.where(address == 0, 0, size)  # of another dtype
        at = address.to(tl.pointer_type(like.dtype.element_ty))
        total = tl.zeros([BLOCK], tl.int64)
        for done in range(0, WORDS, BLOCK):
            row = first + done + tl.arange(0, BLOCK)
            number = tl.load(at + row, mask=row < size, other=0.0)
            if tl.int32 == WORD:
                number = number.to(tl.float32)
            total += number.to(WORD, bitcast=True).to(tl.int64)
        tl.store(sums + program, tl.sum(total, axis=0))
