"""What an option of the training program is: its type, its default and what it allows."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aadl_hvd.config import HISTORY_DTYPES
from models.errors import UserError

NONE = "none"
"""The word that stands for None, and for an empty list."""

_KINDS = (bool, int, float, str, tuple)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line, and a key of YAML files.

    Attributes:
        name: With underscores.
        group: Its heading in --help.
        help: What it is.
        default: None where it has none, or where None is the default.
        kind: The type of its values: bool, int, float, str or tuple (of floats).
        takes_none: The word "none" is a value: None, or the empty tuple.
        choices: All values it may have; empty for any.
        least: Smallest value it may have.
        most: Largest value it may have.
        above: The value has to be larger than this.
    """

    name: str
    group: str
    help: str
    default: Any
    kind: type
    takes_none: bool = False
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None

    def check(self, value: Any) -> None:
        """Checks a value that has the right type.

        Raises:
            UserError: The value is not allowed. The message names it and what is allowed.
        """
        if value is None:
            return
        option = f"--{dashed(self.name)}"
        if self.choices and value not in self.choices:
            allowed = ", ".join((*self.choices, NONE) if self.takes_none else self.choices)
            raise UserError(f"{option} is {value!r}, must be one of {allowed}")
        for number in value if isinstance(value, tuple) else (value,):
            if self.least is not None and not number >= self.least:
                raise UserError(f"{option} is {shown(number)}, must be at least {self.least:g}")
            if self.most is not None and not number <= self.most:
                raise UserError(f"{option} is {shown(number)}, must be at most {self.most}")
            if self.above is not None and not number > self.above:
                also = f", or {NONE}" if self.takes_none else ""
                raise UserError(f"{option} is {shown(number)}, must be above {self.above:g}{also}")
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{option} is {number}, must be finite")


def declare(
    group: str,
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    *,
    none: str | None = None,
    **limits: float,
) -> Any:
    """Declares a field of a dataclass that is an option: see `options_of`.

    Args:
        group: Heading in --help.
        default: Of the field.
        help: What it is.
        choices: All values it may have.
        none: What the word "none" stands for; None: the option does not take it.
        limits: `least`, `most` or `above`.
    """
    if none is not None:
        help += f"; {NONE}: {none}"
    option = {"group": group, "help": help, "choices": tuple(choices), **limits}
    option["takes_none"] = none is not None
    return dataclasses.field(default=default, metadata={"option": option})


def options_of(cls: type) -> dict[str, Option]:
    """The options that a dataclass declares, by name."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Option(
            name=field.name,
            default=field.default,
            kind=kind_of(field.name, hints[field.name])[0],
            **field.metadata["option"],
        )
        for field in dataclasses.fields(cls)
        if "option" in field.metadata
    }


def kind_of(name: str, annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """Reads the annotation of a field.

    Args:
        name: Of the field, for the error.
        annotation: As `typing.get_type_hints` gives it.

    Returns:
        The kind of option (see `Option`), the values of a `Literal`, and whether None is a value.

    Raises:
        TypeError: No option can have this type.
    """
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    takes_none = types.NoneType in parts
    part = next(part for part in parts if part is not types.NoneType)
    if typing.get_origin(part) is typing.Literal:
        return str, typing.get_args(part), takes_none
    if part is torch.dtype:
        return str, tuple(HISTORY_DTYPES), takes_none
    kind = typing.get_origin(part) or part
    if kind not in _KINDS:
        raise TypeError(f"the field {name} is of type {annotation}, which no option can have")
    return kind, (), takes_none


def dashed(name: str) -> str:
    """An option's name as it is typed, without the dashes before it."""
    return name.replace("_", "-")


def shown(value: Any) -> str:
    """A setting's value as its user would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value)) or NONE
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return NONE if value is None else str(value)


def as_typed(message: str, file: str, keys: Mapping[str, str]) -> str:
    """Names what came from a YAML file as it stands there.

    Args:
        message: Names settings as options of the command line.
        file: The YAML file.
        keys: By option, the key in it.
    """
    pattern = "|".join(rf"--{dashed(name)}\b(?!-)" for name in keys) or "(?!)"
    begins, said = re.match(pattern, message), False

    def key(match: re.Match[str]) -> str:
        nonlocal said
        where = "" if begins or said else f" (in {file})"
        said = True
        return keys[match[0].removeprefix("--").replace("-", "_")] + where

    message = re.sub(pattern, key, message)
    return f"{file}: {message}" if begins else message
