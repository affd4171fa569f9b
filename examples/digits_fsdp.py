"""Handwritten digits with FSDP2 (`fully_shard`); a full batch, and the history in files.

    torchrun --nproc-per-node 2 examples/digits_fsdp.py

`--history FOLDER` writes the history there: docs/engines.md says how to go on from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard

from aadl_hvd import DistributedAndersonOptimizer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--history", help="folder for it, at the end")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, DistributedAndersonOptimizer]:
    """The trained model and its optimizer."""
    args = parse(arguments)
    dist.init_process_group("gloo")
    pixels, numbers = load_digits(return_X_y=True)
    mine = slice(dist.get_rank(), 1_500, dist.get_world_size())  # this rank's part
    images, labels = torch.Tensor(pixels) / 16.0, torch.tensor(numbers)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    for part in (model[0], model[2], model):
        fully_shard(part)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    opt = DistributedAndersonOptimizer(sgd)
    for _ in range(args.steps):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        opt.observe(loss)
        opt.step()

    right = (model(images[1_500:]).argmax(1) == labels[1_500:]).double().mean()
    if dist.get_rank() == 0:
        print(f"training loss {loss:.2e}, test accuracy {right:.2%}\n{opt.anderson.stats}")
    if args.history:
        opt.save_history(args.history)
    dist.destroy_process_group()
    return model, opt


if __name__ == "__main__":
    main()
