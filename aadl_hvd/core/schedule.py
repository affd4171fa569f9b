"""What a step does, by its number alone."""

from __future__ import annotations

from typing import NamedTuple

from aadl_hvd.config import AndersonConfig


class Schedule(NamedTuple):
    """A step that is more than one of the base optimizer.

    Attributes:
        store: a pair (w, r) is stored: k mod q = 0.
        accelerate: k mod p = 0 (paper, Eq. 8).
        confirm: safeguard="residual" judges the acceleration step before this one.
        average: the paper's moving average takes in this step.
        push: the running averages take in this step before any reduction, so many steps after the
            last time; 0: they do not.
        within: within a block, and not its first or last step: a short look is enough to see that
            the problem is the same, see `FixedPoint.unchanged`.
        add: the jump of the step before is added after the base step: `overlap`.
    """

    store: bool
    accelerate: bool
    confirm: bool
    average: bool
    push: int = 0
    within: bool = False
    add: bool = False

    @staticmethod
    def of(config: AndersonConfig, calls: int) -> Schedule | None:
        """The schedule of step number `calls`, from 1; None: the base optimizer's step alone.

        k counts steps after the warm-up, from 1.
        """
        k, p = calls - config.warmup_steps, config.frequency
        if k < 1:
            return None
        store, accelerate = k % config.store_every == 0, k % p == 0
        confirm = config.safeguard == "residual" and k >= 2 and (k - 1) % p == 0
        average = config.average_window is not None
        if not (store or accelerate or confirm or average):
            return None
        return Schedule(store, accelerate, confirm, average)


def measures_noise(config: AndersonConfig, calls: int) -> bool:
    """Whether step number `calls` needs the gradients before they are averaged over ranks.

    Only acceleration steps and the steps before them do.
    """
    k, p = calls - config.warmup_steps, config.frequency
    measuring = config.enabled and config.noise_gate is not None
    return measuring and k >= 0 and (k % p == 0 or (k + 1) % p == 0)
