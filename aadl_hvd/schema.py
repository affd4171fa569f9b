"""What nested values must look like, written down as it looks.

    CHECK = entries({"calls": integer(), "noise": optional(number(-1.0, 1.0))})
    CHECK(value, "history['replicated']")

A check raises a CheckpointError that names the place; it changes nothing and reads no more than it
must.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.errors import CheckpointError

Check = Callable[[Any, str], None]

FLOATING = torch.float64, torch.float32, torch.bfloat16, torch.float16
_LARGEST = 2**63 - 1


def refuse(value: Any, name: str, wanted: str) -> None:
    """Raises a CheckpointError; a tensor is described, whatever else is long is cut."""
    if isinstance(value, Tensor):
        text = f"{value.dtype} tensor {list(value.shape)} on {value.device}, {value.layout}"
    else:
        text = repr(value)
        text = text if len(text) <= 60 else f"{text[:60]}..."
    raise CheckpointError(f"Invalid {name}={text}: it is damaged. Must be {wanted}.")


def anything(value: Any, name: str) -> None:
    """For what is checked elsewhere, or by nobody."""


def integer(low: int = 0, high: int = _LARGEST) -> Check:
    """A plain int, no bool."""

    def check(value: Any, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(value, name, f"an integer from {low} to {high}")

    return check


def number(low: float = -math.inf, high: float = math.inf, finite: bool = True) -> Check:
    """A float or int; NaN and infinities only where `finite` is False."""

    def check(value: Any, name: str) -> None:
        ok = isinstance(value, float | int) and not isinstance(value, bool)
        ok = ok and (isinstance(value, float) or abs(value) <= _LARGEST)
        if ok and (math.isfinite(value) or finite):
            ok = math.isfinite(value) and low <= value <= high
        if not ok:
            kind = "a finite number" if finite else "a number"
            refuse(value, name, f"{kind} from {low} to {high}")

    return check


def instance(*types: type) -> Check:
    """An instance of one of these types."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, types):
            refuse(value, name, " or ".join(t.__name__ for t in types))

    return check


def one_of(*values: Hashable) -> Check:
    """One of these values, and of its type."""

    def check(value: Any, name: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            refuse(value, name, f"one of {values}")

    return check


def optional(inner: Check) -> Check:
    """None or what else is checked."""

    def check(value: Any, name: str) -> None:
        if value is not None:
            inner(value, name)

    return check


def tensor(
    *shape: int | None, dtypes: tuple[torch.dtype, ...] = FLOATING, finite: bool = False
) -> Check:
    """A dense tensor in host memory.

    Args:
        shape: its lengths; None: any.
        dtypes: one of these.
        finite: neither NaN nor infinite anywhere.
    """

    def check(value: Any, name: str) -> None:
        ok = isinstance(value, Tensor) and value.layout == torch.strided
        ok = ok and value.device.type == "cpu" and value.dtype in dtypes
        ok = ok and value.dim() == len(shape)
        ok = ok and all(own in (None, n) for own, n in zip(shape, value.shape, strict=True))
        if ok and finite:
            ok = bool(value.isfinite().all())
        if not ok:
            lengths = ", ".join("any" if n is None else str(n) for n in shape)
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            refuse(value, name, f"{'finite, ' * finite}of shape [{lengths}] and one of {names}")

    return check


def listed(inner: Check, length: int | None = None, most: int | None = None) -> Check:
    """A list or tuple of what is alike; `length`: of exactly so many, `most`: of no more."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, list | tuple):
            refuse(value, name, "a list")
        if length not in (None, len(value)) or (most is not None and len(value) > most):
            refuse(value, name, f"a list of {f'{length}' if most is None else f'at most {most}'}")
        for i, item in enumerate(value):
            inner(item, f"{name}[{i}]")

    return check


def sequence(*inner: Check) -> Check:
    """A list or tuple of what differs from place to place."""

    def check(value: Any, name: str) -> None:
        listed(anything, len(inner))(value, name)
        for i, (item, own) in enumerate(zip(value, inner, strict=True)):
            own(item, f"{name}[{i}]")

    return check


def entries(
    wanted: Mapping[str, Check],
    possible: Mapping[str, Check] | None = None,
    others: Check = anything,
) -> Check:
    """A dict with entries that must be there, some that may be, and `others`."""
    known = {**wanted, **(possible or {})}

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            refuse(value, name, "a dict")
        if absent := sorted(wanted.keys() - value.keys()):
            raise CheckpointError(
                f"Invalid {name}: it is damaged, or something else than that: it lacks {absent}."
            )
        for key, item in value.items():
            known.get(key, others)(item, f"{name}[{key!r}]")

    return check


def every(inner: Check, key: Check = anything) -> Check:
    """A dict of what is alike."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            refuse(value, name, "a dict")
        for own, item in value.items():
            key(own, f"a key of {name}")
            inner(item, f"{name}[{own!r}]")

    return check
