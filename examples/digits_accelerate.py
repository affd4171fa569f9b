"""Handwritten digits with Hugging Face's Accelerate, on processors; a full batch.

    torchrun --nproc-per-node 2 examples/digits_accelerate.py

`prepare` wraps the optimizer, and the wrapper has no `observe`. So the optimizer itself is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="SGD without acceleration")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, DistributedAndersonOptimizer]:
    """The trained model and its optimizer."""
    args = parse(arguments)
    accelerator = Accelerator(cpu=True)
    pixels, numbers = load_digits(return_X_y=True)
    images, labels = torch.Tensor(pixels) / 16.0, torch.tensor(numbers)
    dataset = TensorDataset(images[:1_500], labels[:1_500])
    batches = DataLoader(dataset, batch_size=1_500 // accelerator.num_processes)

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    opt = DistributedAndersonOptimizer(sgd, anderson=AndersonConfig(enabled=not args.plain))
    model, wrapper, batches = accelerator.prepare(model, opt, batches)
    for _ in range(args.steps):
        for data, target in batches:
            wrapper.zero_grad()
            loss = cross_entropy(model(data), target)
            accelerator.backward(loss)
            opt.observe(loss)
            wrapper.step()

    right = (model(images[1_500:]).argmax(1) == labels[1_500:]).double().mean()
    accelerator.print(f"training loss {loss:.2e}, test accuracy {right:.2%}\n{opt.anderson.stats}")
    accelerator.end_training()
    return model, opt


if __name__ == "__main__":
    main()
