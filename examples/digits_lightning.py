"""Handwritten digits with Lightning, on processors; a full batch.

    torchrun --nproc-per-node 2 examples/digits_lightning.py

Lightning calls `training_step` within `step`. So there is no `observe`; the other safeguards hold.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aadl_hvd import DistributedAndersonOptimizer


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        self.opt = DistributedAndersonOptimizer(sgd)
        return self.opt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, DistributedAndersonOptimizer]:
    steps, ranks = parse(arguments).steps, int(os.environ["LOCAL_WORLD_SIZE"])
    pixels, numbers = load_digits(return_X_y=True)
    images, labels = torch.Tensor(pixels) / 16.0, torch.tensor(numbers)
    batches = DataLoader(TensorDataset(images[:1_500], labels[:1_500]), batch_size=1_500 // ranks)
    torch.manual_seed(0)
    module = Digits()
    trainer = lightning.Trainer(max_epochs=steps, accelerator="cpu", strategy="ddp", devices=ranks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(module, batches)
    right = (module.model(images[1_500:]).argmax(1) == labels[1_500:]).double().mean()
    trainer.print(f"test accuracy {right:.2%}\n{module.opt.anderson.stats}")
    return module, module.opt


if __name__ == "__main__":
    main()
