"""The base class of the DALI and torch loaders: shards, counts, position, identity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from models.data.folder import ImageList
from models.errors import UserError

AUGMENTATIONS = ("none", "crop", "imagenet")
SHUFFLES = ("epoch", "once")
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How images become batches; the same on all ranks except `rank` and `device`.

    Attributes:
        train: True: full batches, shuffled and augmented. False: every image once, in order.
        rank: This rank.
        world: Number of ranks.
        batch_size: Images in a batch of one rank.
        image_size: Side of the square images that come out, in pixels.
        resize: Length of the shorter side before the centre crop, in pixels.
        channels: 3 for colour, 1 for grey.
        augment: "none"; "crop", a random crop resized; "imagenet", that and random mirroring.
        shuffle: "epoch", a global reshuffle each epoch; "once", one order drawn from the seed. With
            "once" every rank keeps its shard, and a batch of the whole shard never changes.
        seed: Seed of order and augmentation.
        workers: DALI threads, or worker processes of torch's loader, of this rank.
        device: Device of the batches.
    """

    train: bool
    rank: int = 0
    world: int = 1
    batch_size: int
    image_size: int
    resize: int
    channels: int = 3
    augment: str = "none"
    shuffle: str = "epoch"
    seed: int = 0
    workers: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def mean(self) -> tuple[float, ...]:
        """ImageNet's mean per channel, as a fraction of the largest pixel value."""
        return (0.485, 0.456, 0.406) if self.channels == 3 else (0.449,)

    @property
    def std(self) -> tuple[float, ...]:
        """ImageNet's deviation per channel, as a fraction of the largest pixel value."""
        return (0.229, 0.224, 0.225) if self.channels == 3 else (0.226,)


class Loader(ABC):
    """Batches of one rank: iterate over it once per epoch.

    Each pass yields ``(images, labels)``: float32 [B, channels, image_size, image_size],
    normalised, and int64 [B], both on the options' device. Training batches are full. All ranks
    have the same number of them: collectives in the training loop rely on it. With
    ``shuffle="epoch"`` the images left over differ from epoch to epoch. In validation every image
    comes exactly once over all ranks. The last batch may be smaller, and a rank may have one batch
    fewer than `__len__` says.

    A pass that was left early resumes where it stopped. So does one after `load_state_dict`.
    """

    kind: str

    def __init__(self, images: ImageList, options: LoaderOptions) -> None:
        """Checks that there are enough images; nothing is read yet.

        Args:
            images: The whole data set, the same on every rank.
            options: How to shard, shuffle and transform it.

        Raises:
            UserError: A rank would have no full training batch, or no validation image.
        """
        self.options = options
        # Reshuffling is done between epochs: without this the first would be sorted by class.
        self.images = images.shuffled(options.seed) if options.train else images
        self.epoch = 0
        self.batch = 0
        count, world, batch = len(images), options.world, options.batch_size
        if options.train:
            self._length = (count // world) // batch
            if not self._length:
                raise UserError(
                    f"a batch of {batch} images on each of {world} ranks needs {batch * world} "
                    f"training images, {images.root} has {count}: choose a smaller batch size"
                )
        else:
            self._length = math.ceil(math.ceil(count / world) / batch)
            if count < world:
                raise UserError(
                    f"{images.root} has {count} images, fewer than ranks ({world}): each needs one"
                )

    def __len__(self) -> int:
        """Batches in an epoch, equal on all ranks."""
        return self._length

    @property
    def shard(self) -> tuple[int, int]:
        """First and past-the-end position of this rank's first shard in the list of files."""
        count, world, rank = len(self.images), self.options.world, self.options.rank
        return count * rank // world, count * (rank + 1) // world

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Goes through the rest of the current epoch."""

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank: plain numbers and strings, under 1 kB."""
        return {"identity": self._identity(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved position; the following batches are bitwise the same.

        Args:
            state: Result of `state_dict` on this rank.

        Raises:
            UserError: The state was saved with other data, ranks or options. The message names
                each difference. Without this check a loader would silently resume elsewhere.
        """
        then, now = state["identity"], self._identity()
        different = [
            f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
            for key in now
            if then.get(key) != now[key]
        ]
        if different:
            raise UserError("the data loader cannot go on from there: " + "; ".join(different))
        epoch, batch = state["epoch"], state["batch"]
        if type(epoch) is not int or type(batch) is not int or not 0 <= batch < len(self):
            raise UserError(
                f"the data loader cannot go on from epoch {epoch!r}, batch {batch!r} of {len(self)}"
            )
        self.epoch, self.batch = epoch, batch

    @abstractmethod
    def close(self) -> None:
        """Ends threads and worker processes."""

    def _identity(self) -> dict[str, Any]:
        options = self.options
        return {
            "loader": self.kind,
            "ranks": options.world,
            "rank": options.rank,
            "batch size": options.batch_size,
            "number of files": len(self.images),
            "hash of the file list": self.images.digest,
            "seed": options.seed,
            "shuffle": options.shuffle,
            "augmentation": options.augment,
            "image size": f"{options.image_size} of {options.resize}",
            "channels": options.channels,
        }
