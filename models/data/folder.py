"""Lists the images of ImageNet-style folders, and their classes.

Labels are positions in the sorted list of the *training* classes, for every part of the data set.
The folder readers of DALI and torchvision are not used, since they number all folders that they
find. An empty class folder, a hidden folder or ``lost+found`` would silently shift the labels. They
also number the validation classes apart from the training classes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from models.data.walk import EXTENSIONS, Walk, some
from models.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """Images of one part (train or val) of a data set.

    Attributes:
        root: Folder that holds the class folders.
        classes: Names of the training classes, sorted; a label is a position in it.
        files: Paths relative to `root`.
        labels: One label per file.
        notes: Lines for the user: what was left out, and what looks wrong.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)

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
            # Python has surrogates for bytes of a name that are not UTF-8.
            hasher.update(f"{label}\t{file}\n".encode(errors="surrogateescape"))
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
            notes=self.notes,
        )


def check_folder(path: str | Path) -> None:
    """Checks that there is a folder at `path`.

    Raises:
        UserError: There is none, or the system refuses to tell.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the data folder {path}: {reason}") from None
    if not is_folder:
        raise UserError(f"no such data folder: {path}")


def list_images(root: str | Path, classes: Sequence[str] | None = None) -> ImageList:
    """Lists ``root/CLASS/.../image`` with labels; see `Walk` for what is skipped.

    Args:
        root: Folder of class folders.
        classes: The training classes: `root` may lack some, but must have no others. None takes
            the class folders found; use it for the training images only.

    Returns:
        The images, sorted by class and name.

    Raises:
        UserError: `root` is missing or has no class folders; a link in it is broken or leads to a
            folder above; a training class has no images; a class folder is not one of `classes`; a
            folder cannot be read.
    """
    root = Path(root)
    check_folder(root)
    walk = Walk(root)
    found = walk.class_folders()
    if not found:
        raise UserError(f"no class folders in {root}: expected {root}/CLASS/IMAGE.jpg")
    training = classes is None
    classes = tuple(found if classes is None else classes)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        absent = sorted(set(classes) - set(found))
        raise UserError(
            f"the classes of {root} are not those of training; folders that are no training "
            f"class: {some(unknown)}" + (f"; missing: {some(absent)}" if absent else "")
        )

    files: list[str] = []
    labels: list[int] = []
    lacking = []
    for label, name in enumerate(classes):
        images = walk.images_below(name) if name in found else []
        if not images:
            lacking.append(name)
        files += images
        labels += [label] * len(images)
    left_out = [f"left out of {root}: {walk.left_out_text()}"] if walk.left_out else []
    if lacking and (training or not files):
        message = f"class folders without images ({', '.join(EXTENSIONS)}) in {root}: "
        raise UserError("; ".join([message + some(lacking), *left_out]))
    warnings = _odd_classes(classes, lacking)
    second = walk.second_names(files)
    if second:
        warnings.append(f"{len(second)} images are listed twice: {some(second, 3)}")
    return ImageList(
        root=root,
        classes=classes,
        files=tuple(files),
        labels=tuple(labels),
        notes=(*left_out, *(f"warning: {root}: {text}" for text in warnings)),
    )


def _odd_classes(classes: Sequence[str], lacking: Sequence[str]) -> list[str]:
    warnings = []
    if len(classes) == 1:
        warnings.append(f"there is one class only, {classes[0]}: nothing can be learned")
    if lacking:
        there = len(classes) - len(lacking)
        warnings.append(f"holds {there} of {len(classes)} classes; without images: {some(lacking)}")
    by_spelling: dict[str, list[str]] = {}
    for name in classes:
        by_spelling.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(names) for names in by_spelling.values() if len(names) > 1]
    if alike:
        warnings.append(f"classes differ in upper and lower case alone: {some(alike)}")
    return warnings
