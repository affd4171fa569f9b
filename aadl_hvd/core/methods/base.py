"""The protocol of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aadl_hvd.core.fixed_point import FixedPoint
from aadl_hvd.core.reduction import Payload
from aadl_hvd.stats import Rejection


class Method(Protocol):
    """Keeps a history of the iteration and proposes points, the same on every rank.

    The calls of an acceleration step, in order: `note`, `payloads` in the reduction, `same` and
    `finite`, `propose`, `complete`. Vectors are this rank's rows, [rows].

    Attributes:
        keeps_base_step: whether the base step before an accelerated point is needed later.
        decayed: whether its residuals contain the weight decay.
        loss_spreads: how far the next loss may rise, in standard deviations of a difference.
    """

    keeps_base_step: bool
    decayed: bool
    loss_spreads: float

    @property
    def fingerprint(self) -> int:
        """Of a loaded history that this rank has yet to go on from; 0: there is none."""

    @fingerprint.setter
    def fingerprint(self, fingerprint: int) -> None: ...

    @property
    def nbytes(self) -> int:
        """Bytes of history allocated on this rank."""

    @property
    def columns(self) -> int:
        """How many columns the history holds now."""

    @property
    def same(self) -> bool:
        """After the reduction: whether all ranks have noted the same."""

    @property
    def finite(self) -> bool:
        """After the reduction: whether what was measured is finite on all ranks."""

    @property
    def norm(self) -> float:
        """After the reduction: the norm of the residual."""

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r."""

    def note(self, w: Tensor, r: Tensor, problem: FixedPoint) -> None:
        """Takes in a step that its schedule says to store.

        Args:
            w: iterate.
            r: its residual.
            problem: after the base step.
        """

    def payloads(self, problem: FixedPoint, r: Tensor, stored: bool) -> Sequence[Payload]:
        """What the reduction of this step carries; stored: whether r was noted last of all."""

    def propose(self, problem: FixedPoint, w: Tensor, r: Tensor) -> Tensor:
        """What `complete` makes the accelerated point of. Collective.

        Raises:
            Rejected: on every rank; the base step stays.
        """

    def complete(self, w: Tensor, proposal: Tensor) -> Tensor:
        """This rank's rows of the accelerated point. May be collective."""

    def rejected(self, cause: Rejection) -> None:
        """What follows for the history from a rejection in this step."""

    def went_back(self) -> None:
        """What follows from a rejection one step later, by the loss."""

    def use_kernels(self, able: bool) -> bool:
        """Has `kernels` do the work where they can; able: whether all ranks are.

        Returns:
            Whether they do, the same on every rank.
        """

    def reset(self) -> None:
        """Forgets everything. The memory stays allocated."""

    def release(self) -> None:
        """Forgets everything, and frees the memory."""

    def restart_generation(self) -> None:
        """Counts resets from 0 again, on all ranks."""
