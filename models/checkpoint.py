"""Checkpoints on disk: complete or absent, never half, and loaded without running their code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds either the old one or the new one, whole.

    Args:
        path: File to write; its folder must exist.
        state: Tensors and plain Python values, which `load` can read back.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch trips over the file that it cannot finish
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        partial.unlink(missing_ok=True)
    # The new name is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such checkpoint: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint") from None
    except Exception as error:  # the unpickler trips over garbage in many ways
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot read checkpoint {path}: {why}") from error
    if not isinstance(state, dict) or "identity" not in state:
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
