"""Checkpoints of the training program, in files of the library: whole or absent."""

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
_LONGEST = 500  # characters of what others say: torch lists every weight of another model

# What an entry has to be, in words and as a test; what is within is examined by those who load it.
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
    """Writes a checkpoint so that `path` holds either the old one or the new one, whole.

    Args:
        path: File to write; its folder must exist.
        state: Tensors and plain Python values, which `load` can read back.

    Raises:
        UserError: Something in `state` could not be read back; names it.
        OSError: It cannot be written.
    """
    _write(path, {"format": FORMAT, **state})


def part_of(path: Path, step: int, rank: int) -> Path:
    """Where a rank's part of the history is that belongs to the checkpoint `path` of a step."""
    return path.with_name(f"{path.stem}.{step}.{rank}.part")


def save_part(path: Path, part: dict[str, Any]) -> None:
    """Writes what `sharded_state_dict` returned, and of which checkpoint it is; as `save`."""
    _write(path, part)


def load_part(path: Path) -> dict[str, Any]:
    """Reads what `save_part` wrote.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def remove_parts(path: Path, rank: int, *, but: Path | None) -> None:
    """Removes a rank's parts that belong to checkpoints `path` of other steps."""
    for part in path.parent.glob(f"{path.stem}.*.{rank}.part"):
        if part != but:
            part.unlink(missing_ok=True)


def load(path: Path, *, expected: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Args:
        path: What `save` wrote.
        expected: What this run is made of, compared with the checkpoint's "identity".

    Returns:
        The state.

    Raises:
        UserError: The file is missing, damaged, no checkpoint, from another version, or from a run
            with another identity; names each difference.
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
            f"no checkpoint can be written to {path}, what was there still is: {error}"
        ) from error


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around all that takes in what was read: what does not fit trips it in many ways.

    Raises:
        UserError: In one line, naming the file, whatever was raised.
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
