"""Handwritten digits by a small convolutional network: a torchrun user's first script.

    torchrun --nproc-per-node 2 examples/digits_ddp.py
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 \
        --max-restarts 3 examples/digits_ddp.py --checkpoint-dir digits

The second command starts all ranks again when one dies; docs/engines.md says what its variable is
for. The script was written for `DistributedDataParallel`. What was added are the lines with
`DistributedAndersonOptimizer` and `observe`. With `--checkpoint-dir`, a folder that all ranks see,
each epoch ends with a checkpoint. The next start goes on from it, on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer, checkpoint

TRAIN_IMAGES = 1_500


def network() -> nn.Module:
    """Images [b, 1, 8, 8] to logits [b, 10], as in digits.py."""
    convolutions = nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 20, 3), nn.Dropout2d(0.1)
    dense = nn.Linear(80, 50), nn.ReLU(), nn.Dropout(0.1), nn.Linear(50, 10)
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), *dense)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1, help="of one rank")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the processor")
    parser.add_argument("--plain", action="store_true", help="SGD without acceleration")
    parser.add_argument("--checkpoint-dir", type=Path, help="of a training to begin or to go on")
    return parser.parse_args(arguments)


def save(folder: Path, epoch: int, model: nn.Module, opt: DistributedAndersonOptimizer) -> None:
    """Writes folder/epoch00001, whole or not at all, and removes the one before. Collective."""
    rank, last = dist.get_rank(), folder / f"epoch{epoch:05}"
    partial = folder / f"partial-{last.name}"
    partial.mkdir(parents=True, exist_ok=True)
    checkpoint.save(partial / f"history{rank}.pt", opt.sharded_state_dict())
    if rank == 0:
        about = {"epoch": epoch, "ranks": dist.get_world_size()}
        base = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        checkpoint.save(partial / "base.pt", about | base)
    dist.barrier()  # every rank has written its file
    if rank == 0:
        partial.rename(last)
        for old in {*folder.glob("epoch*"), *folder.glob("partial-epoch*")} - {last}:
            shutil.rmtree(old)


def load(folder: Path, model: nn.Module, opt: DistributedAndersonOptimizer) -> int:
    """Loads the last checkpoint; the number of its epoch, 0 if there is none. Collective."""
    found = [max(folder.glob("epoch*"), default=None)]
    dist.broadcast_object_list(found, src=0)  # all take the one that rank 0 sees
    if (last := found[0]) is None:
        return 0
    base = checkpoint.load(last / "base.pt")
    files = [last / f"history{rank}.pt" for rank in range(base["ranks"])]
    if len(files) == dist.get_world_size():
        history = checkpoint.load(files[dist.get_rank()])
    else:
        history = checkpoint.merge_shards(map(checkpoint.load, files))
    model.load_state_dict(base["model"])
    opt.load_state_dict(base["optimizer"] | history)
    return base["epoch"]


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """The trained model."""
    args = parse(arguments)
    device = "cpu"
    if torch.cuda.is_available() and not args.no_cuda:
        # A launcher shows a rank all GPUs of its machine, or its own alone.
        index = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    rank, size = dist.get_rank(), dist.get_world_size()

    pixels, numbers = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    labels = torch.tensor(numbers)
    dataset = TensorDataset(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES])
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset)
    batches = DataLoader(dataset, batch_size=64, sampler=sampler)
    test = slice(TRAIN_IMAGES + rank, None, size)  # this rank's part

    torch.manual_seed(42)
    model = DistributedDataParallel(network().to(device))
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr * size, momentum=0.9)
    opt = DistributedAndersonOptimizer(sgd, anderson=AndersonConfig(enabled=not args.plain))

    done = load(args.checkpoint_dir, model, opt) if args.checkpoint_dir else 0
    if done and rank == 0:
        print(f"goes on after epoch {done}")
    for epoch in range(done + 1, args.epochs + 1):
        model.train()
        torch.manual_seed(epoch * size + rank)  # of dropout, also after a restart
        sampler.set_epoch(epoch)
        for data, target in batches:
            opt.zero_grad()
            loss = F.cross_entropy(model(data.to(device)), target.to(device))
            loss.backward()
            opt.observe(loss)
            opt.step()
        model.eval()
        with torch.no_grad():
            logits, target = model(images[test].to(device)), labels[test].to(device)
            lost = F.cross_entropy(logits, target, reduction="sum")
            sums = torch.stack([lost, (logits.argmax(1) == target).sum()])
        dist.all_reduce(sums)
        if rank == 0:
            means = sums / (len(images) - TRAIN_IMAGES)
            print(f"epoch {epoch}: test loss {means[0]:.4f}, accuracy {means[1]:.2%}")
        if args.checkpoint_dir:
            save(args.checkpoint_dir, epoch, model, opt)
    if rank == 0:
        print(opt.anderson.stats)
    dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
