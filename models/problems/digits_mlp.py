"""A tanh MLP on scikit-learn's handwritten digits, with a full batch and with smaller ones."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.problems.base import Supervised, make_optimizer, mlp, seeded

TRAIN_IMAGES = 1497
RATES = {"sgd": 0.5, "nesterov": 0.1, "adam": 2e-3, "neumann": 0.1}


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.data / 16).float()
    return pixels, torch.from_numpy(digits.target).long()


def split_digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draws 1,497 digits for training and 300 for validation by `seed`.

    Returns:
        (pixels float32 [N, 64] in 0..1, labels int64 [N]) of either part.
    """
    pixels, labels = _digits()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, validation = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return (pixels[train], labels[train]), (pixels[validation], labels[validation])


class DigitsMLP(Supervised):
    """64-64-64-10 tanh MLP, cross-entropy, weight decay 1e-4 in the optimizer, 400 steps.

    Args:
        optimizer: "sgd", "nesterov" (momentum 0.9), "adam" or "neumann".
        batch: items in a global batch; None: all 1,497.
        lr: learning rate; None takes it from `RATES`.
        steps: steps of the base optimizer.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    def __init__(
        self,
        *,
        optimizer: str = "nesterov",
        batch: int | None = None,
        lr: float | None = None,
        steps: int = 400,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(*split_digits(seed), batch=batch, seed=seed, rank=rank, ranks=ranks)
        self.optimizer, self.lr, self.steps = optimizer, lr or RATES[optimizer], steps

    def make_model(self) -> nn.Module:
        with seeded(self.seed):
            return mlp([64, 64, 64, 10], nn.Tanh)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(
            self.optimizer,
            model,
            self.lr,
            weight_decay=1e-4,
            steps_per_epoch=TRAIN_IMAGES // self.batch,
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")
