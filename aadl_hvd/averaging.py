"""The paper's moving average of the weights and its adaptive criterion, on one rank's rows."""

from __future__ import annotations

import torch
from torch import Tensor


class MovingAverage:
    """The last t iterates (Eq. 11), in a ring buffer of t * rows numbers.

    Args:
        window: t, at least 2.
        rows: number of rows of this rank.
        dtype: float32 or float64.
        device: where the parameters are.
    """

    def __init__(self, window: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._iterates = torch.zeros((window, rows), dtype=dtype, device=device)
        self._pushed = 0

    @property
    def full(self) -> bool:
        """Whether t iterates have been seen: before that, nothing is averaged."""
        return self._pushed >= self._iterates.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        return self._iterates.numel() * self._iterates.element_size()

    def clear(self) -> None:
        """Forgets all iterates."""
        self._pushed = 0

    def push(self, w: Tensor) -> None:
        """Adds an iterate [rows]; the oldest one leaves."""
        self._iterates[self._pushed % self._iterates.shape[0]].copy_(w)
        self._pushed += 1

    def replace_last(self, w: Tensor) -> None:
        """Puts `w` in place of the newest iterate (the sequence goes on from the average)."""
        self._iterates[(self._pushed - 1) % self._iterates.shape[0]].copy_(w)

    def mean(self) -> Tensor:
        """The average of the window, [rows] (Eq. 11)."""
        return self._iterates.mean(dim=0)

    def spread(self) -> Tensor:
        """max over this rank's rows of sqrt(S) (Eq. 15), a tensor []; 0 where there are no rows.

        S is computed as the mean of squared deviations: equal to Eq. 15, without its cancellation.
        """
        if self._iterates.shape[1] == 0:
            return self._iterates.new_zeros(())
        return self._iterates.var(dim=0, correction=0).max().sqrt()
