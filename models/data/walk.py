"""Finds the images below a folder of class folders, and counts what is left out, by kind."""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.errors import UserError

# What both loaders take, so that the images do not change with the loader.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".pnm", ".ppm", ".pgm", ".pbm"),
)
# Made by file systems, by archives of macOS and by network storage; the last holds thumbnails.
NO_CLASS = frozenset({"lost+found", "__MACOSX", "@eaDir"})


class Walk:
    """Goes through the class folders of one part of a data set.

    Hidden files and folders and `NO_CLASS` are passed over, and so are files that are no images by
    their names. Links to folders are followed; but within a class no folder is listed twice, and
    none is that holds the class.
    """

    def __init__(self, root: Path) -> None:
        """Reads nothing of `root` yet, which has to be a folder."""
        self.root = root
        self.left_out: Counter[str] = Counter()
        top = root.resolve()
        self._above = {_identity(os.stat(folder)) for folder in (top, *top.parents)}
        # Of each image, in the order of the list; hashed, since there may be millions.
        self._identities = array("q")

    def class_folders(self) -> list[str]:
        """Sorted names of the class folders.

        Raises:
            UserError: `root` cannot be read; or a link in it leads nowhere, so that a class may be
                lost, or to a folder above, so that it would hold the other classes.
        """
        found, astray = [], []
        for entry in self._entries(self.root):
            try:
                status = entry.stat()
            except OSError as error:
                astray.append(f"{entry.name} -> {_target(entry)} ({error.strerror})")
                continue
            if not stat.S_ISDIR(status.st_mode):
                beside = " beside the class folders" if _is_image(entry.name) else ""
                self.left_out[_kind(entry.name) + beside] += 1
            elif _identity(status) in self._above:
                astray.append(f"{entry.name} -> {_target(entry)} (a folder above it)")
            else:
                found.append(entry.name)
        if astray:
            raise UserError(
                f"{self.root} has links that cannot be class folders; fix or remove them: "
                + some(astray)
            )
        return found

    def images_below(self, name: str) -> list[str]:
        """Lists a class folder.

        Args:
            name: Of the class.

        Returns:
            Sorted paths relative to `root`.

        Raises:
            UserError: A folder cannot be read. Images would be lost.
        """
        images: list[tuple[str, int]] = []
        seen, folders = set(self._above), [os.path.join(self.root, name)]
        while folders:
            folder = folders.pop()
            own = _identity(os.stat(folder))
            if own in seen:
                self.left_out["links to folders listed already"] += 1
                continue
            seen.add(own)
            for entry in self._entries(folder):
                identity, mode = (own[0], entry.inode()), stat.S_IFREG
                if not entry.is_file(follow_symlinks=False):  # else the folder told all of this
                    identity, mode = _follow(entry) or (identity, 0)
                if stat.S_ISDIR(mode):
                    # Links last: what can be reached without them keeps its own name.
                    folders.insert(0 if entry.is_symlink() else len(folders), entry.path)
                elif not mode and not _is_image(entry.name):
                    self.left_out["links to nothing"] += 1
                elif mode and not stat.S_ISREG(mode):
                    self.left_out["no regular files"] += 1
                elif not _is_image(entry.name):
                    self.left_out[_kind(entry.name)] += 1
                else:
                    images.append((os.path.relpath(entry.path, self.root), hash(identity)))
        images.sort()
        self._identities.extend(identity for _, identity in images)
        return [path for path, _ in images]

    def left_out_text(self) -> str:
        """``99 .gif, 3 hidden``; empty if nothing was left out."""
        return some([f"{count} {kind}" for kind, count in self.left_out.most_common()])

    def second_names(self, files: Sequence[str]) -> list[str]:
        """Finds files that are listed under several names.

        Args:
            files: What `images_below` returned, of all classes in turn.

        Returns:
            One ``path and path`` for each further name.
        """
        identities = np.frombuffer(self._identities, np.int64)
        order = np.argsort(identities, kind="stable")
        again = np.flatnonzero(np.diff(identities[order]) == 0)
        return [f"{files[order[i]]} and {files[order[i + 1]]}" for i in again]

    def _entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """All entries by name, but for those that are always passed over."""
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise _unreadable(folder, error) from None
        kept = []
        for entry in entries:
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif entry.name in NO_CLASS:
                self.left_out[entry.name] += 1
            else:
                kept.append(entry)
        return kept


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first few of many names."""
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def _follow(entry: os.DirEntry[str]) -> tuple[tuple[int, int], int] | None:
    """Identity and mode of what a link leads to; None if that is nothing."""
    try:
        status = entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise _unreadable(entry.path, error) from None
    return _identity(status), status.st_mode


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror}")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _target(entry: os.DirEntry[str]) -> str:
    return os.readlink(entry.path) if entry.is_symlink() else entry.path
