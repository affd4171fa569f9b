"""The options ``--anderson-...``: one for each field of `AndersonConfig`.

Nothing about a field is repeated here. Types, allowed words and defaults come from the fields of
the dataclass, and the help comes from the section "Args" of its docstring.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from typing import Any, Final

from aadl_hvd import AndersonConfig
from aadl_hvd.config import DROPPED
from models.options import NONE, Option, dashed, kind_of, shown

PREFIX: Final = "anderson_"
GROUP: Final = "Anderson acceleration"

# `--anderson off` replaces it: the program then uses Horovod's own optimizer.
LEFT_OUT: Final = ("enabled",)
# Values that are not offered: the program calls `step` without the closure that "loss" needs.
_NOT_OFFERED: Final = {"safeguard": "loss"}


def anderson_options(config: type[AndersonConfig] = AndersonConfig) -> dict[str, Option]:
    """Returns the options by name, prefix included.

    Args:
        config: `AndersonConfig`; a test passes a class with one more field.
    """
    hints, texts = typing.get_type_hints(config), _documented(config)
    paper = config.paper("resnet50").to_dict()
    options = {}
    for field in dataclasses.fields(config):
        if field.name in LEFT_OUT:
            continue
        name = PREFIX + field.name
        kind, choices, takes_none = kind_of(field.name, hints[field.name])
        text, without = texts[field.name], _NOT_OFFERED.get(field.name)
        if without is not None:
            text = re.sub(rf'"{without}": .*?(?="\w+": |$)', "", text)
        default = f"default: {shown(field.default)}"
        if paper[field.name] != config().to_dict()[field.name]:
            default += f"; with --anderson paper: {shown(paper[field.name])}"
        options[name] = Option(
            name=name,
            group=GROUP,
            help=f"{_in_options(text)} ({default})",
            default=None,
            kind=kind,
            takes_none=takes_none or kind is tuple,
            choices=tuple(word for word in choices if word != without),
        )
    return options


def _documented(config: type) -> dict[str, str]:
    """Returns by name the entries of the section "Args" of a class's docstring."""
    text = inspect.getdoc(config) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.split(r"^ {4}(\w+): ", section[1] if section else "", flags=re.MULTILINE)[1:]
    return {
        name: " ".join(words.split())
        for name, words in zip(entries[::2], entries[1::2], strict=True)
    }


def _in_options(text: str) -> str:
    """Rewrites a text about Python parameters for the command line."""
    text = re.sub(r'"(\w+)"', r"\1", text.replace("`", ""))
    text = re.sub(r"\bNone\b|(?<!\w)\(\)", NONE, text)
    return with_options(text).rstrip(". ")


def with_options(text: str) -> str:
    """Replaces each ``parameter=value`` of a text by the option and its value."""
    fields = {field.name for field in dataclasses.fields(AndersonConfig)}

    def option(match: re.Match[str]) -> str:
        if match[1] not in fields:
            return match[0]
        value = NONE if match[2] in ("()", "None") else match[2].strip("'\"")
        return f"--{dashed(PREFIX + match[1])} {value}"

    return re.sub(r"(\w+)=((?:[^\s,;.:]|\.(?=\d))+)", option, text)


def by_option(error: Exception) -> str:
    """Returns a library error's text with options in place of parameters."""
    text = str(error)
    parts = re.fullmatch(r"Invalid (\w+)=(.*?)( with .*?)?\. Must (.*?)\.?", text, re.DOTALL)
    if parts is None or parts[1] not in {f.name for f in dataclasses.fields(AndersonConfig)}:
        return with_options(text)
    name, value, combined, must = parts.groups()
    for old, new in (
        ("be an integer >=", "be >="),
        ("a tuple of ", ""),
        (">= ", "at least "),
        ("<= ", "at most "),
        ("> ", "above "),
        ("< ", "below "),
        ("None", NONE),
    ):
        must = must.replace(old, new)
    rest = with_options(f"{combined or ''}, must {must}")
    return f"--{dashed(PREFIX + name)} is {_value(value)}{rest}"


def advice_for(name: str) -> str | None:
    """Returns advice on an option that only earlier versions had; None for any other name.

    Args:
        name: The option's name, with underscores and the prefix.
    """
    advice = DROPPED.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return None if advice is None else with_options(advice)


def _value(text: str) -> str:
    """Converts a value from Python's notation to that of the command line."""
    if text.startswith("("):
        try:
            values: Any = ast.literal_eval(text)
            return shown(values)
        except (ValueError, SyntaxError):
            return text
    return text.removesuffix(".0")
