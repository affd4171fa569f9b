"""The learning rate as a pure function of the step, without a state to save."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUPS = ("constant", "linear")
DECAYS = ("step", "cosine", "none")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up and decay of the learning rate.

    The paper's for ResNet50 on 1,536 ranks is 0.05 for 5 epochs, then 1.96, divided by 10 at the
    epochs 30, 60 and 80 of 90:
    ``Schedule(peak=1.96, warmup_lr=0.05, warmup_epochs=5, milestones=(30, 60, 80), ...)``.

    Attributes:
        peak: Learning rate after the warm-up.
        epochs: Length of the training in epochs.
        steps_per_epoch: Optimizer steps in an epoch.
        warmup: "constant", the paper's: `warmup_lr` until the warm-up ends; "linear": from
            `warmup_lr` up to `peak` in equal steps.
        warmup_lr: Learning rate at the start of the warm-up.
        warmup_epochs: Length of the warm-up in epochs; may be a fraction.
        decay: "step": times `factor` at each of the `milestones`; "cosine": down to 0 at the end;
            "none".
        milestones: Numbers of epochs after which the rate is multiplied by `factor`.
        factor: See `decay`.
    """

    peak: float
    epochs: int
    steps_per_epoch: int
    warmup: str = "constant"
    warmup_lr: float = 0.05
    warmup_epochs: float = 0
    decay: str = "step"
    milestones: tuple[float, ...] = ()
    factor: float = 0.1

    def learning_rate(self, step: int) -> float:
        """The learning rate of the given optimizer step of the whole training, from 0."""
        warmup_steps = round(self.warmup_epochs * self.steps_per_epoch)
        if step < warmup_steps:
            if self.warmup == "constant":
                return self.warmup_lr
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / warmup_steps
        if self.decay == "step":
            passed = sum(step >= round(epoch * self.steps_per_epoch) for epoch in self.milestones)
            return self.peak * self.factor**passed
        if self.decay == "cosine":
            length = max(1, self.epochs * self.steps_per_epoch - warmup_steps)
            return self.peak * (1 + math.cos(math.pi * (step - warmup_steps) / length)) / 2
        return self.peak
