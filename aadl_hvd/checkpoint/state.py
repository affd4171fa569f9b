"""The base of all states in a checkpoint: frozen dataclasses that say how they are divided.

A field's annotation holds its kind and its check:

    y: Annotated[Tensor, CELLS, tensor(None, None)]

    SHARED   the same on every rank; enters the fingerprint
    ROWS     tensor [..., rows]
    COLUMNS  tensor [held, ...], a row for every column that the shard holds
    CELLS    tensor [held, rows]
    OWN      known to this rank alone, or not compared
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_type_hints

import numpy as np
from torch import Tensor

from aadl_hvd.checkpoint.plain import plain
from aadl_hvd.errors import CheckpointError
from aadl_hvd.schema import Check, anything, entries, every, instance, refuse

SHARED, ROWS, COLUMNS, CELLS, OWN = "shared", "rows", "columns", "cells", "own"
DIVIDED = ROWS, COLUMNS, CELLS


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """A frozen dataclass whose annotations say how its fields are divided and checked."""

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists, numbers, texts and tensors; tensors are not copied."""
        return {name: _to_plain(getattr(self, name)) for name in _specs(type(self))}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Self:
        """What `to_dict` returned.

        Args:
            data: of any origin: it is checked.
            where: what it is, for messages.

        Raises:
            CheckpointError: an entry is absent, unknown, or has another type or a bad value.
        """
        specs = _specs(cls)
        entries(dict.fromkeys(specs, anything), others=_unknown)(data, where)
        found = {}
        for name, (_, check) in specs.items():
            item, place = _native(data[name]), f"{where}[{name!r}]"
            check(item, place)
            found[name] = check.read(item, place) if isinstance(check, Nested) else item
        return cls(**found)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name, kind and value of each tensor that is divided among ranks; "columns.y", CELLS."""
        for name, (kind, _) in _specs(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, State):
                yield from ((f"{name}.{inner}", k, t) for inner, k, t in value.tensors())
            elif kind in DIVIDED and value is not None:
                yield name, kind, value

    def with_tensors(self, values: Mapping[str, Tensor | None]) -> Self:
        """A copy with other tensors, by the names that `tensors` gives."""
        changes: dict[str, Any] = {}
        for name, value in values.items():
            first, _, rest = name.partition(".")
            if rest:
                inner = changes.get(first, getattr(self, first))
                value = inner.with_tensors({rest: value})
            changes[first] = value
        return dataclasses.replace(self, **changes)

    def shared(self) -> dict[str, Any]:
        """All fields that are the same on every rank."""
        specs = _specs(type(self)).items()
        found = {name: getattr(self, name) for name, (kind, _) in specs if kind == SHARED}
        return {k: v.shared() if isinstance(v, State) else v for k, v in found.items()}

    def fingerprint(self) -> int:
        """A number in [1, 2^36) that shards of one moment have in common, and others do not."""
        same = plain(self.shared(), "shard")  # NumPy's numbers read otherwise than Python's
        digest = hashlib.sha256(repr(_ordered(same)).encode()).digest()
        return 1 + int.from_bytes(digest[:8], "big") % (2**36 - 1)


class Nested:
    """Reads a dict as a `State`; optional: or None; each: as a dict of these, by text."""

    def __init__(self, cls: type[State], optional: bool = False, each: bool = False) -> None:
        self._cls, self._optional, self._each = cls, optional, each

    def __call__(self, value: Any, name: str) -> None:
        """Raises a CheckpointError where `read` could not begin."""
        if self._each:
            every(instance(dict), key=instance(str))(value, name)
        elif value is not None or not self._optional:
            instance(dict)(value, name)

    def read(self, value: Any, name: str) -> Any:
        """What `to_dict` has written."""
        if self._each:
            read = self._cls.from_dict
            return {key: read(item, f"{name}[{key!r}]") for key, item in value.items()}
        return None if value is None else self._cls.from_dict(value, name)


def _specs(cls: type[State]) -> dict[str, tuple[str, Check]]:
    """Kind and check of every field."""
    if cls not in _SPECS:
        hints = get_type_hints(cls, include_extras=True)
        _SPECS[cls] = {f.name: hints[f.name].__metadata__ for f in dataclasses.fields(cls)}
    return _SPECS[cls]


_SPECS: dict[type[State], dict[str, tuple[str, Check]]] = {}


def check_optional(value: Any, name: str, present: bool, check: Check) -> None:
    """`check` where a value must be present; refuses it where it must not be."""
    section, _, field = name.partition(".")
    where = f"history[{section!r}][{field!r}]"
    if present:
        check(value, where)
    elif value is not None:
        refuse(value, where, "None, for nothing was stored")


def agree(what: str, sound: bool) -> None:
    """Raises a CheckpointError where numbers contradict each other."""
    if not sound:
        raise CheckpointError(
            f"Invalid history: it is damaged, its numbers contradict each other ({what})."
        )


def _unknown(value: Any, name: str) -> None:
    refuse(value, name, "absent, for nothing else in the history speaks of it")


def _to_plain(value: Any) -> Any:
    if isinstance(value, State):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, dict) and any(isinstance(item, State) for item in value.values()):
        return {key: item.to_dict() for key, item in value.items()}
    return value


def _native(value: Any) -> Any:
    """Lists as tuples, NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_native, value)) if isinstance(value, list | tuple) else value


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(key, _ordered(value[key])) for key in sorted(value)]
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value
