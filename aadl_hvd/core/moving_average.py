"""The paper's moving average of the iterates, on one rank's rows (Eq. 11, 15 and 16).

It replaces the weights, and training goes on from it. The running averages of `averages` are for
evaluation only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadl_hvd.checkpoint.shard_state import WindowState
from aadl_hvd.core.chunking import chunks


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
        """Whether t iterates have been stored. Nothing is averaged before that."""
        return self._pushed >= self._iterates.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        return self._iterates.numel() * self._iterates.element_size()

    def clear(self) -> None:
        """Forgets all iterates."""
        self._pushed = 0

    def push(self, w: Tensor) -> None:
        """Stores an iterate, [rows], in place of the oldest one."""
        self._iterates[self._pushed % self._iterates.shape[0]].copy_(w)
        self._pushed += 1

    def replace_last(self, w: Tensor) -> None:
        """Puts `w` [rows] in place of the newest iterate: the sequence goes on from there."""
        self._iterates[(self._pushed - 1) % self._iterates.shape[0]].copy_(w)

    def state(self) -> WindowState:
        """The number of iterates pushed and those still stored, from the oldest, on the host."""
        window = self._iterates.shape[0]
        indices = [i % window for i in range(max(0, self._pushed - window), self._pushed)]
        return WindowState(pushed=self._pushed, iterates=self._iterates[indices].cpu())

    def load_state(self, state: WindowState) -> None:
        """Loads what `state` returned. Its window may have another length."""
        window = self._iterates.shape[0]
        newest = state.iterates[-window:]
        # They keep their index in the ring, because the order of a sum decides its last bit.
        self._pushed = state.pushed if len(newest) == window else len(newest)
        for i, w in enumerate(newest, self._pushed - len(newest)):
            self._iterates[i % window].copy_(w)

    def mean(self) -> Tensor:
        """The mean of the last t iterates, [rows] (Eq. 11)."""
        return self._iterates.mean(dim=0)

    def spread(self) -> Tensor:
        """max over this rank's rows of sqrt(S) (Eq. 15), a tensor []; 0 if there are no rows.

        S is computed as the mean of squared deviations. That equals Eq. 15, but nothing cancels.
        """
        if self._iterates.shape[1] == 0:
            return self._iterates.new_zeros(())
        largest = []
        for rows in chunks(self._iterates[0]):  # torch.var took 100 times as long
            window = self._iterates[:, rows]
            largest.append((window - window.mean(dim=0)).square_().mean(dim=0).max())
        return torch.stack(largest).max().sqrt()
