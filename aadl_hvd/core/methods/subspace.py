"""Anderson acceleration in the energy norm (type I) on block means, in the span of recent progress.

    dW, dG       differences of successive blocks' mean iterates and mean gradients, n x k
    H            dW^T dG in an orthonormal basis of the span in the metric M^-1, weighted by noise
    d            half a Newton step with H, less what the base optimizer does in a block

`reference.subspace` has the jump in one plain function; `curvature` has the solve, `trust` says how
much of d is taken, `invariance` corrects d, `blocks` holds the vectors.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.checkpoint.subspace_state import OwnBlockState, SubspaceState
from aadl_hvd.comm.base import Gathering
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.acceptance import Acceptance, Rejected
from aadl_hvd.core.blocks import DEPTH, NOISES, Blocks
from aadl_hvd.core.captures import where
from aadl_hvd.core.chunking import chunks, part_of, total
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.curvature import find_jump
from aadl_hvd.core.fixed_point import FixedPoint
from aadl_hvd.core.handover import Handover
from aadl_hvd.core.invariance import ScaleInvariance
from aadl_hvd.core.reduction import COMPARED, Payload, compared, equal, numbers_of
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.core.solve import Vector
from aadl_hvd.core.trust import Trust
from aadl_hvd.stats import Rejection, Stats

_TABLE = 2 * DEPTH + NOISES + 1  # columns of one row of A, B, dW^T noise and dW^T g
_SCALARS = 6
NUMBERS = DEPTH * _TABLE + _SCALARS + 3 + COMPARED  # in the reduction at a block's end


class Subspace:
    """Implements `Method`, and `reduction.Payload` at a block's end.

    Memory on this rank, see `Blocks`: 20 n/P numbers of `history_dtype`, 11 n/P in float32
    (float64 where a weight is), and n/P for the base step that a jump started from.

    Attributes:
        blocks: the vectors.
        trust: how far a jump may go.
        invariance: the tensors whose scale does not matter.
        fingerprint: of a loaded state that this rank has yet to go on from; 0: none.
        wanted: L of the next block: no shorter than the memory of the momentum, and even.
        noise: variance of one step's gradient in the last block; NaN: unknown.
        squared: square of the norm of the last block's mean gradient.
    """

    part = "gram"
    keeps_base_step = True  # the next block measures how the loss has gone along the jump
    decayed = False  # it is added at a block's end, so that it may change from step to step
    loss_spreads = 5.0  # noise is large here, and bad jumps show in the next block as well

    def __init__(
        self,
        config: AndersonConfig,
        shard: WeightShard,
        collectives: Collectives,
        stats: Stats,
        acceptance: Acceptance,
        handover: Handover,
    ) -> None:
        self._collectives, self._stats, self._acceptance = collectives, stats, acceptance
        self._shard, self._handover = shard, handover
        dtype = config.history_dtype or shard.dtype
        made = shard.sharding, dtype, shard.dtype, shard.device, shard.captures
        self.blocks = Blocks(*made)
        self.trust = Trust()
        self.invariance = ScaleInvariance(shard.sharding)
        self.fingerprint = 0
        self.same = False
        self.wanted = 0
        self.noise = self.squared = math.nan
        self._problem: FixedPoint | None = None  # only during a reduction
        self._momentum = 0.0
        self._losses: list[float | Tensor] = []  # one for each step that had one
        self._sums: Vector = np.zeros(0)
        self._steps, self._gain = 0, 0.0  # of the block that has ended, of the last jump
        self._complete = self._observed = False
        self._late: tuple[Tensor, Gathering] | None = None  # a jump's own rows, and those of all

    @property
    def nbytes(self) -> int:
        """Bytes of history allocated on this rank."""
        return self.blocks.nbytes

    @property
    def columns(self) -> int:
        """Differences that can be used."""
        return self.blocks.columns

    @property
    def finite(self) -> bool:
        """Whether all sums of the last reduction are."""
        return bool(np.isfinite(self._sums).all())

    @property
    def norm(self) -> float:
        """The norm of the last block's mean gradient."""
        return math.sqrt(self.squared)

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r."""
        return self.blocks.staging_buffer()

    def note(self, w: Tensor, r: Tensor, problem: FixedPoint) -> None:
        """Takes a step into the block."""
        if not self.blocks.steps:
            self._losses = []
        self.blocks.note(w, r)
        if (loss := self._acceptance.losses.current) is not None:
            self._losses.append(loss)

    def payloads(self, problem: FixedPoint, r: Tensor, stored: bool) -> Sequence[Payload]:
        """What the reduction at a block's end carries; it stores the block."""
        self._problem, self._momentum = problem, problem.momentum
        return (self,)

    # The payload

    def pending(self) -> list[Tensor]:
        """Sums over this rank's rows, and losses that are still on the device."""
        blocks, problem = self.blocks, self._problem
        assert problem is not None
        self.same, self._problem = False, None
        tensors = [loss for loss in self._losses if isinstance(loss, Tensor)]
        self._complete = blocks.steps >= self._handover.length - 1
        if not self._complete:
            return tensors
        rows = blocks.sharding.rows
        decay = problem.decay(*rows)
        numbers = blocks.finish(decay, self._handover.gap)
        base = where(self._acceptance.base_rows()) if self.trust.judges else None

        def judged() -> Tensor:
            return total(self._along_jump(), blocks.gradient).reshape(1)

        sums = blocks.end_block(numbers, judged, problem.scaling(*rows), decay, base)
        return [sums, *tensors]

    def _along_jump(self) -> list[Tensor]:
        """Parts of <d, g>: d is where the block began, less the base step before the jump."""
        if not self.trust.judges:
            return []
        blocks, base = self.blocks, self._acceptance.base_rows()
        start, g = blocks.start, blocks.gradient
        return [
            torch.dot(part_of(start, rows) - part_of(base, rows), part_of(g, rows))
            for rows in chunks(g, blocks.sharding.counted)
        ]

    def pack(self, numbers: list[Vector]) -> Vector:
        """[NUMBERS] numbers to be summed over ranks: what `pending` began, and the version."""
        blocks, k = self.blocks, self.blocks.columns
        table, scalars = np.zeros((DEPTH, _TABLE)), np.zeros(_SCALARS)
        if self._complete:
            own, *numbers = numbers
            squared, rest = np.split(own[3:], [k * k])
            products = rest[:-3].reshape(k, k + NOISES + 1)
            table[:k, :k] = squared.reshape(k, k)
            table[:k, DEPTH : DEPTH + k] = products[:, :k]
            table[:k, 2 * DEPTH :] = products[:, k:]
            scalars[:] = *own[:3], *rest[-3:]
        known = iter(numbers)
        losses = [float(next(known)[0]) if isinstance(x, Tensor) else x for x in self._losses]
        self._acceptance.losses.note_losses(losses)
        observed = self._complete and len(losses) == blocks.steps and all(map(isfinite, losses))
        loss = [float(np.mean(losses)), 1.0] if observed else [0.0, 0.0]
        wanted = 2.0 * round(0.5 * self._memory)
        counts = blocks.stored, blocks.generation, blocks.steps, self.fingerprint, self._complete
        version = compared(zlib.crc32(repr(counts).encode()))
        return np.concatenate([table.reshape(-1), scalars, loss, [wanted], version])

    def unpack(self, sums: Vector, size: int) -> None:
        """Takes in their sums, and begins the next block."""
        numbers, version = np.split(sums, [NUMBERS - COMPARED])
        self._sums, self.same = numbers, equal(version, size)
        self.wanted = 2 * round(0.5 * numbers[-1] / size) if isfinite(numbers[-1]) else 0
        self._steps = steps = self.blocks.steps
        self.blocks.drop_block()
        self.noise = self.squared = math.nan
        if not self._complete:
            self.trust.forget_jump()  # the next block is not the one after it
        if not (self.same and self._complete and self.finite):
            return
        # Plain numbers: they end up in checkpoints, which torch reads without NumPy's types.
        scalars = map(float, numbers[DEPTH * _TABLE : -1])
        moved, linear, judged, metric, noise, squared, loss, observed = scalars
        self.noise, self.squared = steps * noise, squared
        self.trust.judge(judged)
        self._observed = bool(observed == size and loss > 0.0)
        phi = psi = None
        if self._observed:  # half of what the loss is above that of the mean iterate, over it
            phi = 0.5 * max(0.0, moved / steps - linear) / (loss / size)
        k = self.blocks.columns
        travelled = float(numbers[: DEPTH * _TABLE].reshape(DEPTH, _TABLE)[:k, :k].sum())
        if travelled > 0.0:
            psi = self.blocks.elapsed * steps**2 * metric / travelled
        self.trust.note_noise(phi, psi)
        self._stats.note_block(steps, self.trust.noise(True), self.trust.noise(False))

    # After the reduction

    def propose(self, problem: FixedPoint, w: Tensor, r: Tensor) -> Tensor:
        """The jump d, this rank's rows. Collective.

        Raises:
            Rejected: noise hides what there is, or nothing is to be gained.
        """
        if not self._complete:
            raise Rejected
        if not self.finite:
            raise Rejected(Rejection.NONFINITE)
        if self._handover.hands_back(self.noise, self.squared):
            raise Rejected
        fraction = self.trust.fraction(self._observed)
        k = self.blocks.columns
        if k < 2:
            raise Rejected  # too early
        if fraction == 0.0:
            raise Rejected(Rejection.NOISE)
        with self._stats.timed("solve"):
            message = self._collectives.jump(self._solve(k, fraction))
        coefficients, (slope, gain) = message[:DEPTH], message[DEPTH:]
        if not coefficients.any():
            raise Rejected(Rejection.GAIN)
        self.trust.jumped(float(slope))
        self._gain = float(gain)
        self._stats.note_jump(self._gain)
        jump, invariance = self.blocks.combine(torch.from_numpy(coefficients)), self.invariance
        if invariance.looks:
            with self._stats.timed("solve"):
                sizes = [tensor.numel() for tensor in problem.tensors]
                own: Tensor = self._shard.captures.run(
                    lambda: invariance.sums(sizes, w, r, jump),
                    "growth", invariance.layout(sizes), where(w, r, jump),
                )  # fmt: skip
                (sums,) = numbers_of([own])
                if invariance.look(problem.sizes, self._collectives.growth(sums)):
                    invariance.correct(sizes, w, jump)
        return jump

    def _solve(self, k: int, fraction: float) -> Vector:
        """[DEPTH + 2]: coefficients, slope and gain of the jump that is made."""
        table = self._sums[: DEPTH * _TABLE].reshape(DEPTH, _TABLE)[:k]
        a, b = table[:, :k], table[:, DEPTH : DEPTH + k]
        noises, gradient = table[:, 2 * DEPTH : -1], table[:, -1]
        farthest = self.trust.farthest(self._observed)
        share = self.trust.scale * fraction
        jump = find_jump(a, b, gradient, noises, self._steps, self._memory, farthest / share)
        message = np.zeros(DEPTH + 2)
        message[:k] = share * jump.coefficients
        # Along the jump the loss is a parabola: see Jump.
        curved = -2.0 * (jump.gain + jump.slope)
        message[DEPTH:] = share * jump.slope, -share * jump.slope - 0.5 * share**2 * curved
        return message

    def complete(self, w: Tensor, proposal: Tensor) -> Tensor:
        """This rank's rows of the base step plus the jump, in the memory of w."""
        return w.copy_(self._acceptance.base_rows()).add_(proposal)

    def send_jump(self, jump: Tensor) -> None:
        """Starts to gather a jump, which the next step adds. Collective.

        Args:
            jump: this rank's rows, [rows]; they are copied.
        """
        rows = jump.clone()
        self._late = rows, self._shard.send(rows)

    def add_jump(self, problem: FixedPoint) -> bool:
        """Adds the jump that `send_jump` has sent to the weights. Not collective.

        Returns:
            Whether there was one: False where the parameters have changed since.
        """
        late, self._late = self._late, None
        if late is not None:
            self._shard.add(problem, late[1])
        return late is not None

    def drop_jump(self) -> None:
        """Forgets a jump that was sent and not added."""
        self._late = None

    def rejected(self, cause: Rejection) -> None:
        """A jump that safeguard="loss" rejects was none."""
        if cause is Rejection.LOSS:
            self.trust.lower()
            self.trust.forget_jump()
            self._stats.take_back_jump(self._gain)

    def went_back(self) -> None:
        """The loss after a jump was higher, and the jump was taken back."""
        self.trust.lower()
        self.trust.forget_jump()
        self.blocks.drop_block()

    def use_kernels(self, able: bool) -> bool:
        """There are no kernels for this method; whether the averages may use theirs."""
        blocks = self.blocks
        return able and kernels.usable(blocks.device, blocks.work, blocks.dtype)

    def reset(self) -> None:
        """Forgets all blocks; trust in jumps stays."""
        self.blocks.clear()
        self.trust.clear()
        self.invariance.clear()
        self.fingerprint = 0

    def release(self) -> None:
        """Forgets all blocks, and frees their memory."""
        self.reset()
        self.drop_jump()
        self._shard.captures.forget()
        self.blocks.release()
        self.trust.scale = 1.0

    def restart_generation(self) -> None:
        """From here on the same on all ranks."""
        self.blocks.generation = 0

    def state(self) -> SubspaceState:
        """All it knows that is shared or divided among ranks, in host memory."""
        judged = self.trust.judges and not self._handover.late
        base = self._acceptance.base_rows().to("cpu", copy=True) if judged else None
        return SubspaceState(
            blocks=self.blocks.state(),
            trust=self.trust.state(),
            invariance=self.invariance.state(),
            base=base,
            jump=None if self._late is None else self._late[0].to("cpu", copy=True),
        )

    def own_state(self) -> OwnBlockState:
        """What this rank alone knows of the block that runs."""
        return self.blocks.own_state(tuple(float(loss) for loss in self._losses))

    def load_state(self, state: SubspaceState, own: OwnBlockState | None) -> None:
        """Loads what `state` and, where that is known, `own_state` returned. Collective."""
        self.reset()
        self.drop_jump()
        late = self._handover.late
        if self.blocks.load_state(state.blocks, own):
            assert own is not None
            self._losses = list(own.losses)
        self.trust.load_state(state.trust)
        self.invariance.load_state(state.invariance)
        if state.base is not None:
            self._acceptance.base_rows().copy_(state.base)
        elif not late:
            self.trust.forget_jump()
        if late and state.jump is not None:
            self.send_jump(self._shard.empty().copy_(state.jump))

    @property
    def _memory(self) -> float:
        """Steps for which the base optimizer's momentum remembers a gradient: 1 / (1 - mu)."""
        return 1.0 / max(1.0 - self._momentum, 1e-3)
