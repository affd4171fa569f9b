"""Handwritten digits by a small convolutional network: a Horovod user's first script.

    horovodrun -np 2 python examples/digits.py

It was written for Horovod's own optimizer. What was changed since is one name:
`hvd.DistributedOptimizer` became `DistributedAndersonOptimizer`. Batches are small here, so the
subspace method takes over: docs/when-does-it-pay.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from aadl_hvd import DistributedAndersonOptimizer, HorovodMissingError

try:
    import horovod.torch as hvd
except ImportError as error:
    raise SystemExit(f"error: {HorovodMissingError.because(error)}") from None

TRAIN_IMAGES = 1_500


class Net(nn.Module):
    """Two convolutions and two dense layers, with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=3)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=3)
        self.drop = nn.Dropout2d(0.1)
        self.fc1 = nn.Linear(80, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [b, 1, 8, 8] to logits [b, 10]."""
        x = F.relu(self.conv1(x))
        x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2)).flatten(1)
        x = F.dropout(F.relu(self.fc1(x)), 0.1, training=self.training)
        return self.fc2(x)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="of one rank")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1, help="of one rank")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the processor")
    parser.add_argument("--mixed-precision", action="store_true", help="autocast and GradScaler")
    parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients as float16")
    parser.add_argument("--use-adasum", action="store_true", help="reduce by Adasum")
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
    return parser.parse_args(arguments)


def loader(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """This rank's share of the images."""
    dataset = TensorDataset(images, labels)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
        dataset, num_replicas=hvd.size(), rank=hvd.rank()
    )
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)


def validate(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]], device: str) -> list[float]:
    """Mean loss and accuracy over all ranks."""
    model.eval()
    sums = torch.zeros(3)  # loss, hits, images
    with torch.no_grad():
        for images, labels in batches:
            logits, labels = model(images.to(device)), labels.to(device)
            sums[0] += F.cross_entropy(logits, labels, reduction="sum").cpu()
            sums[1] += (logits.argmax(1) == labels).sum().cpu()
            sums[2] += len(labels)
    loss, hits, count = hvd.allreduce(sums, name="validation").tolist()
    return [loss / count, hits / count]


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[list[float]]]:
    """The trained model, and loss and accuracy after every epoch."""
    args = parse(arguments)
    hvd.init()
    torch.manual_seed(args.seed)
    device = "cpu"
    if torch.cuda.is_available() and not args.no_cuda:
        device = "cuda"
        # A launcher shows a rank all GPUs of its machine, or its own alone.
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())

    pixels, numbers = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    labels = torch.tensor(numbers)
    train = loader(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES], args.batch_size)
    test = loader(images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:], 1_000)

    model = Net().to(device)
    scale = 1 if args.use_adasum else hvd.size()
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr * scale, momentum=args.momentum)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(sgd, root_rank=0)
    optimizer = DistributedAndersonOptimizer(
        sgd,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )

    scaler = torch.amp.GradScaler(device, enabled=args.mixed_precision)
    found = []
    for epoch in range(1, args.epochs + 1):
        model.train()
        assert isinstance(train.sampler, DistributedSampler)
        train.sampler.set_epoch(epoch)
        for data, target in train:
            optimizer.zero_grad()
            with torch.autocast(device, enabled=args.mixed_precision):
                loss = F.cross_entropy(model(data.to(device)), target.to(device))
            scaler.scale(loss).backward()
            if args.mixed_precision:
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        found.append(validate(model, test, device))
        if hvd.rank() == 0:
            print(f"epoch {epoch}: test loss {found[-1][0]:.4f}, accuracy {found[-1][1]:.2%}")
    return model, found


if __name__ == "__main__":
    main()
