"""Means of iterates and gradients over blocks of steps, and their differences: this rank's rows.

The mean of a quadratic's gradients is its gradient at the mean of the iterates, whatever the noise,
and the variance of the noise falls with the length of the block.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from aadl_hvd.checkpoint.subspace_state import BlocksState, OwnBlockState
from aadl_hvd.core.chunking import chunked_dot, chunks, part_of, total
from aadl_hvd.core.sharding import Sharding

DEPTH = 10  # m, differences that are kept
NOISES = 3  # blocks whose noise is kept
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

    Attributes:
        stored: blocks stored since the last reset.
        steps: steps noted in the block that runs.
        generation: number of resets.
    """

    def __init__(
        self, sharding: Sharding, dtype: torch.dtype, work: torch.dtype, device: torch.device
    ) -> None:
        self.sharding, self.dtype, self.work, self.device = sharding, dtype, work, device
        self.stored = self.steps = self.generation = 0
        self._columns: Tensor | None = None  # dW and dG, [2, DEPTH, rows]
        self._vectors: Tensor  # [VECTORS, rows]
        self._each: tuple[Tensor, ...] = ()  # views of them, made once
        self._gaps: deque[int] = deque(maxlen=DEPTH)
        self._dot: Tensor | float = 0.0  # sum of <w - start, g> over the block, on own rows

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
        start, moved, *sums = self._each[2:6]
        if self.steps == 0:
            start.copy_(w)
            self._vectors[3:6].zero_()
            self._dot = 0.0
            sums[0].sub_(r)
        else:
            counted, dots = self.sharding.counted, []
            apart = self.sharding.groups > 1
            for rows in chunks(w):
                step, own = part_of(w, rows) - part_of(start, rows), part_of(r, rows)
                part_of(moved, rows).add_(step)
                part_of(sums[self.steps % 2], rows).sub_(own)
                if not apart:
                    dots.append(torch.dot(step, own))
            if apart:
                dots = [torch.dot(w[rows] - start[rows], r[rows]) for rows in chunks(w, counted)]
            self._dot = self._dot - total(dots, w)
        self.steps += 1

    def finish(self, decay: float | Tensor, gap: int = 1) -> Tensor:
        """Ends the block and stores its means and differences.

        Args:
            decay: the diagonal D by which weight decay adds D w to a gradient: a number, or [rows].
            gap: blocks since the one that was stored before it, this one included.

        Returns:
            On own rows: the sum of <w - start, g> over the steps, and <mean w - start, mean g>;
            [2] float64.
        """
        start, moved, even, odd, last_w, last_g = self._each[2:8]
        first = (self.steps + 1) // 2
        self.stored += 1
        self._gaps.append(gap)
        for rows in chunks(moved):
            mean, one, other = (part_of(vector, rows) for vector in (moved, even, odd))
            mean.div_(self.steps)
            one.div_(first)
            other.div_(self.steps - first)
            # Steps of even and of odd number share nothing but the signal.
            torch.sub(one, other, out=part_of(self._noise, rows)).mul_(0.5)
            one.add_(other).mul_(0.5)
        linear = chunked_dot(moved, even, self.sharding.counted)
        dot = torch.as_tensor(self._dot, dtype=torch.float64, device=linear.device)
        moved.add_(start)
        if self.stored > 1:
            slots = self._own[:, (self.stored - 2) % DEPTH].unbind()
            for column, new, last in zip(slots, (moved, even), (last_w, last_g), strict=True):
                for rows in chunks(new):
                    part_of(column, rows).copy_(part_of(new, rows) - part_of(last, rows))
        last_w.copy_(moved)
        last_g.copy_(even)
        if isinstance(decay, Tensor) or decay:
            even.add_(decay * moved)
        return torch.stack([dot, linear])

    def products(self, scaling: float | Tensor, decay: float | Tensor) -> Tensor:
        """Sums over own rows that the method needs of the last blocks.

        Args:
            scaling: the diagonal of M: a number, or [rows]. Rows on which it is 0 are left out.
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
            metric = (own * inverse) @ own.T if isinstance(m, Tensor) else (own @ own.T) * inverse
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
        self._columns, self._each = None, ()
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
        return OwnBlockState(dot=float(self._dot), rows=self.sharding.rows, losses=losses)

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
        self.steps, self._dot = state.steps, own.dot
        return True


def _with_inverse(
    scaling: float | Tensor, rows: slice
) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Rows of the diagonal of M, and of M^-1: 0 where M is."""
    if isinstance(scaling, Tensor):
        m = part_of(scaling, rows)
        return m, m.reciprocal().masked_fill_(m == 0.0, 0.0)
    return scaling, 1.0 / scaling if scaling else 0.0
