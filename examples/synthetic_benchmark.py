"""Images a second on one fixed batch: how a Horovod user measures what a step costs.

    horovodrun -np 2 python examples/synthetic_benchmark.py --model resnet18 --size 64

It was written for Horovod's own optimizer. What was changed since is one name:
`hvd.DistributedOptimizer` became `DistributedAndersonOptimizer`; docs/cost.md has what to expect.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from aadl_hvd import DistributedAndersonOptimizer, HorovodMissingError

try:
    import horovod.torch as hvd
except ImportError as error:
    raise SystemExit(f"error: {HorovodMissingError.because(error)}") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="of one rank")
    parser.add_argument("--warmup-batches", type=int, default=10, help="that are not timed")
    parser.add_argument("--batches", type=int, default=10, help="in an iteration")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients as float16")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the processor")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[list[float]]]:
    """The model, and the loss of this rank after every iteration."""
    args = parse(arguments)
    hvd.init()
    device = "cpu"
    if torch.cuda.is_available() and not args.no_cuda:
        device = "cuda"
        # A launcher shows a rank all GPUs of its machine, or its own alone.
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
        torch.backends.cudnn.benchmark = True
    model = models.get_model(args.model, weights=None).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01 * hvd.size())
    optimizer = DistributedAndersonOptimizer(
        sgd,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    data = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    target = torch.randint(1_000, (args.batch_size,), device=device)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(args.warmup_batches):
        step()
    speeds, losses = [], []
    for iteration in range(args.iterations):
        seconds = timeit.timeit(step, number=args.batches)
        speeds.append(args.batch_size * args.batches / seconds)
        losses.append([step()])
        if hvd.rank() == 0:
            print(f"iteration {iteration}: {speeds[-1]:.1f} images/s on one rank", flush=True)
    if hvd.rank() == 0:
        mean, spread = np.mean(speeds), 1.96 * np.std(speeds)
        print(f"{mean:.1f} +- {spread:.1f} images/s on one rank, {hvd.size() * mean:.1f} on all")
    return model, losses


if __name__ == "__main__":
    main()
