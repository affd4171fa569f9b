"""The options of the training program: type, default and allowed values."""

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
        name: Name with underscores.
        group: Its heading in --help.
        help: Its text in --help.
        default: Default value. None: there is none, or it is None.
        kind: The type of its values: bool, int, float, str or tuple (of floats).
        takes_none: The word "none" is allowed; it means None, or the empty tuple.
        choices: Allowed values; empty for any.
        least: Smallest allowed value.
        most: Largest allowed value.
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
        default: Default of the field.
        help: Text in --help.
        choices: Allowed values; empty for any.
        none: Meaning of the word "none", for --help; None: the option does not take it.
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
        name: The field's name, for the error.
        annotation: As `typing.get_type_hints` returns it.

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
    """Returns an option's name as it is typed, without the leading dashes."""
    return name.replace("_", "-")


def shown(value: Any) -> str:
    """Returns a setting's value as a user would type it."""
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
    """Replaces options in a message by the keys of the YAML file that they came from.

    Args:
        message: Message that names settings as options of the command line.
        file: The YAML file.
        keys: The keys in it, by the options' names.
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
