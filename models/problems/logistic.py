"""Two convex problems: logistic regression on tumours, softmax regression on digits."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.problems.base import Supervised, make_optimizer, seeded
from models.problems.digits_mlp import split_digits

CANCER_RATES = {"sgd": 0.5, "nesterov": 0.1}
TRAINING_PART = 0.8


@functools.cache
def _cancer() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return data.data, data.target


class _TwoClasses(nn.Linear):
    """Logits (0, w.x + b)."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


class LogisticCancer(Supervised):
    """Logistic regression on scikit-learn's breast cancer data, 455 tumours of 569, full batch.

    The 30 features are standardised by the training part's mean and deviation.

    Args:
        optimizer: "sgd" (lr 0.5) or "nesterov" (lr 0.1, momentum 0.9).
        steps: steps of the base optimizer.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    def __init__(
        self,
        *,
        optimizer: str = "nesterov",
        steps: int = 400,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        inputs, targets = _cancer()
        order = np.random.default_rng(seed).permutation(len(targets))
        count = int(TRAINING_PART * len(targets))
        train, validation = order[:count], order[count:]
        mean, deviation = inputs[train].mean(axis=0), inputs[train].std(axis=0)

        def part(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
            scaled = torch.from_numpy((inputs[chosen] - mean) / deviation).float()
            return scaled, torch.from_numpy(targets[chosen]).long()

        super().__init__(part(train), part(validation), seed=seed, rank=rank, ranks=ranks)
        self.optimizer, self.steps = optimizer, steps

    def make_model(self) -> nn.Module:
        with seeded(self.seed):
            return _TwoClasses(self.train[0].shape[1], 1)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.optimizer, model, CANCER_RATES[self.optimizer])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")


class LogisticDigits(Supervised):
    """Softmax regression on scikit-learn's digits (see `digits_mlp`), full batch, Nesterov.

    Args:
        steps: steps of the base optimizer, which has lr 0.1 and momentum 0.9.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    def __init__(self, *, steps: int = 400, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(*split_digits(seed), seed=seed, rank=rank, ranks=ranks)
        self.steps = steps

    def make_model(self) -> nn.Module:
        with seeded(self.seed):
            return nn.Linear(64, 10)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("nesterov", model, lr=0.1)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")
