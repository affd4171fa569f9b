"""ImageNet-style folders: which files there are, what they show, and whether they can be read.

Labels are positions in the sorted list of the *training* classes, for every part of the data set.
Neither DALI's nor torchvision's own folder reader is used for this: they number whatever folders
they meet, so that an empty class folder, a hidden folder or ``lost+found`` silently shifts the
labels, and they number the validation classes apart from the training classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from models.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png")
NO_CLASS = frozenset({"lost+found"})


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """Images of one part (train or val) of a data set.

    Attributes:
        root: Folder that holds the class folders.
        classes: Names of the training classes, sorted; a label is a position in it.
        files: Paths relative to `root`.
        labels: One label per file.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of files, labels and their order: equal digests mean the same images.

        `root` is left out, so that a data set may be moved between two runs.
        """
        hasher = hashlib.sha256()
        for file, label in zip(self.files, self.labels, strict=True):
            hasher.update(f"{label}\t{file}\n".encode())
        return hasher.hexdigest()

    def paths(self) -> list[str]:
        """Full paths, in the order of `files`."""
        return [os.path.join(self.root, file) for file in self.files]

    def shuffled(self, seed: int) -> ImageList:
        """The same images in an order drawn once from `seed`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return ImageList(
            root=self.root,
            classes=self.classes,
            files=tuple(self.files[i] for i in order),
            labels=tuple(self.labels[i] for i in order),
        )


def list_images(root: str | Path, classes: Sequence[str] | None = None) -> ImageList:
    """Lists ``root/CLASS/.../image`` with labels.

    Hidden files and folders and ``lost+found`` are passed over, and so are files that are no
    images by their names.

    Args:
        root: Folder of class folders.
        classes: The training classes that `root` must have, no more and no less; None takes the
            class folders found, which is right for the training images alone.

    Returns:
        The images, sorted by class and name.

    Raises:
        UserError: `root` is missing or has no class folders, a class folder holds no images, or
            the class folders are not those of `classes`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no such data folder: {root}")
    found = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in NO_CLASS
    )
    if not found:
        raise UserError(f"no class folders in {root}: expected {root}/CLASS/IMAGE.jpg")
    if classes is None:
        classes = found
    else:
        _compare_classes(root, found, classes)

    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        images = _images_below(root, name)
        if not images:
            empty.append(name)
        files += images
        labels += [label] * len(images)
    if empty:
        raise UserError(
            f"class folders without images ({', '.join(EXTENSIONS)}) in {root}: {_some(empty)}"
        )
    return ImageList(root=root, classes=tuple(classes), files=tuple(files), labels=tuple(labels))


def find_corrupt(
    images: ImageList, *, shard: int = 0, shards: int = 1, threads: int = 1
) -> list[str]:
    """Decodes every `shards`-th image and names those that cannot be read to their end.

    One truncated image ends a DALI pipeline in the middle of an epoch, on one rank, and garbage
    does so without naming the file; hence this look before training.

    Args:
        images: What to look at.
        shard: This rank's shard, below `shards`.
        shards: Number of ranks that share the work.
        threads: Files decoded at the same time.

    Returns:
        ``PATH (reason)`` for each unreadable file, in the order of the list.
    """
    paths = images.paths()[shard::shards]
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(_why_unreadable, paths)
        return [f"{path} ({why})" for path, why in zip(paths, reasons, strict=True) if why]


def _compare_classes(root: Path, found: Sequence[str], classes: Sequence[str]) -> None:
    lacking = sorted(set(classes) - set(found))
    unknown = sorted(set(found) - set(classes))
    problems = []
    if lacking:
        problems.append(f"class folders of the training set are missing: {_some(lacking)}")
    if unknown:
        problems.append(f"folders that are no training class: {_some(unknown)}")
    if problems:
        raise UserError(f"the classes of {root} are not those of training; " + "; ".join(problems))


def _images_below(root: Path, name: str) -> list[str]:
    images = []
    for folder, subfolders, names in os.walk(root / name, followlinks=True):
        subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
        images += [
            os.path.relpath(os.path.join(folder, file), root)
            for file in names
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
    return sorted(images)


def _why_unreadable(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            # Every byte of a JPEG is still entropy-decoded, which is what finds a truncated file;
            # the scaled inverse transform only makes it about three times faster.
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return f"cannot be decoded: {str(error).replace(repr(path), 'file')}"
    return None


def _some(names: Sequence[str], limit: int = 10) -> str:
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
