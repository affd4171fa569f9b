"""A small residual network on the digits, with small batches and with one large one.

It shows the generalization gap (arXiv 2110.14813, ResNet50 on 1,536 GPUs). Both batch sizes train
for the same number of epochs, so the large one makes far fewer steps.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from aadl_hvd import AndersonConfig
from models import networks
from models.problems.base import Supervised, make_optimizer, seeded
from models.problems.digits_mlp import TRAIN_IMAGES, split_digits

SMALL_BATCH = 32
RATES = {SMALL_BATCH: 0.05, None: 0.3}


class DigitsResNet(Supervised):
    """resnet8, width 8, on 8 x 8 digits; Nesterov, weight decay 1e-4, rate / 10 after 2/3.

    Batch norm sees one rank's share at a time, as in any data-parallel training. So the mean of
    the ranks' losses is not the loss of one process. `metrics` measures a copy of the model with
    the statistics of the whole training set. Running statistics would lag behind weights that have
    just been extrapolated or averaged, and they would differ between ranks.

    Args:
        batch: items in a global batch: 32 (lr 0.05); None: all 1,497 (lr 0.3).
        epochs: passes over the training set.
        steps: stop after so many steps; None: train all epochs.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    paper: ClassVar[AndersonConfig] = AndersonConfig.paper("resnet50")

    def __init__(
        self,
        *,
        batch: int | None = None,
        epochs: int = 30,
        steps: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        parts = [(pixels.reshape(-1, 1, 8, 8), labels) for pixels, labels in split_digits(seed)]
        super().__init__(parts[0], parts[1], batch=batch, seed=seed, rank=rank, ranks=ranks)
        self._all_steps = epochs * (TRAIN_IMAGES // self.batch)
        self.steps = self._all_steps if steps is None else steps
        self._lr = RATES[batch]

    def make_model(self) -> nn.Module:
        with seeded(self.seed):
            return networks.build("resnet8", 10, channels=1, width=8)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("nesterov", model, self._lr, weight_decay=1e-4)

    def learning_rate(self, step: int) -> float:
        return self._lr * (1.0 if 3 * step < 2 * self._all_steps else 0.1)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, model: nn.Module) -> dict[str, float]:
        measured = copy.deepcopy(model)
        for module in measured.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        measured.train()
        with torch.no_grad():
            measured(self.train[0])
        return super().metrics(measured.eval())
