"""The alternative to DALI: torch's DataLoader with PIL and torchvision's transforms."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from models.data.decode import open_image, show
from models.data.folder import ImageList
from models.data.loader import CROP_AREA, CROP_RATIO, Loader, LoaderOptions
from models.preemption import outlive_one_sigterm


class TorchLoader(Loader):
    """Batches decoded by worker processes; see `Loader`."""

    kind = "torch"

    def __init__(self, images: ImageList, options: LoaderOptions) -> None:
        """See `Loader`; the worker processes start at the first batch."""
        super().__init__(images, options)
        self._order = _Order(self)
        on_gpu = options.device.type == "cuda"
        self._batches: DataLoader = DataLoader(
            _Images(self.images, options),
            batch_sampler=self._order,
            num_workers=options.workers,
            pin_memory=on_gpu,
            persistent_workers=options.workers > 0,
            generator=torch.Generator(),  # else each epoch draws from the global generator
            # Forking a process that runs MPI's and Horovod's threads is not safe.
            multiprocessing_context="forkserver" if options.workers else None,
            worker_init_fn=_start_worker if options.workers else None,
        )
        # A program may end without close(). This exit function is registered after
        # multiprocessing's, so it runs first. multiprocessing's sends one SIGTERM, and would wait
        # for ever for workers that survive it.
        atexit.register(_close_at_exit, weakref.ref(self))
        shape = (1, options.channels, 1, 1)
        self._mean = torch.tensor(options.mean, device=options.device).view(shape) * 255
        self._std = torch.tensor(options.std, device=options.device).view(shape) * 255

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Loader`."""
        left = len(self._order)
        for pixels, labels in self._batches:
            left -= 1
            self.batch += 1
            if not left:
                self.epoch, self.batch = self.epoch + 1, 0
            # Normalised here, on the options' device: workers then send uint8, a quarter of the
            # bytes.
            pixels = pixels.to(self.options.device, non_blocking=True).float()
            yield (pixels - self._mean) / self._std, labels.to(self.options.device)

    def close(self) -> None:
        """See `Loader`."""
        # Explicitly: while an exception propagates, its traceback keeps the iterator alive.
        iterator: Any = self._batches._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def _close_at_exit(loader: weakref.ref[TorchLoader]) -> None:
    alive = loader()
    if alive is not None:
        alive.close()


def _start_worker(worker: int) -> None:
    """Prepares a worker process at its start."""
    outlive_one_sigterm(worker)
    threading.Thread(target=_end_with_rank, name="rank", daemon=True).start()


def _end_with_rank() -> None:
    # torch watches the worker's parent process, which here is the fork server. It lives on while a
    # process holds its pipes, as the workers do; so does the resource tracker. multiprocessing's
    # parent_process() is the rank. It holds the other end of a pipe, which the kernel closes
    # however the rank ends.
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)  # at once: the main thread may wait for a queue that nobody serves


class _Order(Sampler[list[tuple[int, int]]]):
    """Batches of (position in the list of files, epoch) for the rest of the loader's epoch."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Batches left in this epoch for this rank."""
        return len(self._rest())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from self._rest()

    def _rest(self) -> list[list[tuple[int, int]]]:
        loader, options = self.loader, self.loader.options
        first, end = loader.shard
        if options.train and options.shuffle == "epoch":
            seed = torch.Generator().manual_seed(options.seed * 100_003 + loader.epoch)
            positions = torch.randperm(len(loader.images), generator=seed)[first:end].tolist()
        else:
            positions = list(range(first, end))
        if options.train:
            positions = positions[: len(loader) * options.batch_size]
        keys = [(position, loader.epoch) for position in positions]
        starts = range(loader.batch * options.batch_size, len(keys), options.batch_size)
        return [keys[start : start + options.batch_size] for start in starts]


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Decoded and transformed images, uint8 [C, H, W], with labels."""

    def __init__(self, images: ImageList, options: LoaderOptions) -> None:
        self.paths = images.paths()
        self.labels = images.labels
        self.seed = options.seed
        self.mode = "RGB" if options.channels == 3 else "L"
        steps: list[Any] = []
        if options.train and options.augment != "none":
            size = (options.image_size, options.image_size)
            steps.append(v2.RandomResizedCrop(size, CROP_AREA, CROP_RATIO, antialias=True))
            if options.augment == "imagenet":
                steps.append(v2.RandomHorizontalFlip())
        else:
            steps += [v2.Resize(options.resize, antialias=True), v2.CenterCrop(options.image_size)]
        self.transform = v2.Compose(steps)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, epoch = key
        # Not with torchvision.io, which is a third faster but will be removed.
        try:
            with open(self.paths[position], "rb") as file, open_image(file) as stored:
                image = v2.functional.pil_to_tensor(show(stored, self.mode))
        except Exception as error:  # PIL raises many kinds, most without the file's name
            raise RuntimeError(
                f"cannot decode {self.paths[position]}: {error}. --check-images names all such "
                "files before training."
            ) from error
        with torch.random.fork_rng(devices=[]):
            # Seeded by image and epoch: crops depend neither on the worker nor on a resume.
            torch.manual_seed(hash((self.seed, epoch, position)))
            return self.transform(image), self.labels[position]
