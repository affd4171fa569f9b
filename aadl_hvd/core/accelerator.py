"""Anderson acceleration of a fixed-point iteration w <- G(w), its history shared by P ranks.

    r            residual, zero where G(w) = w
    W, R         differences of stored w and r, n x m
    w+           the accelerated point, which a method proposes (methods/)

Weights are replicated, bit for bit, unless a rank has only its part of them (FSDP2). The history is
not: each rank holds a shard of it. A step that neither stores nor accelerates costs nothing but
samples of the gradient where the next step accelerates.

Which collectives a step enters (collectives.py) depends on its number alone, until one of them has
told all ranks the same. So a rank whose state differs, because it alone has loaded a checkpoint,
hangs nobody: the history is reset on all ranks. A loaded history, and with it the number of the
step, is a pending history until a collective that all ranks enter anyhow has shown that all have
loaded the same one: see `agree`.

The paper's Eq. 8 prints (1 - beta) I - beta (W + R) ..., which contradicts its Eq. 4 and 6, and
Algorithm 1 stores where "k (mod q) != 0". Both are taken as misprints.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.core.acceptance import Rejected
from aadl_hvd.core.fixed_point import FixedPoint
from aadl_hvd.core.loss_check import check_loss
from aadl_hvd.core.numerics import no_graph, plain_numerics
from aadl_hvd.core.reduction import reduce_payloads
from aadl_hvd.core.schedule import Schedule, measures_noise
from aadl_hvd.core.solve import Vector
from aadl_hvd.core.state import AcceleratorState
from aadl_hvd.errors import UnsupportedError
from aadl_hvd.stats import Rejection, Reset


class Accelerator(AcceleratorState):
    """The algorithm on one rank: what happens in a step. See `AcceleratorState` for arguments."""

    def step(self, problem: FixedPoint) -> Any:
        """One step of the base optimizer, accelerated on every p-th. Collective on those steps.

        Returns:
            What `problem.advance()` returned.
        """
        self._stepping = True
        try:
            return self._step(problem)
        finally:
            self._stepping = False

    def _step(self, problem: FixedPoint) -> Any:
        """Everything around `_step_with_history`: a step of the base optimizer alone."""
        self.full_state = None
        if not self.config.enabled:
            self.stats.steps += 1
            return problem.advance()
        if not self.agreed:
            self.agree(problem)
        self.stats.steps += 1
        self._calls += 1  # not `steps`: that may come from a checkpoint, on one rank alone
        losses = self._acceptance.losses
        losses.next_step()
        if losses.verdict_due:
            same = problem.signature == self._signature
            subspace = self._handover.subspace
            if self._went_back(self._acceptance.settle_loss_trial(problem, same, not subspace)):
                self._method.went_back()
                return problem.skip()
        schedule = self._handover.schedule(self._calls)
        if schedule is not None:
            return self._step_with_history(problem, schedule)
        result = problem.advance()
        self._note_noise(problem)
        return result

    def _step_with_history(self, problem: FixedPoint, schedule: Schedule) -> Any:
        """The sequence of the algorithm."""
        stats, acceptance, replicas = self.stats, self._acceptance, self._replicas
        with no_graph(problem.device), stats.timed("read"):
            self._prepare(problem, schedule.within)
            shard, method, averages = self._shard, self._method, self._averages
            w, r = method.staging_buffer()
            w = problem.read_before(*shard.rows, w, r)  # read w
        result = problem.advance()  # base step
        with plain_numerics(problem.device):
            with stats.timed("read"):
                decays = self._decays if method.decayed else None
                r = problem.read_residual(*shard.rows, w, r, decays)  # read r
            if schedule.confirm and self._went_back(acceptance.settle_residual_trial(problem, r)):
                return result
            self._note_noise(problem)
            stored = schedule.store and problem.moves  # at learning rate 0 r says nothing
            if stored:
                with stats.timed("store"):
                    method.note(w, r, problem)  # store
            whole = self._decayed(problem, w, r) if schedule.push or schedule.accelerate else r
            if schedule.push:
                with stats.timed("average"):
                    averages.take(w, whole, schedule.push)
            if schedule.add:
                self._add_jump(problem)
            if schedule.accelerate:
                cause, accelerated, late = None, False, False
                try:
                    with stats.timed("gram"):  # one small reduction
                        reduce_payloads(
                            (
                                averages.of(w, whole, shard.sharding.counted),
                                replicas.of(problem),
                                *method.payloads(problem, r, stored),
                                acceptance.losses,
                            ),
                            *(self._collectives, stats, self._send),
                        )
                    if not replicas.equal:  # replicas equal?
                        self._reset_on_all()  # first: a warning may be an error (python -W error)
                        replicas.settle(problem, stats.steps)
                        raise Rejected
                    if not method.same:  # a rank has not stored the same
                        self._reset_on_all()
                        raise Rejected
                    if self._pending is not None:  # versions are equal: all ranks have it
                        self._load_pending(continues=False)
                        return result  # with what is at work in it from the next step on
                    if method.finite:
                        with stats.timed("average"):
                            self._note_gains(w, r)
                    proposal = method.propose(problem, w, r)  # which columns, solve, descent
                    late = self._delays(problem)
                    if late:
                        self._subspace.send_jump(proposal)  # the next step does the rest
                    else:
                        acceptance.keep_base_step(problem, method.norm, method.keeps_base_step)
                        rows = method.complete(w, proposal)  # update
                        shard.publish(problem, rows)  # publish
                        acceptance.start_trial(problem, method.loss_spreads)  # start a trial
                        stats.accelerated += 1
                    accelerated = True
                except Rejected as rejected:
                    cause = rejected.cause
                    self._note_rejection(cause)
                self._hand_over(problem, accelerated, cause, late)
            if schedule.average:
                self._average_weights(problem, r)
        return result

    def _delays(self, problem: FixedPoint) -> bool:
        """Whether a jump is added one step later, while its rows travel.

        Not where nothing travels (FSDP2), nor where the closure judges it in its own step.
        """
        config = self.config
        travels = self._handover.subspace and not problem.sharded
        return config.overlap and travels and config.safeguard != "loss"

    def _add_jump(self, problem: FixedPoint) -> None:
        """Adds the jump of the step before to what the base step of this one has reached."""
        acceptance, subspace = self._acceptance, self._subspace
        self._handover.late = False
        try:
            acceptance.keep_base_step(problem, subspace.norm, subspace.keeps_base_step)
            added = subspace.add_jump(problem)
            acceptance.start_trial(problem, subspace.loss_spreads)
            if added:
                self.stats.accelerated += 1
            else:  # the verdict is due on all ranks all the same
                acceptance.losses.drop_trial()
        except Rejected as rejected:  # a checkpoint was loaded into other settings
            self._note_rejection(rejected.cause)

    def _note_rejection(self, cause: Rejection | None) -> None:
        """Counts a rejection, and does to the history what follows from it."""
        if cause is None:
            return
        self.stats.rejected[cause.value] += 1
        self._method.rejected(cause)
        if cause is Rejection.NONFINITE:
            self.reset(Reset.NONFINITE)
            if self._handover.subspace:  # the averages have taken it in
                self._averages.clear()

    def _send(self, message: Vector) -> Vector:
        """The small reduction of the method at work. Collective."""
        if self._handover.subspace:
            return self._collectives.block(message)
        return self._collectives.reduction(message)

    def _hand_over(
        self, problem: FixedPoint, accelerated: bool, cause: Rejection | None, late: bool
    ) -> None:
        """Ends an acceleration step. The next ones may be another method's."""
        handover, method, subspace = self._handover, self._method, self._subspace
        if handover.subspace:
            seen = subspace.wanted, accelerated, subspace.noise, subspace.squared
            changed = handover.block_ended(self._calls, *seen, late)
        else:
            known = self._acceptance.noise_known
            changed = handover.attempted(cause, accelerated, self._calls, known)
        if changed:
            method.release()
            problem.forget_buffers()
            self._acceptance.noise.clear()
        self._note_method()

    def _note_noise(self, problem: FixedPoint) -> None:
        if self.config.noise_gate is not None and not self._handover.subspace:
            with self.stats.timed("noise"):
                self._acceptance.noise.note(problem.deviations(), self._calls)

    def _decayed(self, problem: FixedPoint, w: Tensor, r: Tensor) -> Tensor:
        """r with weight decay, as the averages need it with any method, [rows]."""
        whole = self._method.decayed or not self.config.averages
        decay = 0.0 if whole else problem.decay(*self._shard.rows)
        return torch.sub(r, decay * w) if isinstance(decay, Tensor) or decay else r

    def _note_gains(self, w: Tensor, r: Tensor) -> None:
        """Takes the gains of the averages in; with the residual-norm method the iterate, too."""
        averages = self._averages
        if not self._handover.subspace:
            averages.push(w, r, averages.summed)
        elif not np.isfinite(averages.summed).all():  # as after a NaN in a step asleep
            averages.clear()
        elif averages.count:
            averages.note_gains(averages.summed)

    def _went_back(self, base_rows: Tensor | None) -> bool:
        """Whether a trial ended at the base step, whose rows these are."""
        if base_rows is not None and self._moving_average is not None:
            self._moving_average.replace_last(base_rows)  # the rejected point was never there
        return base_rows is not None

    def _average_weights(self, problem: FixedPoint, r: Tensor) -> None:
        """Replaces the weights by their moving average unless Eq. 16 says they are calm."""
        average, shard = self._moving_average, self._shard
        assert average is not None
        with self.stats.timed("average"):
            average.push(problem.read(*shard.rows, shard.empty()))
            mixed = (r * problem.scaling(*shard.rows)).abs()
            largest = mixed.max() if r.numel() else r.new_zeros(())
            local = torch.stack([average.spread(), largest])
            values = np.append(local.double().cpu().numpy(), not average.full)
            spread, size, missing = self._collectives.average_spread(values)
            calm = spread < self.config.average_threshold * size
            if not missing and math.isfinite(spread) and not calm:
                mean = average.mean()
                average.replace_last(mean)
                shard.publish(problem, mean)
                self.stats.averaged += 1

    # Around a step

    @property
    def measures_noise(self) -> bool:
        """Whether the step needs the gradients one by one, before they are averaged over ranks.

        The step is the one that runs, in which a closure may be evaluated, or else the next one.
        """
        if self._handover.subspace:
            return False
        calls = self._calls
        if self._pending is not None and not self.agreed:  # what the next step will go by
            calls = self._pending.calls
        return measures_noise(self.config, calls + (not self._stepping))

    def observe(self, loss: float | Tensor) -> None:
        """Notes this rank's loss at the weights that the next step starts from.

        Raises:
            ConfigError: not one number.
            UnsupportedError: called while a step runs.
        """
        if self._stepping:
            raise UnsupportedError(
                "Invalid observe() while step() runs, as in a closure: it is about the step to "
                "come. Call it before step(), or use safeguard='loss', which asks the closure."
            )
        check_loss(loss)
        if self.config.enabled:
            self._acceptance.losses.observe(loss)

    # Averages for evaluation

    @property
    def average_gains(self) -> dict[float, float]:
        """What the loss would fall by at each of the running averages, as measured; NaN: unknown.

        By the trapezoidal rule over gradients, see `WeightAverages`. Measured for
        residual="gradient" only.
        """
        gains = self._averages.gains
        return gains if self.config.residual == "gradient" else dict.fromkeys(gains, math.nan)

    def best_average(self) -> float | None:
        """The average with the largest measured gain; None if none promises any. Collective.

        Gains are the same on every rank. If one rank has loaded a checkpoint since, they are
        unknown on all.
        """
        gains = np.array(list(self.average_gains.values()))
        known = np.isfinite(gains)
        sums = self.mean_over_ranks(np.concatenate([np.where(known, gains, 0.0), known]))
        gains, known = sums[: len(gains)], sums[len(gains) :] == 1.0
        promising = np.where(known, gains, 0.0)
        if not (promising > 0.0).any():
            return None
        return self.config.averages[int(promising.argmax())]

    def put_average(self, problem: FixedPoint, decay: float) -> bool:
        """Puts one of the running averages into the weights. Collective.

        Returns:
            Whether there is one: False, on every rank, if a rank has none.
        """
        with plain_numerics(problem.device):
            kept = self.config.enabled and problem.signature == self._signature
            rows = self._averages.mean(decay) if kept else None
            if self.mean_over_ranks(np.array([float(rows is not None)]))[0] < 1.0:
                return False
            assert rows is not None
            self._shard.show(problem, rows)
            return True

    def mean_over_ranks(self, values: Vector) -> Vector:
        """Mean of a small vector over the ranks that train together. Collective."""
        return self._collectives.mean(values)
