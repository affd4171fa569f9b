"""The version of what is saved, and what is no such thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from aadl_hvd.errors import AndersonError, CheckpointError

FORMAT = 6  # of files and of the entry "anderson" of a state_dict


def check_format(what: str, found: Any) -> None:
    """Raises a CheckpointError, in one line, where another version has written it."""
    if type(found) is int and found == FORMAT:
        return
    age = "a newer" if type(found) is int and found > FORMAT else "an older"
    raise CheckpointError(
        f"Invalid format of {what}: {found!r}. Must be {FORMAT}: it was written by {age} version "
        "of aadl_hvd, or is damaged. Load it with the version that wrote it, or train anew."
    )


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """What is not as it should be trips those who read it in many ways: a CheckpointError here."""
    try:
        yield
    except (AndersonError, torch.cuda.OutOfMemoryError):
        raise
    except _TRIPPED as error:
        raise CheckpointError(
            f"Invalid {what}: damaged, or not of aadl_hvd ({type(error).__name__}: {error})."
        ) from error


_TRIPPED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError),
    RuntimeError,  # NotImplementedError among them
)
