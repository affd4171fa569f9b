"""The files in a training's folder, and what a second training may do with them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container
from pathlib import Path

from models.errors import UserError

LAST, BEST, SETTINGS, TENSORBOARD = "last.pt", "best.pt", "settings.yaml", "tensorboard"
SUMMARY, SUMMARY_TEXT, PLOT = "summary.json", "summary.txt", "training.png"
FINISHED = (SUMMARY, SUMMARY_TEXT, PLOT)

# In the order of removal. The checkpoint goes first: if removal is interrupted, no training can
# resume from an incomplete folder.
_FILES = (
    r"last\.pt",
    r"best\.pt|last\.\d+\.\d+\.part",
    r"\.(last\.pt|best\.pt|last\.\d+\.\d+\.part)\.\d+\.partial",
    "|".join(map(re.escape, FINISHED)),
    r"(steps|epochs)\.(csv|partial)",
    re.escape(SETTINGS),
)
_EVENTS = r"events\.out\.tfevents\..*"
_MARK = "# All settings of the training here; python -m models.train --config reads them back."


def claim(folder: Path, resume: str | None, overwrite: bool) -> str | None:
    """Makes the folder. Refuses one with a training that the new one would mix with or replace.

    Nothing is removed here: see `clear`.

    Args:
        folder: Output folder of the training.
        resume: Checkpoint to resume from; "auto" for `LAST`, if it exists; None to begin.
        overwrite: The training that `folder` holds may be removed.

    Returns:
        A notice for the user, or None.

    Raises:
        UserError: The folder cannot be made or written to, or holds a training that the new one
            does not resume.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = contents(folder)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to the folder {folder}")
    if overwrite and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        raise UserError(
            "--overwrite is given in a job that was queued again: it would remove what the job has "
            "trained so far; give --resume auto"
        )
    if overwrite:
        _check_removable(there)
    if not there or overwrite:
        return None
    holds = f"--out {folder} holds a training already ({_named(folder, there)})"
    names = {path.name for path in there}
    afresh = "--overwrite to remove these and begin afresh, or another --out"
    if resume is None:
        go_on = "--resume auto to go on with it, " if LAST in names else ""
        raise UserError(f"{holds}: give {go_on}{afresh}")
    if resume != "auto":
        if os.path.realpath(Path(resume).parent) != os.path.realpath(folder):
            raise UserError(
                f"{holds}, and --resume {resume} is of another folder: give another --out, or "
                "--resume auto to go on with the training there"
            )
        return None
    if LAST in names:
        return None
    if not names.isdisjoint(FINISHED):
        raise UserError(f"{holds}, but no {LAST} to go on from: give {afresh}")
    _check_removable(there)
    return (
        f"{folder} holds no {LAST} to go on from: the training begins, and replaces the files of "
        f"one that ended before its first checkpoint ({_named(folder, there)})"
    )


def _check_removable(paths: list[Path]) -> None:
    """Raises a UserError for paths that `clear` could not remove after the first steps."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise UserError(
                f"cannot replace {path}, which is a folder: remove it, or give another --out"
            )


def clear(folder: Path, known: Container[Path] | None = None) -> str:
    """Removes the files of a training from its folder, and nothing else.

    Args:
        folder: An existing folder.
        known: Result of `contents` at the start; None: all that is there now.

    Returns:
        The names of the removed files; empty if there were none.

    Raises:
        UserError: There are files that were not known; then nothing is removed. Or a file cannot be
            removed; then some may be gone.
    """
    there = contents(folder)
    if known is not None and (new := [path for path in there if path not in known]):
        raise UserError(
            f"--out {folder} holds files that are newer than this training "
            f"({_named(folder, new)}): another one writes there; give another --out"
        )
    for path in there:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from None
    return _named(folder, there)


def write_settings(folder: Path, settings: str, say: Callable[[str], None]) -> None:
    """Writes `SETTINGS`, which ``--config`` reads back. If that fails, it only warns.

    Args:
        folder: An existing folder.
        settings: The settings as YAML.
        say: Called with a warning.
    """
    path = folder / SETTINGS
    try:
        if path.exists() and not _is_ours(path):
            say(f"warning: the settings were not written: {path} is a file of your own")
        else:
            path.write_text(f"{_MARK}\n{settings}", encoding="utf-8")
    except OSError as error:
        say(f"warning: the settings were not written to {path}: {error}")


def contents(folder: Path) -> list[Path]:
    """The files of a training in `folder`."""
    found = []
    names = sorted(os.listdir(folder))
    for pattern in _FILES:
        found += [folder / name for name in names if re.fullmatch(pattern, name)]
    board = folder / TENSORBOARD
    if board.is_dir():
        found += [board / n for n in sorted(os.listdir(board)) if re.fullmatch(_EVENTS, n)]
    return [path for path in found if path.name != SETTINGS or _is_ours(path)]


def _is_ours(path: Path) -> bool:
    """Whether this program wrote the settings: a user's file may have the same name."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\n") == _MARK
    except OSError:
        return False


def _named(folder: Path, paths: list[Path], limit: int = 8) -> str:
    names = list(dict.fromkeys(path.relative_to(folder).parts[0] for path in paths))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
