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

# Suffixes that both loaders read, so that the images do not change with the loader.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".pnm", ".ppm", ".pgm", ".pbm"),
)
# Folders made by file systems, by archives of macOS, and by network storage for thumbnails.
NO_CLASS = frozenset({"lost+found", "__MACOSX", "@eaDir"})


class Walk:
    """Goes through the class folders of one part of a data set.

    Hidden files and folders, `NO_CLASS`, and files without a suffix of `EXTENSIONS` are skipped.
    Links to folders are followed. But within a class no folder is listed twice, and no folder
    that holds the class is listed.
    """

    def __init__(self, root: Path) -> None:
        """Lists nothing yet; `root` must be a folder."""
        self.root = root
        self.left_out: Counter[str] = Counter()
        top = root.resolve()
        self._above = {_identity(os.stat(folder)) for folder in (top, *top.parents)}
        # Device and inode of each image, in the order of the list; hashed to save memory.
        self._identities = array("q")

    def class_folders(self) -> list[str]:
        """Sorted names of the class folders.

        Raises:
            UserError: `root` cannot be read; a link in it is broken, so a class may be lost; or a
                link leads to a folder above, so it would hold the other classes.
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
            name: The class.

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
                if not entry.is_file(follow_symlinks=False):  # a regular file needs no stat call
                    identity, mode = _follow(entry) or (identity, 0)
                if stat.S_ISDIR(mode):
                    # Links last: a folder that can be reached without one keeps its own path.
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
            files: Results of `images_below` for all classes, in turn.

        Returns:
            One ``path and path`` for each further name.
        """
        identities = np.frombuffer(self._identities, np.int64)
        order = np.argsort(identities, kind="stable")
        again = np.flatnonzero(np.diff(identities[order]) == 0)
        return [f"{files[order[i]]} and {files[order[i + 1]]}" for i in again]

    def _entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """Returns the entries sorted by name, without those that are always skipped."""
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
    """Returns identity and mode of a link's target; None if the link is broken."""
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
