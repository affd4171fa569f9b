"""Running averages of the weights, beside a training and without an effect on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

DECAYS = {"ema0.9": 0.9, "ema0.99": 0.99}
"""Decay factors a step of the exponential averages, by name."""
QUARTER = "quarter"
"""Name of the plain mean over the last quarter of the steps."""
NAMES = (*DECAYS, QUARTER)


class Averages:
    """Averages of a model's weights after each step.

    An exponential average is the plain mean until it has seen 1/(1 - decay) steps. So it forgets
    the first weights.

    Args:
        model: the weights are read, and lent to in `lent`.
        steps: steps of the whole training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._weights: list[Tensor] = list(model.parameters())
        self._means: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(w) for w in self._weights] for name in NAMES
        }
        self._taken, self._quarter = 0, steps - max(1, steps // 4)

    @torch.no_grad()
    def take(self) -> None:
        """Takes in the present weights. Call it after each step."""
        self._taken += 1
        for name, mean in self._means.items():
            share = 1.0 / max(1, self._taken - self._quarter)
            if name in DECAYS:
                share = max(1.0 - DECAYS[name], 1.0 / self._taken)
            torch._foreach_lerp_(mean, self._weights, share)

    @contextlib.contextmanager
    def lent(self, name: str) -> Iterator[None]:
        """Inside, the model has an average as its weights. Afterwards it has its own, bit for bit.

        Before the last quarter begins its mean is the present weights.
        """
        own = [w.detach().clone() for w in self._weights]
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._means[name])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, own)
