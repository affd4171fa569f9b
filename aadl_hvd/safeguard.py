"""Decisions about accelerated points, each with its cause. Pure: the numbers come from outside."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from aadl_hvd.solve import Matrix, Vector


class Rejection(enum.Enum):
    """Why an attempt left the base optimizer's step in place."""

    NONFINITE = "nonfinite"  # NaN or Inf in weights, residual or history: look at the base's lr
    DEGENERATE = "degenerate"  # zero residual, or no independent column: converged, or q too small
    DESCENT = "descent"  # <w+ - w, r> <= 0: near a saddle, or the history is too old: lower m
    RESIDUAL = "residual"  # the norm of the next residual did not fall: lower beta
    LOSS = "loss"  # the closure was higher than at the base step: lower beta, raise p


class Restart(enum.Enum):
    """Why the history was forgotten."""

    NONFINITE = "nonfinite"
    CHANGED = "changed"  # parameters, dtypes, devices, or the ratio of the groups' learning rates
    DESYNCHRONIZED = "desynchronized"  # ranks had not stored the same: one loaded a checkpoint
    LOADED = "loaded"  # load_state_dict
    REQUESTED = "requested"  # restart() was called


@dataclasses.dataclass
class Trial:
    """An accelerated step that the next residual has yet to confirm (Algorithm 1, line 20).

    Attributes:
        base_rows: this rank's block of the weights the base optimizer had reached, [rows].
        restore: puts the base optimizer's state back to what it was then.
        norm: ||r^k|| of the step that was accelerated, in units of the learning rate.
    """

    base_rows: Tensor
    restore: Callable[[], None]
    norm: float


def judge_system(gram: Matrix, b: Vector, rr: float) -> Rejection | None:
    """Whether there is a least-squares problem to solve at all."""
    if not (np.isfinite(gram).all() and np.isfinite(b).all() and math.isfinite(rr)):
        return Rejection.NONFINITE
    if rr == 0.0 or not gram.any():
        return Rejection.DEGENERATE
    return None


def judge_update(slope: float, safeguard: str) -> Rejection | None:
    """Whether the update points downhill; slope is <w+ - w, r>, r being minus a gradient."""
    if not math.isfinite(slope):
        return Rejection.NONFINITE
    if safeguard == "descent" and slope <= 0.0:
        return Rejection.DESCENT
    return None


def judge_loss(base: float, accelerated: float) -> Rejection | None:
    """Whether the accelerated point is as good as the base optimizer's; NaN is not."""
    return None if accelerated <= base else Rejection.LOSS


def judge_residual(before: float, after: float) -> Rejection | None:
    """The paper's criterion: the norm of the residual must fall; NaN has not fallen."""
    return None if after < before else Rejection.RESIDUAL
