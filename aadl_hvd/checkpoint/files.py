"""Checkpoint files: written in full or not at all.

They hold tensors and plain types alone (`checkpoint.plain`): reading one runs none of its code.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aadl_hvd.checkpoint.format import FORMAT, check_format
from aadl_hvd.checkpoint.plain import plain
from aadl_hvd.errors import CheckpointError

MARK = "aadl_hvd_file"


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds the old one or the new one, whole.

    What is saved can be loaded: what has a plain equivalent is written so, the rest is refused.

    - As they are: None, bool, int up to 2039 bits, float, complex, str, bytes; dict, OrderedDict,
      Counter, list, tuple, set of these; tensors, sparse and quantized ones too, and parameters,
      with their attributes; torch.Size, dtypes, devices.
    - NumPy's numbers become Python's, NumPy's arrays tensors of the same dtype. NumPy's random
      states can be set again with what `load` returns.
    - Paths become str. Other classes derived from the above, such as IntEnum, defaultdict,
      namedtuple or a class of tensors, become what they are derived from; frozenset becomes set.
    - Keys of dicts are numbers, texts, bytes, None, dtypes, devices, and tuples of these.
    - Refused: other objects, such as namespaces, dates, plain enums, functions; tensors without
      numbers of their own (DTensor, meta device); what contains itself or is 64 levels deep.

    Args:
        path: file to write; its folder must exist. Other ranks, other paths.
        state: as above; it is not changed, and tensors are not copied. `torch.load` reads the
            file, too.

    Raises:
        CheckpointError: an entry is refused: says where it is, its type, and what to save instead.
        OSError: the disk is full, the folder is missing.
        In either case what was at `path` is still there.
    """
    path = Path(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"Invalid state, of type {type(state).__name__}. Must be a dict.")
    content = plain(dict(state), "state")
    mark = content.setdefault(MARK, FORMAT)  # torch.load leaves it in what it reads
    if type(mark) is not int or mark != FORMAT:
        raise CheckpointError(f"Invalid state[{MARK!r}]. Must be absent: the name is taken.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
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


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote, to host memory.

    Raises:
        CheckpointError: missing, damaged, not written by `save`, or by another version.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums it writes
            if (entry := file.testzip()) is not None:
                raise CheckpointError(f"cannot read checkpoint {path}: {entry} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except Exception as error:  # the unpickler trips over garbage in many ways
        raise CheckpointError(f"cannot read checkpoint {path}: {_why_unread(error)}") from error
    if not isinstance(state, dict) or MARK not in state:
        raise CheckpointError(f"{path} was not written by aadl_hvd.checkpoint.save")
    check_format(str(path), state.pop(MARK))
    return state


def _why_unread(error: Exception) -> str:
    """In one line; torch explains at length what else could be done."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it holds {found[1]}, and only tensors and plain values are read. If you trust the "
            "file: state = torch.load(path, weights_only=False), which runs its code, and "
            "aadl_hvd.checkpoint.save(path, state)"
        )
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", text):
        text = found[1]
    return text.partition("\n")[0] or type(error).__name__
