"""A network of torchvision on a folder of images, or on random ones: a Horovod user's main script.

    horovodrun -np 2 python examples/images.py --train-dir imagenet/train --val-dir imagenet/val
    horovodrun -np 2 python examples/images.py --model resnet18 --size 32 --epochs 3

Gradients accumulated over several batches, learning rate warmed up and decayed by hand, metrics
averaged over ranks, a checkpoint after every epoch that rank 0 writes and loads. It was written for
Horovod's own optimizer. What was changed since is one name: `hvd.DistributedOptimizer` became
`DistributedAndersonOptimizer`. `python -m models.train` is the program for serious training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import datasets, models, transforms

from aadl_hvd import DistributedAndersonOptimizer, HorovodMissingError

try:
    import horovod.torch as hvd
except ImportError as error:
    raise SystemExit(f"error: {HorovodMissingError.because(error)}") from None

RANDOM_CLASSES = 10
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DECAY = ((30, 1.0), (60, 1e-1), (80, 1e-2))  # until which epoch, by which factor; then 1e-3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train-dir", help="one folder a class; without it images are random")
    parser.add_argument("--val-dir")
    parser.add_argument("--random-images", type=int, default=512)
    parser.add_argument("--checkpoints", type=Path, help="folder to write them to and resume from")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="of one backward pass")
    parser.add_argument("--batches-per-allreduce", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--base-lr", type=float, default=0.0125, help="of one rank")
    parser.add_argument("--warmup-epochs", type=float, default=5.0)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--wd", type=float, default=5e-5)
    parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients as float16")
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
    parser.add_argument("--clip", type=float, help="norm to clip the mean gradient to")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the processor")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(arguments)
    if (args.train_dir is None) != (args.val_dir is None):
        parser.error("--train-dir and --val-dir go together")
    return args


def random_images(count: int, size: int, seed: int) -> TensorDataset:
    """Noise around one picture a class, the same pictures whatever the seed."""
    pictures = torch.randn(
        RANDOM_CLASSES, 3, size, size, generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(RANDOM_CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return TensorDataset(pictures[labels] + noise, labels)


def open_data(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training and validation images, and the number of classes."""
    if args.train_dir is None:
        train = random_images(args.random_images, args.size, 1)
        return train, random_images(args.random_images // 4, args.size, 2), RANDOM_CLASSES
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip()]
    center = [transforms.Resize(args.size * 8 // 7), transforms.CenterCrop(args.size)]
    folder = datasets.ImageFolder(args.train_dir, transforms.Compose(crop + last))
    val = datasets.ImageFolder(args.val_dir, transforms.Compose(center + last))
    return folder, val, len(folder.classes)


def loader(dataset: Any, batch_size: int) -> DataLoader[Any]:
    """This rank's share of the images."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=hvd.size(), rank=hvd.rank()
    )
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)


class Metric:
    """The mean of a number over batches and ranks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sum, self.count = 0.0, 0

    def update(self, value: Tensor) -> None:
        self.sum += hvd.allreduce(value.detach().cpu(), name=self.name).item()
        self.count += 1

    @property
    def mean(self) -> float:
        return self.sum / self.count


def learning_rate(args: argparse.Namespace, epoch: int, progress: float) -> float:
    """Goyal et al. 2017: from one rank's rate to all ranks' in the first epochs, then by steps."""
    factor = next((factor for until, factor in DECAY if epoch < until), 1e-3)
    if epoch < args.warmup_epochs:
        warm = (epoch + progress) / args.warmup_epochs
        factor = (1.0 + warm * (hvd.size() - 1)) / hvd.size()
    return float(args.base_lr * hvd.size() * args.batches_per_allreduce * factor)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[list[float]]]:
    """The trained model; of every epoch: training loss, validation loss, validation accuracy."""
    args = parse(arguments)
    hvd.init()
    torch.manual_seed(args.seed)
    device = "cpu"
    if torch.cuda.is_available() and not args.no_cuda:
        device = "cuda"
        # A launcher shows a rank all GPUs of its machine, or its own alone.
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
        torch.backends.cudnn.benchmark = True

    def checkpoint(epoch: int) -> Path:
        return Path(args.checkpoints or ".") / f"checkpoint-{epoch}.pt"

    resume = 0
    if args.checkpoints is not None:
        there = (epoch for epoch in range(args.epochs, 0, -1) if checkpoint(epoch).exists())
        resume = next(there, 0)
    # Rank 0 has the files; the others may be on other machines.
    resume = int(hvd.broadcast(torch.tensor(resume), root_rank=0, name="resume").item())

    train_images, val_images, classes = open_data(args)
    train = loader(train_images, args.batch_size * args.batches_per_allreduce)
    val = loader(val_images, args.batch_size)
    model = models.get_model(args.model, weights=None, num_classes=classes).to(device)
    sgd = torch.optim.SGD(
        model.parameters(),
        lr=args.base_lr * hvd.size() * args.batches_per_allreduce,
        momentum=args.momentum,
        weight_decay=args.wd,
    )
    optimizer = DistributedAndersonOptimizer(
        sgd,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=args.batches_per_allreduce,
        op=hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )
    if resume > 0 and hvd.rank() == 0:
        saved = torch.load(checkpoint(resume), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    found = []
    for epoch in range(resume, args.epochs):
        model.train()
        assert isinstance(train.sampler, DistributedSampler)
        train.sampler.set_epoch(epoch)
        train_loss, val_loss, hits = Metric("train_loss"), Metric("val_loss"), Metric("hits")
        for index, (data, target) in enumerate(train):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch, (index + 1) / len(train))
            optimizer.zero_grad()
            size = args.batch_size
            for images, labels in zip(data.split(size), target.split(size), strict=True):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                train_loss.update(loss)
                (loss * len(labels) / len(target)).backward()
            if args.clip is None:
                optimizer.step()
            else:
                optimizer.synchronize()
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                with optimizer.skip_synchronize():
                    optimizer.step()

        model.eval()
        with torch.no_grad():
            for images, labels in val:
                logits, labels = model(images.to(device)), labels.to(device)
                val_loss.update(F.cross_entropy(logits, labels))
                hits.update(accuracy(logits, labels))
        found.append([train_loss.mean, val_loss.mean, hits.mean])
        if hvd.rank() == 0:
            numbers = f"{train_loss.mean:.4f}, validation {val_loss.mean:.4f}, {hits.mean:.2%}"
            print(f"epoch {epoch + 1}: loss {numbers}", flush=True)
            if args.checkpoints is not None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, checkpoint(epoch + 1))
    return model, found


if __name__ == "__main__":
    main()
