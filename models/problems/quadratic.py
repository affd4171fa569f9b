"""An ill-conditioned quadratic, written as least squares so that ranks can share its rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from models.problems.base import Supervised, make_optimizer


class Quadratic(Supervised):
    """mean over rows a of (a.w - b)²/2 in float64, minimum 0; its Hessian has condition 1e4.

    The eigenvalues are spaced geometrically from 1e-4 to 1. So SGD with lr 1 is stable, and slow in
    most directions. There is no validation set.

    Args:
        unknowns: n, the length of w.
        rows: at least n.
        condition: largest eigenvalue of the Hessian over the smallest.
        steps: steps of the base optimizer.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    def __init__(
        self,
        *,
        unknowns: int = 100,
        rows: int = 400,
        condition: float = 1e4,
        steps: int = 1000,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        random = np.random.default_rng(seed)
        left = np.linalg.qr(random.standard_normal((rows, unknowns)))[0]
        right = np.linalg.qr(random.standard_normal((unknowns, unknowns)))[0]
        eigenvalues = np.geomspace(1 / condition, 1, unknowns)
        A = math.sqrt(rows) * (left * np.sqrt(eigenvalues)) @ right.T
        b = A @ random.standard_normal(unknowns)
        data = torch.from_numpy(A), torch.from_numpy(b)
        super().__init__(data, None, seed=seed, rank=rank, ranks=ranks)
        self.steps = steps

    def make_model(self) -> nn.Module:
        model = nn.Linear(self.train[0].shape[1], 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("sgd", model, lr=1.0)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(1) - targets).square() / 2
