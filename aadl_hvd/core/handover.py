"""Which method is at work, and in which steps.

The residual-norm method begins. Where its noise gate stays shut, the subspace method takes over.
The other one then costs nothing. It is tried again where the gradients of a block show less noise.

All depends on the number of the step and on results of reductions, which are the same on all ranks.
"""

from __future__ import annotations

import math

from aadl_hvd.checkpoint.subspace_state import HandoverState
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.schedule import Schedule
from aadl_hvd.stats import Rejection


class Handover:
    """Decides between the methods.

    Attributes:
        subspace: whether the subspace method is at work; else the residual-norm method.
        length: L, steps in a block of the subspace method.
        late: whether the next step adds the jump of the last one. The block begins after it.
    """

    SHORTEST = 10  # steps in a block
    LONGEST = 1000
    PATIENCE = 8  # attempts without a point for the noise, before the other method begins
    WAITS = 32, 256  # steps until the gate is tried again, first and at most
    IDLE = 16  # blocks in a row without a jump, after which one block in so many is looked at

    def __init__(self, config: AndersonConfig) -> None:
        self._config = config
        self.subspace = config.method == "subspace"
        self.length = self.SHORTEST
        self.late = False
        self._begin = config.warmup_steps  # the block has the steps after this one
        self._idle = self._refused = 0
        self._wait, self._again = self.WAITS[0], 0
        self._since = config.warmup_steps  # the residual-norm method is at work since this step

    def schedule(self, calls: int) -> Schedule | None:
        """What step number `calls` does; None: the base optimizer's step alone."""
        if not self.subspace:
            return Schedule.of(self._config, calls)
        into, p = calls - self._begin, self._config.frequency
        push = p if calls % p == 0 else 0
        if self.late:
            return Schedule(False, False, False, False, push, add=True)
        if into >= 1:
            return Schedule(True, into >= self.length, False, False, push, 1 < into < self.length)
        if calls <= self._config.warmup_steps or into % self.length or not self._config.averages:
            return None
        return Schedule(False, False, False, False, self.length)  # asleep: once a block

    @property
    def asleep(self) -> bool:
        """Whether the subspace method looks at one block in `IDLE` only."""
        return self.subspace and self._idle >= self.IDLE

    @property
    def gap(self) -> int:
        """Blocks since the one before, where the method slept in between; else 1."""
        return self.IDLE if self._idle > self.IDLE else 1

    def attempted(
        self, cause: Rejection | None, accelerated: bool, calls: int, known: bool = True
    ) -> bool:
        """Notes an acceleration step of the residual-norm method.

        Args:
            cause: why it was rejected; None: too few pairs.
            accelerated: whether it was not.
            calls: its number.
            known: whether the noise was measured, and not just too early to guess.

        Returns:
            Whether the subspace method is at work from now on.
        """
        config = self._config
        if not config.hands_over:
            return False
        # Too few pairs where there could be some: weight decay that changes in every step resets.
        early = calls - self._since <= 4 * config.store_every + config.frequency
        if accelerated:
            self._refused, self._wait = 0, self.WAITS[0]
        elif (cause is Rejection.NOISE and known) or (
            cause in (Rejection.NOISE, None) and not early
        ):
            self._refused += 1
        if self._refused < self.PATIENCE:
            return False
        self.subspace, self._refused, self._idle = True, 0, 0
        self._begin, self._again = calls, calls + self._wait
        self._wait = min(2 * self._wait, self.WAITS[1])
        return True

    def hands_back(self, noise: float, squared: float) -> bool:
        """Whether the residual-norm method is at work after the block that ends now.

        Args:
            noise: variance of one step's gradient, summed over coordinates; NaN: unknown.
            squared: square of the norm of the block's mean gradient.
        """
        gate = self._config.noise_gate
        if not self._config.hands_over or gate is None or self._begin + self.length < self._again:
            return False
        return math.isfinite(noise) and squared > (1.0 + gate) * noise

    def block_ended(
        self,
        calls: int,
        wanted: int,
        jumped: bool,
        noise: float,
        squared: float,
        late: bool = False,
    ) -> bool:
        """Notes the end of a block.

        Args:
            calls: number of its last step.
            wanted: L of the next block.
            jumped: whether a jump was made.
            noise: see `hands_back`.
            squared: see `hands_back`.
            late: whether the jump is added in the next step.

        Returns:
            Whether the residual-norm method is at work from now on.
        """
        changes = not jumped and self.hands_back(noise, squared)
        self._idle = 0 if jumped else self._idle + 1
        self.length = min(max(wanted, self.SHORTEST), self.LONGEST)
        self.late, self._begin = late, calls + late
        if self._idle > self.IDLE:
            self._begin += (self.IDLE - 1) * self.length
        if changes:
            self.subspace, self._since = False, calls
        return changes

    def state(self, calls: int) -> HandoverState:
        """All it knows after step number `calls`."""
        return HandoverState(
            subspace=self.subspace,
            refused=self._refused,
            wait=self._wait,
            left=self._again - calls,
            since=calls - self._since,
            into=calls - self._begin,
            length=self.length,
            idle=self._idle,
            late=self.late,
        )

    def load_state(self, state: HandoverState, calls: int, continues: bool = True) -> None:
        """Loads what `state` returned, after step number `calls` here.

        Args:
            state: see `state`.
            calls: number of the last step.
            continues: as if the run had not been interrupted; else no jump is added late.
        """
        if self._config.method == "auto":
            self.subspace = state.subspace and self._config.hands_over
        self._refused = min(state.refused, self.PATIENCE - 1)
        self._wait, self._idle = state.wait, state.idle
        self.late = state.late and self.subspace and continues
        self._again = calls + state.left
        self._begin = calls - state.into - (state.late and not self.late)
        self._since = calls - state.since
        self.length = state.length
