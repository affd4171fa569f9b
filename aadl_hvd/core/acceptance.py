"""Every decision about an accelerated point, and its cause.

In the order of a step: is there a system to solve, does it stand out of the noise, is acceleration
paused, does the update point downhill, and, one step later, was the point good. All numbers come
out of reductions, so that every rank decides the same.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
from torch import Tensor

from aadl_hvd.checkpoint.shard_state import BackoffState, ResidualTrial, TrialState
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.chunking import chunked_dot
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.fixed_point import FixedPoint
from aadl_hvd.core.loss_check import LossCheck
from aadl_hvd.core.noise import NoiseMeter, stands_out, variance_from_history
from aadl_hvd.core.numerics import plain_numerics
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.core.solve import Matrix, System, Vector
from aadl_hvd.stats import Rejection, Stats


class Rejected(Exception):
    """The base optimizer's step stays in place.

    Attributes:
        cause: why; None where nothing was proposed.
    """

    def __init__(self, cause: Rejection | None = None) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclasses.dataclass
class Trial:
    """An accelerated step that the next residual has yet to confirm (Algorithm 1, line 20).

    Attributes:
        base_rows: this rank's rows of the weights that the base step had reached, [rows].
        undo: the base optimizer's state then, for `FixedPoint.restore`.
        norm: ||r^k|| of the step that was accelerated, in units of the learning rate.
    """

    base_rows: Tensor
    undo: Any
    norm: float


class Backoff:
    """Pauses acceleration after bad experience.

    A rejection by loss leaves out the next `FIRST` acceleration steps, and twice as many with
    every further one in a row, up to `LONGEST`. If descent rejects more than `STUCK` of some 30
    acceleration steps, the iteration is near a saddle, at which acceleration would keep it. Then
    `LONGEST` steps are left out.

    Its inputs come out of reductions: it is the same on every rank.
    """

    FIRST = BackoffState.FIRST
    LONGEST = BackoffState.LONGEST
    STUCK = 0.5
    MEMORY = 0.97  # of the share that descent rejects, per acceleration step

    def __init__(self) -> None:
        self._left_out, self._next = 0, self.FIRST
        self._rejected = 0.0

    def state(self) -> BackoffState:
        """All it knows."""
        return BackoffState(left_out=self._left_out, following=self._next, rejected=self._rejected)

    def load_state(self, state: BackoffState) -> None:
        """Loads what `state` returned."""
        self._left_out, self._next = state.left_out, state.following
        self._rejected = state.rejected

    def ready(self) -> bool:
        """Whether this acceleration step is tried. One that is left out is counted."""
        if self._left_out == 0:
            return True
        self._left_out -= 1
        return False

    def judged_by_loss(self, rejected: bool) -> None:
        """Notes the verdict on an accepted point."""
        if not rejected:
            self._next = self.FIRST
            return
        self._left_out = max(self._left_out, self._next)
        self._next = min(2 * self._next, self.LONGEST)

    def judged_by_descent(self, rejected: bool) -> None:
        """Notes whether an update pointed uphill."""
        self._rejected = self.MEMORY * self._rejected + (1.0 - self.MEMORY) * rejected
        if self._rejected > self.STUCK:
            self._left_out, self._rejected = self.LONGEST, 0.0


class Acceptance:
    """Decides on the points of one rank's optimizer; the same on every rank.

    Args:
        config: settings.
        collectives: of the ranks that train together.
        stats: timers and counters.

    Attributes:
        noise: measures the noise of the gradient.
        losses: the lagged loss check.
        backoff: pauses.
        noise_known: whether the last noise could be told at all.
        trial: the accelerated step that the next residual judges; None: there is none.
    """

    def __init__(self, config: AndersonConfig, collectives: Collectives, stats: Stats) -> None:
        self._config, self._collectives, self._stats = config, collectives, stats
        self.noise, self.losses, self.backoff = NoiseMeter(), LossCheck(), Backoff()
        self.trial: Trial | None = None
        self.noise_known = True
        self._ready = True
        self._shard: WeightShard
        self._base_rows: Tensor | None = None
        self._base_loss = math.nan

    def use(self, shard: WeightShard) -> None:
        """Goes on with other rows. What was on trial is forgotten."""
        self._shard, self._base_rows = shard, None
        sharding = shard.sharding
        self.noise.copies = sharding.groups if sharding.layout == "rows" else sharding.size

    def base_rows(self) -> Tensor:
        """Memory for the rows of the base step, [rows]."""
        if self._base_rows is None:
            self._base_rows = self._shard.empty()
        return self._base_rows

    def clear(self) -> None:
        """Forgets what belongs to the history: the trial, the noise of the last steps."""
        self.trial = None
        self.losses.drop_trial()
        self.noise.clear()

    def trial_state(self) -> TrialState | None:
        """What is on trial, in host memory; None: nothing."""
        trial, base = self.trial, self.losses.trial
        if trial is None and base is None:
            return None
        residual, rows = None, base
        if trial is not None:
            residual = ResidualTrial(norm=trial.norm, undo=_on_host(trial.undo))
            rows = trial.base_rows if base is None else base
        assert rows is not None
        return TrialState(base=rows.cpu().clone(), residual=residual, loss=base is not None)

    def load_trial(self, state: TrialState | None) -> None:
        """Goes on with what `trial_state` returned."""
        if state is None:
            return
        base_rows = self.base_rows().copy_(state.base)
        if state.residual is not None:
            self.trial = Trial(base_rows, state.residual.undo, state.residual.norm)
        if state.loss:
            self.losses.start_trial(base_rows)  # with the tolerance that was loaded

    # Before the solve

    def begin(self) -> None:
        """Begins an acceleration step, after its reduction."""
        self._ready = self.backoff.ready()

    def columns(self, system: System) -> list[int]:
        """The columns to solve with, counted from the oldest.

        Raises:
            Rejected: there is nothing to solve, nothing stands out of the noise, or acceleration
                is paused.
        """
        gram, b, rr = system
        if len(b) == 0:
            raise Rejected  # fewer than two pairs
        if (cause := judge_system(gram, b, rr)) is not None:
            raise Rejected(cause)
        columns = self._clear_of_noise(gram, rr)
        if not columns:
            raise Rejected(Rejection.NOISE)
        if not self._ready:
            raise Rejected(Rejection.BACKOFF)
        return columns

    def _clear_of_noise(self, gram: Matrix, rr: float) -> list[int]:
        """The columns that stand out of the noise; none where the residual does not."""
        columns, gate = list(range(len(gram))), self._config.noise_gate
        if gate is None:
            return columns
        measured = self.noise.measurement
        by_gradients = measured is not None
        self.noise_known = True
        if measured is None:
            guess = variance_from_history(gram)
            if guess is None:  # it is too early to say, and unknown noise is too much
                self.noise.stays_open(False)
                self.noise_known = False
                return []
            measured = guess, rr
        variance, squared = measured
        if self._config.residual == "gradient":
            squared = rr
        # A guess is a median already. Columns are judged by what was measured now: when steps are
        # short they are small beside r, and one bad measurement would keep them out for long.
        steadied = self.noise.steadied(variance, squared) if by_gradients else variance
        self._stats.note_noise(steadied, squared, gate)
        opens = stands_out(squared, steadied, gate)
        if not by_gradients:
            opens = self.noise.stays_open(opens)
        if not opens:
            return []
        if by_gradients and self._config.residual != "gradient":
            return columns  # columns are in other units than the noise
        return [i for i in columns if gram[i, i] > 2.0 * gate * variance]

    # After the update

    def check_update(self, slope: float) -> None:
        """Judges an update by slope = <w+ - w, r>.

        Raises:
            Rejected: it is not finite, or points uphill.
        """
        cause = judge_update(slope, self._config.safeguard)
        self.backoff.judged_by_descent(cause is Rejection.DESCENT)
        if cause is not None:
            raise Rejected(cause)

    def keep_base_step(self, problem: FixedPoint, norm: float, always: bool) -> None:
        """Keeps what a trial goes back to, before the point is published.

        Collective with safeguard="loss".

        Args:
            problem: at the weights of the base step.
            norm: ||r|| of this step.
            always: even if nothing is on trial.
        """
        safeguard = self._config.safeguard
        trial = safeguard in ("residual", "loss") or self.losses.observed
        if not trial and not always:
            return
        base_rows = problem.read(*self._shard.rows, self.base_rows())
        if safeguard == "residual":
            self.trial = Trial(base_rows, problem.snapshot(), norm)
        if safeguard == "loss":
            self._base_loss = self._mean_loss(problem)

    def start_trial(self, problem: FixedPoint, spreads: float) -> None:
        """Puts the published point on trial; with safeguard="loss" it is judged now.

        Args:
            problem: at the published point.
            spreads: see `LossCheck.start_trial`.

        Raises:
            Rejected: its loss is higher. The base step is in place again.
        """
        if self._config.safeguard == "loss":
            cause = judge_loss(self._base_loss, self._mean_loss(problem))
            if cause is not None:
                self._shard.publish(problem, self.base_rows())
                raise Rejected(cause)
        if self.losses.observed:
            self.losses.start_trial(self.base_rows(), spreads)

    # One step later

    def settle_loss_trial(
        self, problem: FixedPoint, same_problem: bool, pauses: bool
    ) -> Tensor | None:
        """Judges the last accelerated step by the losses now, and goes back if it was bad.

        Collective.

        Args:
            problem: at the point on trial.
            same_problem: whether it is still the problem of the trial.
            pauses: whether acceleration pauses after a rejection.

        Returns:
            The rows that this rank went back to, None if the point stays.
        """
        with plain_numerics(problem.device), self._stats.timed("safeguard"):
            if not same_problem:
                self.losses.drop_trial()
            sums = self._collectives.loss_verdict(self.losses.verdict_payload())
            rejected, base_rows = self.losses.verdict(sums, self._collectives.size)
            if rejected is not None and pauses:
                self.backoff.judged_by_loss(rejected)
            if base_rows is None:
                return None
            self._shard.publish(problem, base_rows)
            self.trial = None  # of the same step
            self._stats.rejected[Rejection.LOSS.value] += 1
            return base_rows

    def settle_residual_trial(self, problem: FixedPoint, r: Tensor) -> Tensor | None:
        """Judges the last accelerated step by the residual now, and goes back if it was bad.

        The paper's Algorithm 1, lines 19 to 24. Collective.

        Args:
            problem: after the base step from the point on trial.
            r: its residual, [rows].

        Returns:
            The rows that this rank went back to, None if the point stays.
        """
        trial, self.trial = self.trial, None
        with self._stats.timed("safeguard"):
            partial = float(chunked_dot(r, r, self._shard.sharding.counted))
            values = np.array([partial, trial is not None])
            squared, trials = self._collectives.residual_verdict(values)
            if trial is None or trials < self._collectives.size:
                return None  # nothing to judge, or not on all ranks
            if judge_residual(trial.norm, math.sqrt(squared)) is None:
                return None
            self._shard.publish(problem, trial.base_rows)
            problem.restore(trial.undo)
            self._stats.rejected[Rejection.RESIDUAL.value] += 1
            return trial.base_rows

    def _mean_loss(self, problem: FixedPoint) -> float:
        with self._stats.timed("safeguard"):
            loss = self._collectives.closure_loss(np.array([problem.loss()]))
            return float(loss[0]) / self._collectives.size


def judge_system(gram: Matrix, b: Vector, rr: float) -> Rejection | None:
    """Why there is no least-squares problem to solve; None: there is one."""
    if not (np.isfinite(gram).all() and np.isfinite(b).all() and math.isfinite(rr)):
        return Rejection.NONFINITE
    if rr == 0.0 or not gram.any():
        return Rejection.DEGENERATE
    return None


def judge_update(slope: float, safeguard: str) -> Rejection | None:
    """Why an update is rejected; slope is <w+ - w, r>, r being minus a gradient."""
    if not math.isfinite(slope):
        return Rejection.NONFINITE
    if safeguard == "descent" and slope <= 0.0:
        return Rejection.DESCENT
    return None


def judge_loss(base: float, accelerated: float) -> Rejection | None:
    """Why a point is no better than the base optimizer's, by their losses; NaN is no better."""
    return None if accelerated <= base else Rejection.LOSS


def judge_residual(before: float, after: float) -> Rejection | None:
    """The paper's criterion: the norm of the residual must fall. NaN has not fallen."""
    return None if after < before else Rejection.RESIDUAL


def _on_host(value: Any) -> Any:
    """A copy in host memory of nested dicts of tensors and plain types."""
    if isinstance(value, dict):
        return {key: _on_host(entry) for key, entry in value.items()}
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
