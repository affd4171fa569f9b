"""Handwritten digits in mixed precision, with clipped gradients: autocast and GradScaler.

    horovodrun -np 2 python examples/digits_amp.py

On a GPU in float16, on the processor in bfloat16, which needs no GradScaler but takes one. The
order of the calls after `backward` matters, for Horovod's optimizer and for ours alike:

1. `synchronize` waits for the mean over ranks. Before it `unscale_` would change gradients that are
   on their way, and `clip_grad_norm_` would see those of this rank alone. After it an overflow on
   one rank is one on all, so that all of them leave the step out.
2. `unscale_` comes before `clip_grad_norm_`, which would clip 65536 times the gradients otherwise.
3. `skip_synchronize` keeps `step` from reducing them once more.

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
    parser.add_argument("--batch-size", type=int, default=128, help="of one rank")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1, help="of one rank")
    parser.add_argument("--clip", type=float, default=1.0, help="norm to clip the mean gradient to")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the processor")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[list[float]]]:
    """The trained model; of every epoch: its last loss and the scale after it."""
    args = parse(arguments)
    hvd.init()
    torch.manual_seed(args.seed)
    device, dtype = "cpu", torch.bfloat16
    if torch.cuda.is_available() and not args.no_cuda:
        device, dtype = "cuda", torch.float16
        # A launcher shows a rank all GPUs of its machine, or its own alone.
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())

    pixels, numbers = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:TRAIN_IMAGES], dtype=torch.float32) / 16.0
    train_set = TensorDataset(images, torch.tensor(numbers[:TRAIN_IMAGES]))
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
        train_set, num_replicas=hvd.size(), rank=hvd.rank()
    )
    loader = DataLoader(train_set, batch_size=args.batch_size, sampler=sampler)

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(sgd, root_rank=0)
    optimizer = DistributedAndersonOptimizer(sgd, named_parameters=model.named_parameters())

    scaler = torch.amp.GradScaler(device)
    found = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for data, target in loader:
            optimizer.zero_grad()
            with torch.autocast(device, dtype=dtype):
                loss = F.cross_entropy(model(data.to(device)), target.to(device))
            scaler.scale(loss).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        mean = hvd.allreduce(loss.detach().float().cpu(), name="loss").item()
        found.append([mean, scaler.get_scale()])
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: loss {mean:.4f}, scale {scaler.get_scale():.0f}")
    return model, found


if __name__ == "__main__":
    main()
