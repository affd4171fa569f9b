"""Handwritten digits with torch's learning-rate schedulers: warm-up and cosine, or plateau.

    horovodrun -np 2 python examples/digits_schedule.py
    horovodrun -np 2 python examples/digits_schedule.py --schedule plateau

A scheduler takes the distributed optimizer, not the one inside, and steps after it. All ranks must
set the same rate: a plateau is therefore judged by the mean over ranks, not by a rank's own loss.

It was written for Horovod's own optimizer. What was changed since is one name:
`hvd.DistributedOptimizer` became `DistributedAndersonOptimizer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from aadl_hvd import DistributedAndersonOptimizer, HorovodMissingError

try:
    import horovod.torch as hvd
except ImportError as error:
    raise SystemExit(f"error: {HorovodMissingError.because(error)}") from None

TRAIN_IMAGES = 1_500


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=("cosine", "plateau"), default="cosine")
    parser.add_argument("--batch-size", type=int, default=128, help="of one rank")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--warmup-epochs", type=int, default=1, help="of the cosine schedule")
    parser.add_argument("--lr", type=float, default=0.1, help="of one rank")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the processor")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[list[float]]]:
    """The trained model; of every epoch: test loss and the learning rate after it."""
    args = parse(arguments)
    hvd.init()
    torch.manual_seed(args.seed)
    device = "cpu"
    if torch.cuda.is_available() and not args.no_cuda:
        device = "cuda"
        # A launcher shows a rank all GPUs of its machine, or its own alone.
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())

    pixels, numbers = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16.0, torch.tensor(numbers)
    train_set = TensorDataset(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES])
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
        train_set, num_replicas=hvd.size(), rank=hvd.rank()
    )
    loader = DataLoader(train_set, batch_size=args.batch_size, sampler=sampler)
    # Each rank tests its share.
    test_images = images[TRAIN_IMAGES + hvd.rank() :: hvd.size()].to(device)
    test_labels = labels[TRAIN_IMAGES + hvd.rank() :: hvd.size()].to(device)

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(sgd, root_rank=0)
    optimizer = DistributedAndersonOptimizer(sgd, named_parameters=model.named_parameters())

    cosine, plateau = None, None  # a scheduler sets a rate as soon as it is made: one of the two
    if args.schedule == "cosine":
        warmup = args.warmup_epochs * len(loader)
        # From one rank's rate to all ranks', and down to nothing.
        cosine = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=1 / hvd.size(), total_iters=warmup),
                CosineAnnealingLR(optimizer, T_max=args.epochs * len(loader) - warmup),
            ],
            milestones=[warmup],
        )
    else:
        # Half the rate after an epoch that has gained less than a fifth.
        plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
    found = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for data, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(data.to(device)), target.to(device)).backward()
            optimizer.step()
            if cosine is not None:
                cosine.step()
        with torch.no_grad():
            loss = F.cross_entropy(model(test_images), test_labels).cpu()
        mean = hvd.allreduce(loss, name="test loss").item()
        if plateau is not None:
            plateau.step(mean)
        found.append([mean, optimizer.param_groups[0]["lr"]])
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: test loss {mean:.4f}, learning rate {found[-1][1]:.4f}")
    return model, found


if __name__ == "__main__":
    main()
