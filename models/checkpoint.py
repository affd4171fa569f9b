"""Checkpoints of the training program, in files of the library: whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aadl_hvd import CheckpointError, checkpoint
from models.errors import UserError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds either the old one or the new one, whole.

    Args:
        path: File to write; its folder must exist.
        state: Tensors and plain Python values, which `load` can read back.
    """
    checkpoint.save(path, {"format": FORMAT, **state})


def part_of(path: Path, step: int, rank: int) -> Path:
    """Where a rank's part of the history is that belongs to the checkpoint `path` of a step."""
    return path.with_name(f"{path.stem}.{step}.{rank}.part")


def save_part(path: Path, part: dict[str, Any]) -> None:
    """Writes what `sharded_state_dict` returned."""
    checkpoint.save(path, part)


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
        UserError: The file is missing, no checkpoint, from another version, or from a run with
            another identity; names each difference.
    """
    try:
        state = checkpoint.load(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if "identity" not in state:
        raise UserError(f"{path} is no checkpoint of this program")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}; this program reads {FORMAT}")
    saved = state["identity"]
    different = [
        f"{key} was {saved.get(key)!r}, is {value!r}"
        for key, value in expected.items()
        if saved.get(key) != value
    ]
    if different:
        raise UserError(f"{path} is from another run: " + "; ".join(different))
    return state
