"""The kernels in Triton's language. The functions of the package say what each computes.

Arguments in capitals are constants of the compiled kernel. Sizes and bounds are not specialized:
a kernel is compiled once for each combination of dtypes and constants.
"""

# Triton's decorators and the functions they decorate have no types.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first", "end", "span", "m"])
def inner(
    columns, stride, vector, indices, parts, squares, first, end, span, m,
    K: tl.constexpr, TOGETHER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a span of rows: [columns, v] times a block of columns, and v . v."""
    program = tl.program_id(0).to(tl.int64)
    lo = first + program * span
    hi = tl.minimum(lo + span, end)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, TOGETHER)
    own = columns + j.to(tl.int64)[:, None] * stride
    index = tl.load(indices + i, mask=i < K, other=0).to(tl.int64)
    others = columns + index[:, None] * stride
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
def update(
    r, y, columns, stride, weight, start, in_y, in_r, factors, out, slopes,
    rows, m, first, end,
    HAS_R: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows of the update, and its contribution to u . r."""
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
    if HAS_WEIGHT:
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


@triton.jit(do_not_specialize=["rows", "first", "end", "span", "count"])
def gains(
    w, r, addresses, parts, rows, first, end, span, count,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a span of rows, for all averages."""
    program = tl.program_id(0).to(tl.int64)
    lo = first + program * span
    hi = tl.minimum(lo + span, end)
    i = tl.arange(0, COUNT)  # COUNT: count, rounded up to a power of two
    known = i < count
    address = tl.load(addresses + i, mask=known, other=0)
    of_w = address.to(tl.pointer_type(w.dtype.element_ty))[:, None]
    of_r = of_w + tl.cast(rows, tl.int64)
    total = tl.zeros([COUNT, BLOCK], w.dtype.element_ty)
    for at in range(lo, hi, BLOCK):
        row = at + tl.arange(0, BLOCK)
        inside = row < hi
        here = row[None, :]
        new_w = tl.load(w + row, mask=inside, other=0.0)[None, :]
        new_r = tl.load(r + row, mask=inside, other=0.0)[None, :]
        both = known[:, None] & inside[None, :]
        mean_w = tl.load(of_w + here, mask=both, other=0.0)
        mean_r = tl.load(of_r + here, mask=both, other=0.0)
        total += tl.where(both, (mean_r + new_r) * (mean_w - new_w), 0.0)
    tl.store(parts + program * count + i, tl.sum(total, axis=1), mask=known)


@triton.jit(do_not_specialize=["rows", "count"])
def add_to_means(
    w, r, addresses, weights, rows, count, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of rows of all averages."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    i = tl.arange(0, COUNT)  # COUNT: count, rounded up to a power of two
    known = i < count
    address = tl.load(addresses + i, mask=known, other=0)
    means = address.to(tl.pointer_type(w.dtype.element_ty))[:, None] + row[None, :]
    weight = tl.load(weights + i, mask=known, other=0.0)[:, None]
    both = known[:, None] & inside[None, :]
    for which in tl.static_range(2):
        if which == 0:
            new = tl.load(w + row, mask=inside, other=0.0)[None, :]
        else:
            new = tl.load(r + row, mask=inside, other=0.0)[None, :]
            means += rows
        before = tl.load(means, mask=both, other=0.0)
        tl.store(means, before + weight * (new - before), mask=both)


@triton.jit(do_not_specialize=["blocks"])
def sum_bits(
    addresses, table, sums, blocks, like,
    WORD: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The sum of a block of numbers, read as integers."""
    program = tl.program_id(0)
    tensor = tl.load(table + program)
    first = tl.load(table + blocks + program)
    size = tl.load(table + 2 * blocks + program)
    address = tl.load(addresses + tensor)
    size = tl.where(address == 0, 0, size)  # this tensor has another dtype
    at = address.to(tl.pointer_type(like.dtype.element_ty))
    total = tl.zeros([BLOCK], tl.int64)
    for done in range(0, WORDS, BLOCK):
        row = first + done + tl.arange(0, BLOCK)
        number = tl.load(at + row, mask=row < size, other=0.0)
        if tl.int32 == WORD:
            number = number.to(tl.float32)
        total += number.to(WORD, bitcast=True).to(tl.int64)
    tl.store(sums + program, tl.sum(total, axis=0))
