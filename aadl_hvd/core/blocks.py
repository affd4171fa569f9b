"""Means of iterates and gradients over blocks of steps, and their differences: this rank's rows.

The mean of a quadratic's gradients is its gradient at the mean of the iterates, whatever the noise,
and the variance of the noise falls with the length of the block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.subspace_state import BlocksState, OwnBlockState
from aadl_hvd.core import captures
from aadl_hvd.core.chunking import chunks, part_of, total
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.core.solve import Vector

DEPTH = 10  # m, differences that are kept
NOISES = 3  # blocks whose noise is kept
# Vectors, in this order: the next w and r; w where the block began; the last block's means of w and
# g; three sums over steps: g in those of odd number, w - start in all, g in those of even number;
# noises. When a block has ended, the last two sums become its means of w and g. So the mean of g,
# the noises and the columns lie side by side, and one product has all of them.
_START, _LAST_W, _LAST_G, _ODD, _MOVED, _EVEN, _FIRST_NOISE = range(2, 9)
_LAST = slice(_LAST_W, _LAST_G + 1)
_SUMS, _MEANS = slice(_ODD, _EVEN + 1), slice(_MOVED, _EVEN + 1)
VECTORS = _FIRST_NOISE + NOISES
_FEW = 1 + NOISES  # the gradient and the noises
# Their order in checkpoints:
_SAVED = _START, _MOVED, _EVEN, _ODD, _LAST_W, _LAST_G, *range(_FIRST_NOISE, VECTORS)


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
        # One view: the gradient, the noises, dW and dG, [_FEW + 2 DEPTH, rows]. Empty where columns
        # are narrower. A tuple: a backup copies tensors, and these rows are copied as others.
        self._joined: tuple[Tensor, ...] = ()
        self._gaps: deque[int] = deque(maxlen=DEPTH)
        # On own rows: sum of <w - start, g> over the block, and that product of its means; [2].
        self._dots: Tensor | None = None
        self._numbers: tuple[float | None, float] = 0.0, 0.0  # see `arrange`
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
            n, joined = hi - lo, self.dtype == self.work
            count = VECTORS + 2 * DEPTH if joined else VECTORS
            memory = torch.zeros(count, n, dtype=self.work, device=self.device)
            self._vectors = memory[:VECTORS]
            self._each = self._vectors.unbind()
            if joined:
                self._columns = memory[VECTORS:].view(2, DEPTH, n)
                self._joined = (memory[_EVEN:],)
            else:
                self._columns = torch.zeros(2, DEPTH, n, dtype=self.dtype, device=self.device)
            self._dots = torch.zeros(2, dtype=torch.float64, device=self.device)
        return self._each[0], self._each[1]

    @property
    def start(self) -> Tensor:
        """w at the beginning of the block, [rows]."""
        return self._each[_START]

    @property
    def gradient(self) -> Tensor:
        """After `finish`: the mean gradient of the block, weight decay included, [rows]."""
        return self._each[_EVEN]

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
        start, moved, own_sum = self.start, self._each[_MOVED], self._each[_ODD if odd else _EVEN]
        assert self._dots is not None
        if first:
            start.copy_(w)
            self._vectors[_SUMS].zero_()
            self._dots.zero_()
            own_sum.sub_(r)
            return
        counted, dots = self.sharding.counted, []
        apart = self.sharding.groups > 1
        for rows in chunks(w):
            step, own = part_of(w, rows) - part_of(start, rows), part_of(r, rows)
            part_of(moved, rows).add_(step)
            part_of(own_sum, rows).sub_(own)
            if not apart:
                dots.append(torch.dot(step, own))
        if apart:
            dots = [torch.dot(w[rows] - start[rows], r[rows]) for rows in chunks(w, counted)]
        self._dots[0].sub_(_sum(dots, w))

    def finish(self, decay: float | Tensor, gap: int = 1) -> Tensor:
        """Ends the block and stores its means and differences.

        Args:
            decay: the diagonal D by which weight decay adds D w to a gradient: a number, or [rows].
            gap: blocks since the one that was stored before it, this one included.

        Returns:
            On own rows: the sum of <w - start, g> over the steps, and <mean w - start, mean g>;
            [2] float64.
        """
        moved, even = self._each[_MEANS]
        self.stored += 1
        self._gaps.append(gap)
        key = self.steps, self.stored % NOISES, self._where
        self._captured.run(self._make_means, "means", *key)
        means, last = self._vectors[_MEANS], self._vectors[_LAST]
        if self.stored > 1:
            slot = self._own[:, (self.stored - 2) % DEPTH]
            for rows in chunks(moved):
                new, old, column = (part_of(both, rows) for both in (means, last, slot))
                if column.dtype == new.dtype:
                    torch.sub(new, old, out=column)
                else:
                    column.copy_(new - old)
        last.copy_(means)
        if isinstance(decay, Tensor):
            even.addcmul_(decay, moved)
        elif decay:
            even.add_(moved, alpha=decay)
        assert self._dots is not None
        return self._dots

    def _make_means(self) -> None:
        """Makes means and noise of the sums, and the second number of `finish`."""
        odd, moved, even = self._each[_SUMS]
        assert self._dots is not None
        first = (self.steps + 1) // 2
        for rows in chunks(moved):
            mean, one, other = (part_of(vector, rows) for vector in (moved, even, odd))
            mean.div_(self.steps)
            one.mul_(0.5 / first)
            other.mul_(0.5 / (self.steps - first))
            # Steps of even and of odd number share nothing but the signal.
            torch.sub(one, other, out=part_of(self._noise, rows))
            one.add_(other)
        counted = chunks(moved, self.sharding.counted)
        dots = [torch.dot(part_of(moved, rows), part_of(even, rows)) for rows in counted]
        self._dots[1].copy_(_sum(dots, moved))
        moved.add_(self.start)

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
        m = steady("scaling", scaling) if isinstance(scaling, Tensor) else None
        d = steady("decay", decay) if isinstance(decay, Tensor) else None
        # Numbers enter on the host, in `arrange`: a graph does not depend on them.
        self._numbers = (
            None if isinstance(scaling, Tensor) else scaling,
            0.0 if isinstance(decay, Tensor) else decay,
        )

        def work() -> Tensor:
            return torch.cat([numbers, judged(), self.products(m, d)])

        phase = "sums", self.columns, self.stored % NOISES
        operands = [t for t in (numbers, m, d) if t is not None]
        given = m is not None, d is not None, captures.where(*operands), self._where
        result: Tensor = self._captured.run(work, *phase, *given, key)
        return result

    @property
    def _where(self) -> Hashable:
        return captures.where(self._own, self._vectors) if self._captured.used else ()

    def products(self, scaling: Tensor | None = None, decay: Tensor | None = None) -> Tensor:
        """Sums over own rows that the method needs of the last blocks, for `arrange`.

        Args:
            scaling: the diagonal of M, [rows]. Rows on which it is 0 are left out. None: it is a
                number, which `arrange` knows.
            decay: the diagonal D of weight decay, [rows]. None: it is a number.

        Returns:
            One row, float64: dW^T (g, noises, dW, dG + D dW), [k, _FEW + 2 DEPTH]; (g, noises)^T of
            themselves, [_FEW, _FEW]; with `scaling` dW^T M^-1 dW, [k, k], and <noise, M noise>.
        """
        k, few = self.columns, self._vectors[_EVEN:]
        found: list[Tensor] = []
        widened = not self._joined or decay is not None
        for rows in chunks(self.gradient, self.sharding.counted, widened=widened):
            those = part_of(few, rows)
            if self._joined:
                every = part_of(self._joined[0], rows)
            else:
                every = torch.cat([those, part_of(self._own, rows).flatten(0, 1).to(self.work)])
            dw, dg = every[_FEW : _FEW + DEPTH], every[_FEW + DEPTH :]
            if decay is not None:
                every = torch.cat([those, dw, dg + part_of(decay, rows) * dw])
            own = dw[:k]
            sums = [own @ every.T, those @ those.T]
            if scaling is not None:
                m, noise = part_of(scaling, rows), part_of(self._noise, rows)
                inverse = m.reciprocal().masked_fill_(m == 0.0, 0.0)
                sums += [(own * inverse) @ own.T, torch.dot(noise, m * noise)]
            found.append(torch.cat([each.reshape(-1) for each in sums]))
        if len(found) == 1:
            return found[0].double()
        if found:
            return torch.stack(found).sum(dim=0, dtype=torch.float64)
        size = k * (_FEW + 2 * DEPTH) + _FEW**2 + (k * k + 1 if scaling is not None else 0)
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def arrange(self, products: Vector) -> tuple[Vector, Vector]:
        """What `products` returned, on the host, with M and D where they are numbers.

        Returns:
            Of the last k differences: A = dW^T M^-1 dW, B = dW^T (dG + D dW), dW^T of each noise
            and dW^T g, [k, 2 k + NOISES + 1]. Of the last block: <noise, M noise>, ||noise||^2 and
            ||g||^2, [3].
        """
        k, (m, d) = self.columns, self._numbers
        sizes = k * (_FEW + 2 * DEPTH), _FEW**2
        table = products[: sizes[0]].reshape(k, _FEW + 2 * DEPTH)
        few = products[sizes[0] : sum(sizes)].reshape(_FEW, _FEW).diagonal()
        rest = products[sum(sizes) :]
        squared = table[:, _FEW : _FEW + k]
        b = table[:, _FEW + DEPTH : _FEW + DEPTH + k] + d * squared
        noise = few[1 + self._newest]
        if m is None:
            a, metric = rest[:-1].reshape(k, k), rest[-1]
        else:
            a, metric = (squared / m if m else 0.0 * squared), m * noise
        noises = table[:, 1:_FEW].copy()
        noises[:, self.stored :] = 0.0  # those of before the last reset, which may not be finite
        arranged = np.concatenate([a, b, noises, table[:, :1]], axis=1)
        return arranged, np.array([metric, noise, few[0]])

    def combine(self, coefficients: Tensor) -> Tensor:
        """dW times coefficients [k], [rows], in memory that the next block uses."""
        k = self.columns
        own, out = self._own[0, :k], self._each[_MOVED]
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
        self._columns, self._each, self._joined, self._dots = None, (), (), None
        self._vectors = torch.empty(0)

    @property
    def _own(self) -> Tensor:
        self.staging_buffer()
        assert self._columns is not None
        return self._columns

    @property
    def _noise(self) -> Tensor:
        """The noise of the last block stored."""
        return self._each[_FIRST_NOISE + self._newest]

    @property
    def _newest(self) -> int:
        return (self.stored - 1) % NOISES

    def state(self) -> BlocksState:
        """All it knows, copied to host memory, but for what `own_state` has."""
        used = bool(self.stored or self.steps)
        return BlocksState(
            stored=self.stored,
            steps=self.steps,
            gaps=tuple(self._gaps),
            columns=self._own[:, : self.columns].to("cpu", copy=True) if used else None,
            vectors=torch.stack([self._each[i].cpu() for i in _SAVED]) if used else None,
        )

    def own_state(self, losses: tuple[float, ...]) -> OwnBlockState:
        """What this rank alone knows of the block that runs; losses: its own."""
        dot = 0.0 if self._dots is None else float(self._dots[0])
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
        for i, vector in zip(_SAVED, state.vectors, strict=True):
            self._each[i].copy_(vector)
        if own is None or own.rows != self.sharding.rows:
            return False
        assert self._dots is not None
        self.steps = state.steps
        self._dots[0].fill_(own.dot)
        return True


def _sum(numbers: list[Tensor], like: Tensor) -> Tensor:
    """As `total`, but one number stays in its dtype: what it enters is in float64 anyway."""
    return numbers[0] if len(numbers) == 1 else total(numbers, like)
