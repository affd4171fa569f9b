"""Checkpoint files of the training program. Writes are atomic."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from aadl_hvd import CheckpointError, checkpoint
from models.errors import UserError

FORMAT = 1
_LONGEST = 500  # characters of an error that are shown: torch lists every weight that does not fit

# Type of an entry, in words and as a test. Whoever loads the entry checks its content.
_Wanted = tuple[str, Callable[[Any], bool]]
_COUNT: _Wanted = ("a whole number from 0", lambda x: type(x) is int and x >= 0)
_DICT: _Wanted = ("a dict", lambda x: isinstance(x, dict))
_TENSOR: _Wanted = ("a tensor", lambda x: isinstance(x, torch.Tensor))
_WANTED: dict[str, _Wanted] = {
    "identity": _DICT,
    "epoch": _COUNT,
    "step": _COUNT,
    "best": ("a number from 0 to 1", lambda x: isinstance(x, (int, float)) and 0 <= x <= 1),
    "model": _DICT,
    "optimizer": _DICT,
    "scaler": (
        "a dict of numbers",
        lambda x: isinstance(x, dict) and all(isinstance(y, (int, float)) for y in x.values()),
    ),
    "ranks": (
        "a list of dicts",
        lambda x: isinstance(x, list) and all(isinstance(own, dict) for own in x),
    ),
}
_WANTED_OF_RANK: dict[str, _Wanted] = {
    "data": _DICT,
    "torch": _TENSOR,
    "cuda": ("None or a tensor", lambda x: x is None or isinstance(x, torch.Tensor)),
    "python": ("a tuple", lambda x: isinstance(x, tuple)),
}


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: `path` holds the whole old one or the whole new one.

    Args:
        path: File to write; its folder must exist.
        state: Tensors and plain Python values, which `load` can read back.

    Raises:
        UserError: An entry of `state` could not be read back; the message names it.
        OSError: The file cannot be written.
    """
    _write(path, {"format": FORMAT, **state})


def part_of(path: Path, step: int, rank: int) -> Path:
    """Returns the file of a rank's part of the history for the checkpoint `path` of a step."""
    return path.with_name(f"{path.stem}.{step}.{rank}.part")


def save_part(path: Path, part: dict[str, Any]) -> None:
    """Writes a rank's `sharded_state_dict` and the mark of its checkpoint. Raises as `save`."""
    _write(path, part)


def load_part(path: Path) -> dict[str, Any]:
    """Reads a file that `save_part` wrote.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def remove_parts(path: Path, rank: int, *, but: Path | None) -> None:
    """Removes all of a rank's parts for the checkpoint `path`, except the file `but`."""
    for part in path.parent.glob(f"{path.stem}.*.{rank}.part"):
        if part != but:
            part.unlink(missing_ok=True)


def load(path: Path, *, expected: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Args:
        path: File that `save` wrote.
        expected: Identity of this run; the checkpoint's "identity" must be equal.

    Returns:
        The state.

    Raises:
        UserError: The file is missing, damaged, no checkpoint, from another version, or from a run
            with another identity. The message names each difference.
    """
    try:
        state = checkpoint.load(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if not {"format", "identity"} <= state.keys():
        raise UserError(f"{path} is no checkpoint of this program")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise UserError(f"{path} has format {_shown(state['format'])}; this program reads {FORMAT}")
    with fitting(path):
        _check("", state, _WANTED)
        for rank, own in enumerate(state["ranks"]):
            _check(f"rank {rank}", own, _WANTED_OF_RANK)
        saved = state["identity"]
        different = [*_differences(saved, expected)]
    if different:
        raise UserError(f"{path} is from another run: " + "; ".join(different))
    return state


def _differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for key, value in expected.items():
        before = saved.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            yield from (f"{key} {text}" for text in _differences(before, value))
        elif before != value:
            yield f"{key} was {before!r}, is {value!r}"


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        checkpoint.save(path, state)
    except CheckpointError as error:
        raise UserError(
            f"no checkpoint can be written to {path}, any earlier one is kept: {error}"
        ) from error


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Context for loading a state: one that does not fit raises many kinds of errors.

    Raises:
        UserError: For any error inside, in one line that names the file.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        text = " ".join(str(error).split())
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        raise UserError(f"{path} is damaged or of another model: {kind}{text}") from error


def _check(of: str, found: Mapping[str, Any], wanted: Mapping[str, _Wanted]) -> None:
    of = f" of {of}" if of else ""
    for name, (kind, fits) in wanted.items():
        if name not in found:
            raise UserError(f"it is damaged, it lacks {name!r}{of}")
        if not fits(found[name]):
            raise UserError(
                f"it is damaged, {name!r}{of} is {_shown(found[name])} and must be {kind}"
            )


def _shown(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())
