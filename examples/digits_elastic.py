"""Handwritten digits on ranks that come and go: Horovod elastic.

    horovodrun -np 2 --min-np 1 --network-interfaces lo \
        --host-discovery-script "echo localhost:2" python examples/digits_elastic.py

That is for one machine. On several, `--host-discovery-script` names a program that prints the hosts
there are at the moment, one a line (`node1:4`), and `--network-interfaces` names the interface by
which they reach each other, as `eth0` or `ib0`; `ip -br addr` lists them. Without that option
horovodrun waits for a second host before it starts anything. It says nothing for 10 minutes
(`--elastic-timeout`), and then gives up.

It was written for Horovod's own optimizer. What was changed since are two names:
`hvd.DistributedOptimizer` became `DistributedAndersonOptimizer`, and `hvd.elastic.TorchState`
became `aadl_hvd.elastic.TorchState`. docs/faults.md says what becomes of the history.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aadl_hvd import DistributedAndersonOptimizer, HorovodMissingError

try:
    import horovod.torch as hvd

    from aadl_hvd.elastic import TorchState
except ImportError as error:
    raise SystemExit(f"error: {HorovodMissingError.because(error)}") from None

TRAIN_IMAGES = 1_500


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128, help="of one rank")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1, help="of one rank")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--batches-per-commit", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> float:
    """The accuracy on images not trained on."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what becomes of the history
    hvd.init()
    torch.manual_seed(args.seed)

    pixels, numbers = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16.0
    labels = torch.tensor(numbers)
    train_set = TensorDataset(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES])
    sampler = hvd.elastic.ElasticSampler(train_set)
    loader = DataLoader(train_set, batch_size=args.batch_size, sampler=sampler)

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=args.momentum)
    optimizer = DistributedAndersonOptimizer(sgd, named_parameters=model.named_parameters())

    def accuracy() -> float:
        with torch.no_grad():
            guesses = model(images[TRAIN_IMAGES:]).argmax(1)
        return float((guesses == labels[TRAIN_IMAGES:]).float().mean())

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: Any) -> None:
        while state.epoch < args.epochs:
            for batch, (data, target) in enumerate(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(data), target).backward()
                optimizer.step()
                sampler.record_batch(batch, args.batch_size)
                if (batch + 1) % args.batches_per_commit == 0:
                    state.commit()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            if hvd.rank() == 0:
                print(f"epoch {state.epoch}: {hvd.size()} ranks, accuracy {accuracy():.2%}")
            state.commit()

    def scale_learning_rate() -> None:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * hvd.size()

    state = TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)
    state.register_reset_callbacks([scale_learning_rate])
    train(state)
    return accuracy()


if __name__ == "__main__":
    main()
