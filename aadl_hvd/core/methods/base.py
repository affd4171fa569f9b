"""The protocol of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aadl_hvd.core.gram import Gram
from aadl_hvd.core.history import History
from aadl_hvd.core.reduction import Payload
from aadl_hvd.core.solve import System


class Method(Protocol):
    """Keeps a history of the iteration and proposes points, the same on every rank.

    The calls of an acceleration step, in order: `note`, `payload` in the reduction, `system`,
    `propose`. Vectors are this rank's rows, [rows].

    Attributes:
        history: what was noted, this rank's shard of it.
        gram: products of the history.
    """

    history: History
    gram: Gram

    @property
    def nbytes(self) -> int:
        """Bytes of history allocated on this rank."""

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r."""

    def note(self, w: Tensor, r: Tensor, scaling: float | None) -> None:
        """Stores a pair of one step.

        Args:
            w: iterate.
            r: its residual.
            scaling: the diagonal of M where it is one number, else None.
        """

    def payload(self, r: Tensor, stored: bool) -> Payload:
        """What the reduction of this step carries; stored: whether r was noted last of all."""

    def system(self) -> System | None:
        """After the reduction; None, on every rank, if ranks have not noted the same pairs."""

    def propose(
        self, columns: Sequence[int], w: Tensor, r: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, float]:
        """The update of this rank, and the slope <w+ - w, r> over all ranks. Collective.

        Args:
            columns: those to use, counted from the oldest.
            w: iterate.
            r: its residual.
            scaling: the diagonal of M: a number, or [rows].

        Returns:
            What `WeightShard.complete` makes the new rows of.
        """

    def drop_older_half(self) -> None:
        """Forgets the older half of the columns."""

    def use_kernels(self, able: bool) -> bool:
        """Has `kernels` do the work where they can; able: whether all ranks are.

        Returns:
            Whether they do, the same on every rank.
        """

    def reset(self) -> None:
        """Forgets everything. The memory stays allocated."""
