"""Means of iterates and gradients over blocks of steps, and their differences: this rank's rows.

The mean of a quadratic's gradients is its gradient at the mean of the iterates, whatever the noise,
and the variance of the noise falls with the length of the block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from aadl_hvd.checkpoint.subspace_state import BlocksState, OwnBlockState
from aadl_hvd.core import captures
from aadl_hvd.core.chunking import chunked_dot, chunks, part_of, total
from aadl_hvd.core.sharding import Sharding

DEPTH = 10  # m, differences that are kept
NOISES = 3  # blocks whose noise is kept
# A number, rows of a diagonal, or a number and its reciprocal on the device.
_Diagonal = float | Tensor | tuple[Tensor, Tensor]
VECTORS = 8 + NOISES  # the next w and r, four of the block that runs, two means, the noises


class Blocks:
    """The block that runs, and the differences of those before.

    Memory on this rank, in numbers: 2 DEPTH rows of `dtype` for the differences, and 11 rows of
    `work` for the sums of the block that runs, the last block's means, the noise of 3 blocks, and
    the next w and r. It is allocated when it is first needed.

    Args:
        sharding: which rows are this rank's; the row layout.
        dtype: of stored differences.
        work: of sums and means, float32 or float64.
        device: of the weights.
        captured: runs device work; None: one operation at a time.

    Attributes:
        stored: blocks stored since the last reset.
        steps: steps noted in the block that runs.
        generation: number of resets.
    """

    def __init__(
        self,
        sharding: Sharding,
        dtype: torch.dtype,
        work: torch.dtype,
        device: torch.device,
        captured: captures.Captures | None = None,
    ) -> None:
        self.sharding, self.dtype, self.work, self.device = sharding, dtype, work, device
        self.stored = self.steps = self.generation = 0
        self._columns: Tensor | None = None  # dW and dG, [2, DEPTH, rows]
        self._vectors: Tensor  # [VECTORS, rows]
        self._each: tuple[Tensor, ...] = ()  # views of them, made once
        self._gaps: deque[int] = deque(maxlen=DEPTH)
        self._dot: Tensor | None = None  # sum of <w - start, g> over the block, on own rows
        self._scales: Tensor | None = None  # M and M^-1 where they are numbers, for graphs
        self._captured = captured or captures.none()

    @property
    def columns(self) -> int:
        """k, differences that can be used."""
        return min(max(self.stored - 1, 0), DEPTH)

    @property
    def elapsed(self) -> int:
        """Blocks from the oldest to the newest mean, those that were not looked at included."""
        return sum([*self._gaps][-self.columns :]) if self.columns else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        if self._columns is None:
            return 0
        return sum(t.numel() * t.element_size() for t in (self._columns, self._vectors))

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r, [rows] of `work`."""
        if self._columns is None:
            lo, hi = self.sharding.rows
            n = hi - lo
            self._columns = torch.zeros(2, DEPTH, n, dtype=self.dtype, device=self.device)
            self._vectors = torch.zeros(VECTORS, n, dtype=self.work, device=self.device)
            self._each = self._vectors.unbind()
            self._dot = torch.zeros((), dtype=torch.float64, device=self.device)
        return self._each[0], self._each[1]

    @property
    def start(self) -> Tensor:
        """w at the beginning of the block, [rows]."""
        return self._each[2]

    @property
    def gradient(self) -> Tensor:
        """After `finish`: the mean gradient of the block, weight decay included, [rows]."""
        return self._each[4]

    def note(self, w: Tensor, r: Tensor) -> None:
        """Takes a step into the block.

        Args:
            w: iterate, [rows].
            r: minus its gradient, without weight decay, [rows].
        """
        first, odd = self.steps == 0, self.steps % 2
        key = captures.where(w, r, self._vectors) if self._captured.used else ()
        self._captured.run(lambda: self._add(w, r, first, odd), "note", first, odd, key)
        self.steps += 1

    def _add(self, w: Tensor, r: Tensor, first: bool, odd: int) -> None:
        start, moved, *sums = self._each[2:6]
        assert self._dot is not None
        if first:
            start.copy_(w)
            self._vectors[3:6].zero_()
            self._dot.zero_()
            sums[0].sub_(r)
            return
        counted, dots = self.sharding.counted, []
        apart = self.sharding.groups > 1
        for rows in chunks(w):
            step, own = part_of(w, rows) - part_of(start, rows), part_of(r, rows)
            part_of(moved, rows).add_(step)
            part_of(sums[odd], rows).sub_(own)
            if not apart:
                dots.append(torch.dot(step, own))
        if apart:
            dots = [torch.dot(w[rows] - start[rows], r[rows]) for rows in chunks(w, counted)]
        self._dot.sub_(total(dots, w))

    def finish(self, decay: float | Tensor, gap: int = 1) -> Tensor:
        """Ends the block and stores its means and differences.

        Args:
            decay: the diagonal D by which weight decay adds D w to a gradient: a number, or [rows].
            gap: blocks since the one that was stored before it, this one included.

        Returns:
            On own rows: the sum of <w - start, g> over the steps, and <mean w - start, mean g>;
            [2] float64.
        """
        moved, even = self._each[3:5]
        self.stored += 1
        self._gaps.append(gap)
        key = self.steps, self.stored % NOISES, self._where
        sums: Tensor = self._captured.run(self._make_means, "means", *key)
        means, last = self._vectors[3:5], self._vectors[6:8]
        if self.stored > 1:
            slot = self._own[:, (self.stored - 2) % DEPTH]
            for rows in chunks(moved):
                new, old, column = (part_of(both, rows) for both in (means, last, slot))
                if column.dtype == new.dtype:
                    torch.sub(new, old, out=column)
                else:
                    column.copy_(new - old)
        last.copy_(means)
        if isinstance(decay, Tensor) or decay:
            even.add_(decay * moved)
        return sums

    def _make_means(self) -> Tensor:
        """Makes means and noise of the sums; returns the two numbers of `finish`."""
        start, moved, even, odd = self._each[2:6]
        assert self._dot is not None
        first = (self.steps + 1) // 2
        for rows in chunks(moved):
            mean, one, other = (part_of(vector, rows) for vector in (moved, even, odd))
            mean.div_(self.steps)
            one.div_(first)
            other.div_(self.steps - first)
            # Steps of even and of odd number share nothing but the signal.
            torch.sub(one, other, out=part_of(self._noise, rows)).mul_(0.5)
            one.add_(other).mul_(0.5)
        linear = chunked_dot(moved, even, self.sharding.counted)
        moved.add_(start)
        return torch.stack([self._dot, linear])

    def end_block(
        self,
        numbers: Tensor,
        judged: Callable[[], Tensor],
        scaling: float | Tensor,
        decay: float | Tensor,
        *key: Hashable,
    ) -> Tensor:
        """All sums at a block's end, in one row, float64: numbers, a judgement, `products`.

        Args:
            numbers: what `finish` returned.
            judged: makes one number on own rows, [1], by device work alone.
            scaling: see `products`.
            decay: see `finish`.
            key: what `judged` depends on, see `Captures.run`.
        """
        steady = self._captured.steady
        decay = steady("decay", decay) if isinstance(decay, Tensor) else decay
        if isinstance(scaling, Tensor):
            scaling = steady("scaling", scaling)
        if self._captured.used and not isinstance(scaling, Tensor):
            # A schedule changes the rate in every block: a graph reads it from the device.
            inverse = 1.0 / scaling if scaling else 0.0
            pair = torch.tensor([scaling, inverse], dtype=self.work, device="cpu")
            if self._scales is None:
                self._scales = torch.zeros(2, dtype=self.work, device=self.device)
            self._scales.copy_(pair, non_blocking=True)
            scales: _Diagonal = (self._scales[0], self._scales[1])
            known = captures.where(self._scales)
        else:
            scales, known = scaling, captures.known_by(scaling)

        def work() -> Tensor:
            own = judged().to(numbers.device)
            return torch.cat([numbers, own, self.products(scales, decay)])

        addresses = captures.where(numbers), known, captures.known_by(decay), self._where
        phase = "sums", self.columns, self.stored % NOISES
        result: Tensor = self._captured.run(work, *phase, addresses, key)
        return result

    @property
    def _where(self) -> Hashable:
        return captures.where(self._own, self._vectors) if self._captured.used else ()

    def products(self, scaling: _Diagonal, decay: float | Tensor) -> Tensor:
        """Sums over own rows that the method needs of the last blocks.

        Args:
            scaling: the diagonal of M: a number, or [rows]. Rows on which it is 0 are left out.
                Or a number and its reciprocal (0 for 0), [] on the device.
            decay: see `finish`.

        Returns:
            A [k, k], then B [k, k], dW^T of each noise [k, NOISES] and dW^T g [k] in one matrix
            [k, k + NOISES + 1], then <noise, M noise>, ||noise||^2 and ||g||^2 of the last block:
            one row, float64.
        """
        k, noises = self.columns, self._vectors[8:]
        dw, dg = self._own[0, :k], self._own[1, :k]
        tables: list[Tensor] = []
        metrics: list[Tensor] = []
        numbers: list[Tensor] = []
        for rows in chunks(self.gradient, self.sharding.counted, widened=self.dtype != self.work):
            own, other = part_of(dw, rows).to(self.work), part_of(dg, rows).to(self.work)
            if isinstance(decay, Tensor):
                other = other + part_of(decay, rows) * own
            elif decay:
                other = torch.add(other, own, alpha=decay)
            g, noise = part_of(self.gradient, rows), part_of(self._noise, rows)
            m, inverse = _with_inverse(scaling, rows)
            few = torch.cat([part_of(noises, rows), g.unsqueeze(0)])
            tables.append(torch.cat([own @ other.T, own @ few.T], dim=1).double())
            # A number is multiplied with the product, and not with all rows.
            many = isinstance(inverse, Tensor) and inverse.dim() > 0
            metric = (own * inverse) @ own.T if many else (own @ own.T) * inverse
            metrics.append(metric.double())
            dots = torch.dot(noise, m * noise), torch.dot(noise, noise), torch.dot(g, g)
            numbers.append(torch.stack(dots).double())
        if not tables:
            size = k * k + k * (k + NOISES + 1) + 3
            return torch.zeros(size, dtype=torch.float64, device=self.device)
        sums = [
            found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)
            for found in (metrics, tables, numbers)
        ]
        return torch.cat([found.reshape(-1) for found in sums])

    def combine(self, coefficients: Tensor) -> Tensor:
        """dW times coefficients [k], [rows], in memory that the next block uses."""
        k = self.columns
        own, out = self._own[0, :k], self._each[3]
        weights = coefficients[:k].to(self.device, self.work)
        for rows in chunks(out, widened=self.dtype != self.work):
            columns = part_of(own, rows).to(self.work)
            torch.mv(columns.T, weights, out=part_of(out, rows))
        return out

    def drop_block(self) -> None:
        """Forgets the block that runs."""
        self.steps = 0

    def clear(self) -> None:
        """Forgets everything; the memory stays allocated."""
        self.stored = self.steps = 0
        self._gaps = deque(maxlen=DEPTH)
        self.generation += 1

    def release(self) -> None:
        """Forgets everything, and frees the memory."""
        self.clear()
        self._columns, self._each, self._dot, self._scales = None, (), None, None
        self._vectors = torch.empty(0)

    @property
    def _own(self) -> Tensor:
        self.staging_buffer()
        assert self._columns is not None
        return self._columns

    @property
    def _noise(self) -> Tensor:
        """The noise of the last block stored."""
        return self._each[8 + (self.stored - 1) % NOISES]

    def state(self) -> BlocksState:
        """All it knows, copied to host memory, but for what `own_state` has."""
        used = bool(self.stored or self.steps)
        return BlocksState(
            stored=self.stored,
            steps=self.steps,
            gaps=tuple(self._gaps),
            columns=self._own[:, : self.columns].to("cpu", copy=True) if used else None,
            vectors=self._vectors[2:].to("cpu", copy=True) if used else None,
        )

    def own_state(self, losses: tuple[float, ...]) -> OwnBlockState:
        """What this rank alone knows of the block that runs; losses: its own."""
        dot = 0.0 if self._dot is None else float(self._dot)
        return OwnBlockState(dot=dot, rows=self.sharding.rows, losses=losses)

    def load_state(self, state: BlocksState, own: OwnBlockState | None) -> bool:
        """Loads what `state` of the same rows returned; the dtypes may be others.

        Returns:
            Whether the block that ran goes on: not without what this rank alone knew of it.
        """
        self.clear()
        if state.vectors is None or state.columns is None:
            return False
        self.stored = state.stored
        self._gaps.extend(state.gaps)
        self._own[:, : state.columns.shape[1]].copy_(state.columns)
        self._vectors[2:].copy_(state.vectors)
        if own is None or own.rows != self.sharding.rows:
            return False
        assert self._dot is not None
        self.steps = state.steps
        self._dot.fill_(own.dot)
        return True


def _with_inverse(scaling: _Diagonal, rows: slice) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Rows of the diagonal of M, and of M^-1: 0 where M is. Numbers where it is a number."""
    if isinstance(scaling, tuple):
        return scaling
    if isinstance(scaling, Tensor):
        m = part_of(scaling, rows)
        return m, m.reciprocal().masked_fill_(m == 0.0, 0.0)
    return scaling, 1.0 / scaling if scaling else 0.0
