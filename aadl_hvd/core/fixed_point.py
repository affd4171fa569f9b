"""What the algorithm needs to know of an optimizer: a fixed-point iteration w <- G(w)."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Deviations:
    """How the samples of one gradient deviate from their mean.

    Attributes:
        values: [samples, coordinates]; the squared norm of a row estimates that of all n.
        squared: the square of the mean's norm, estimated in the same way; [].
        rows: the square over all rows of the mean that this rank has read; [], or None: `squared`
            is exact, or nothing was read.
    """

    values: Tensor
    squared: Tensor
    rows: Tensor | None = None


class FixedPoint(Protocol):
    """The iteration to accelerate.

    Rows [lo, hi) are those of the flat vector w [n]. All tensors are on `device`.
    """

    @property
    def config_lines(self) -> list[str]:
        """The settings that decide where the base optimizer goes, to be compared over ranks."""

    @property
    def signature(self) -> Hashable:
        """What iterates and gradients depend on. The history is reset when it changes."""

    def unchanged(self, signature: Hashable, lo: int, hi: int) -> bool:
        """Whether a short look finds the problem as it was when `signature` was asked for last.

        It does not see everything. So `signature` has to be asked again some steps later.

        Args:
            signature: that of the problem which is meant.
            lo: first row that is looked at.
            hi: row after the last.
        """

    @property
    def decays(self) -> tuple[float, ...]:
        """The weight decay of each parameter group: what r depends on beside `signature`."""

    @property
    def n(self) -> int:
        """Length of the flat vector w."""

    @property
    def dtype(self) -> torch.dtype:
        """Widest dtype among the parts of w."""

    @property
    def device(self) -> torch.device:
        """The device of w."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that w consists of, in order."""

    @property
    def sharded(self) -> bool:
        """Whether w is only this rank's part of the weights, and each rank has another one."""

    @property
    def replicated(self) -> list[Tensor]:
        """Where w is a part: tensors that each rank holds whole. They are part of w on one rank."""

    @property
    def leads(self) -> bool:
        """Whether the replicated tensors of this rank are those that the others get."""

    @property
    def sizes(self) -> list[int]:
        """How many numbers each of `tensors` has; where w is a part, on all ranks together."""

    @property
    def momentum(self) -> float:
        """mu, the factor by which the base optimizer remembers gradients; the groups' largest."""

    @property
    def scale_free(self) -> bool:
        """Whether a step does not depend on the size of the gradient, so that M r is no step."""

    @property
    def moves(self) -> bool:
        """Whether the base optimizer goes anywhere: not every learning rate is 0."""

    def read_before(self, lo: int, hi: int, out: Tensor, residual: Tensor) -> Tensor:
        """Copies rows [lo, hi) of w to `out`, before `advance`.

        `advance` may use the memory of `residual`.
        """

    def forget_buffers(self) -> None:
        """Lets go of memory that `read_before` was given."""

    def advance(self) -> Any:
        """Takes one step of the base optimizer. The user gets its return value."""

    def read(self, lo: int, hi: int, out: Tensor) -> Tensor:
        """Copies rows [lo, hi) of the current weights to `out`."""

    def read_residual(
        self, lo: int, hi: int, w: Tensor, out: Tensor, decays: tuple[float, ...] | None
    ) -> Tensor:
        """Copies rows [lo, hi) of r to `out`, after `advance`.

        Args:
            lo: first row.
            hi: row after the last.
            w: these rows from before `advance`.
            out: [hi - lo].
            decays: the weight decays in r, as in `decays`; None: r is minus the gradient alone.
        """

    def decay(self, lo: int, hi: int) -> float | Tensor:
        """D, by which weight decay enters r = -(g + D w): one number, or rows [lo, hi) of it."""

    def scaling(self, lo: int, hi: int) -> float | Tensor:
        """The diagonal of M: one number, or rows [lo, hi) of it."""

    @property
    def uniform_scaling(self) -> float | None:
        """M where it is one number that costs nothing to know, else None."""

    def deviations(self) -> Deviations | None:
        """How the gradient samples of this step deviate from their mean, after `advance`."""

    def skip(self) -> Any:
        """Ends a step without an update. The user gets its return value."""

    def add(self, flat: Tensor) -> None:
        """Adds a vector [n] to the weights, computed in its dtype: float32 or float64."""

    def write(self, flat: Tensor, lo: int = 0) -> None:
        """Sets rows [lo, lo + k) of the weights from `flat` [k]. Rows beyond n are ignored."""

    def followed(self) -> AbstractContextManager[None]:
        """Within it weights are replaced. What the base optimizer remembers of them moves along."""

    def snapshot(self) -> Any:
        """A copy of the base optimizer's state for `restore`: plain types and tensors."""

    def restore(self, undo: Any) -> None:
        """Puts back the state that `snapshot` returned. The snapshot is used up."""

    def state_tensors(self) -> list[Tensor]:
        """The base optimizer's state, in an order that is the same on all ranks.

        The caller may write to it until the step ends.
        """

    def loss(self) -> float:
        """Evaluates this rank's loss at the current weights."""


def work_dtype(problem: FixedPoint) -> torch.dtype:
    """The dtype of pairs and products: no narrower than any weight."""
    return torch.float64 if problem.dtype == torch.float64 else torch.float32
