"""Settings from the command line and from YAML files, and back to YAML."""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models.errors import UserError
from models.settings import ANDERSON_PREFIX, NONE, OPTIONS, Settings, as_typed, dashed, shown

_NULLS = ("", "~", "null")
_NOT_WRITTEN = ("resume", "overwrite")  # of one run, not of the training


def parse(arguments: Sequence[str]) -> Settings:
    """Reads the command line, and the YAML file it names.

    Args:
        arguments: The command line without the program's name. ``--config FILE`` names a YAML
            file whose keys are the names of the options; what the command line says wins.

    Returns:
        The settings.

    Raises:
        UserError: An option, key or value is wrong, or the file cannot be read.
        SystemExit: After ``--help``.
    """
    given = vars(_build_parser().parse_args(arguments))
    file = given.pop("config")
    words, keys = ({}, {}) if file is None else _read_file(Path(file))
    keys = {name: key for name, key in keys.items() if name not in given}
    try:
        values = {name: _value(name, text) for name, text in (words | given).items()}
        return Settings(**values, origin=(file or "", keys))
    except UserError as error:
        raise UserError(as_typed(str(error), file or "", keys)) from None


def to_yaml(settings: Settings) -> str:
    """Writes settings so that ``--config`` reads them back, those of the acceleration in full."""
    values = {name: getattr(settings, name) for name in OPTIONS if name not in _NOT_WRITTEN}
    config = settings.anderson_config()
    if config is not None:
        own = {ANDERSON_PREFIX + name: value for name, value in config.to_dict().items()}
        values |= {name: value for name, value in own.items() if name in OPTIONS}
    plain = {
        dashed(name): list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not None or (config is not None and OPTIONS[name].metadata["none"] is not None)
    }
    return yaml.safe_dump(plain, sort_keys=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting, so that all ranks can end together."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            option = message.removeprefix(prefix).split()[0].split("=")[0]
            message = f"unknown option {option}" + _suggestion(
                option, [name for action in self._actions for name in action.option_strings]
            )
        raise UserError(message.removeprefix("argument ") + " (see --help)")


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="python -m models.train",
        description="Trains a residual network on an ImageNet-style folder of images, on one rank "
        "or, under horovodrun, mpirun, srun or jsrun, on many.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        help="YAML file with settings; its keys are the names of the options below; null is none; "
        "what the command line says wins",
    )
    groups: dict[str, Any] = {}
    for name, field in OPTIONS.items():
        meta = field.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        text = meta["help"]
        if field.default not in (None, ""):
            text += f" (default: {shown(field.default)})"
        elif name.startswith(ANDERSON_PREFIX):
            text += " (default: as --anderson says)"
        keywords: dict[str, Any] = {"help": text}
        kind = _kind(name)
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            keywords |= {"nargs": "*", "metavar": "X"}
        elif meta["choices"]:
            also = () if meta["none"] is None else (NONE,)
            keywords["metavar"] = "{" + ",".join((*meta["choices"], *also)) + "}"
        else:
            keywords["metavar"] = {int: "N", float: "X", str: "PATH"}[kind]
        group.add_argument(f"--{dashed(name)}", **keywords)
    return parser


def _kind(name: str) -> type:
    """The type of an option's values: bool, int, float, str or tuple (of floats)."""
    kind = typing.get_type_hints(Settings)[name]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = typing.get_args(kind)[0]  # the others stand for none
    return typing.get_origin(kind) or kind


def _value(name: str, words: Any) -> Any:
    """Makes of an option's words its value.

    Args:
        name: Of the option.
        words: A string, a list of strings, or a truth value.
    """
    field, kind = OPTIONS[name], _kind(name)
    takes_none = field.metadata["none"] is not None
    if kind is bool:
        if isinstance(words, bool):
            return words
        if not isinstance(words, str) or words.lower() not in _TRUTH:
            raise UserError(f"--{dashed(name)} is {words!r}, must be true or false")
        return _TRUTH[words.lower()]
    if kind is tuple:
        words = [words] if isinstance(words, str) else words
        if takes_none and words in ([NONE], []):
            return ()
        numbers = [_number(name, word, float) for word in words]
        # Window lengths are whole numbers of steps; a command line has no such distinction.
        whole = name == "anderson_averages"
        return tuple(int(x) if whole and x.is_integer() else x for x in numbers)
    if not isinstance(words, str):
        raise UserError(f"--{dashed(name)} is a list, must be a single value")
    if takes_none and words == NONE:
        return NONE if name.startswith(ANDERSON_PREFIX) else None
    return words if kind is str else _number(name, words, kind)


_TRUTH = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def _number(name: str, word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        also = " or none" if OPTIONS[name].metadata["none"] is not None else ""
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--{dashed(name)} is {word!r}, must be {what}{also}") from None


class _Loader(yaml.BaseLoader):
    """Leaves all values as they are written: YAML takes `off` for false. Refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} is there more than once"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """By option, its words in a YAML file, and its key there."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if content in (None, ""):
        return {}, {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `option: value` lines")
    words: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in OPTIONS:
            known = [dashed(option) for option in OPTIONS]
            raise UserError(f"{path}: unknown setting {key!r}" + _suggestion(key, known))
        if name in words:
            raise UserError(f"{path}: {keys[name]} and {key} are the same setting")
        if isinstance(value, dict) or (
            isinstance(value, list) and not all(isinstance(word, str) for word in value)
        ):
            raise UserError(f"{path}: {key} must be a single value or a list of values")
        meta = OPTIONS[name].metadata
        if isinstance(value, str) and value.lower() in _NULLS:
            if meta["none"] is None and NONE not in (meta["choices"] or ()):
                raise UserError(
                    f"{path}: {key} is {value or 'empty'}, which it does not take: leave it out "
                    "for its default"
                )
            value = NONE
        words[name], keys[name] = value, key
    return words, keys


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.replace("_", "-"), known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
