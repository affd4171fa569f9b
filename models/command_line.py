"""Settings from the command line and from YAML files, and back to YAML."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models.anderson_options import PREFIX, advice_for
from models.errors import UserError
from models.options import NONE, Option, as_typed, dashed, shown
from models.settings import OPTIONS, OWN_OPTIONS, Settings

_NULLS = ("", "~", "null")
_NOT_WRITTEN = ("resume", "overwrite")  # they belong to one run, not to the training


def parse(arguments: Sequence[str]) -> Settings:
    """Reads the command line, and the YAML file it names.

    Args:
        arguments: The command line without the program's name. ``--config FILE`` names a YAML
            file whose keys are the names of the options; the command line overrides it.

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
        values = {name: _value(OPTIONS[name], text) for name, text in (words | given).items()}
        acceleration = {
            name.removeprefix(PREFIX): values.pop(name)
            for name in list(values)
            if name not in OWN_OPTIONS
        }
        return Settings(**values, acceleration=acceleration, origin=(file or "", keys))
    except UserError as error:
        raise UserError(as_typed(str(error), file or "", keys)) from None


def to_yaml(settings: Settings) -> str:
    """Returns settings as YAML for ``--config``, with all fields of the acceleration."""
    values = {name: getattr(settings, name) for name in OWN_OPTIONS if name not in _NOT_WRITTEN}
    values = {name: value for name, value in values.items() if value is not None}
    config = settings.anderson_config()
    if config is not None:
        own = {PREFIX + name: value for name, value in config.to_dict().items()}
        values |= {name: value for name, value in own.items() if name in OPTIONS}
    plain = {
        dashed(name): list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting, so that all ranks can end together."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            message = _unknown("option", word, known)
            if not word.startswith("-"):
                message = f"{word!r} is not an option, nor the value of one"
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
        "the command line overrides it",
    )
    groups: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        group = groups.setdefault(option.group, parser.add_argument_group(option.group))
        text = option.help
        if option.default not in (None, ""):
            text += f" (default: {shown(option.default)})"
        keywords: dict[str, Any] = {"help": text.replace("%", "%%")}
        if option.kind is bool:
            # It also takes a word, as in a YAML file.
            keywords |= {"nargs": "?", "const": True, "metavar": "yes|no"}
            group.add_argument(
                f"--no-{dashed(name)}", dest=name, action="store_const", const=False,
                help=f"the same as --{dashed(name)} no",
            )  # fmt: skip
        elif option.kind is tuple:
            keywords |= {"nargs": "*", "metavar": "X"}
        elif option.choices:
            also = (NONE,) if option.takes_none else ()
            keywords["metavar"] = "{" + ",".join((*option.choices, *also)) + "}"
        else:
            keywords["metavar"] = {int: "N", float: "X", str: "PATH"}[option.kind]
        group.add_argument(f"--{dashed(name)}", **keywords)
    return parser


def _value(option: Option, words: Any) -> Any:
    """Converts the words of an option to its value.

    Args:
        option: The option.
        words: A string, a list of strings, or a bool.
    """
    typed = f"--{dashed(option.name)}"
    if option.kind is bool:
        if isinstance(words, bool):
            return words
        if not isinstance(words, str) or words.lower() not in _TRUTH:
            raise UserError(f"{typed} is {words!r}, must be yes or no")
        return _TRUTH[words.lower()]
    if option.kind is tuple:
        words = [words] if isinstance(words, str) else words
        if option.takes_none and words in ([NONE], []):
            return ()
        return tuple(_number(option, word, float) for word in words)
    if not isinstance(words, str):
        raise UserError(f"{typed} is a list, must be a single value")
    if option.takes_none and words == NONE:
        return None
    return words if option.kind is str else _number(option, words, option.kind)


_TRUTH = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def _number(option: Option, word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        also = f" or {NONE}" if option.takes_none else ""
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--{dashed(option.name)} is {word!r}, must be {what}{also}") from None


class _Loader(yaml.BaseLoader):
    """Keeps all values as text, since YAML reads `off` as false. Refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} is there more than once"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns for each option its words in a YAML file, and its key there."""
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
            raise UserError(f"{path}: {_unknown('setting', key, list(map(dashed, OPTIONS)))}")
        if name in words:
            raise UserError(f"{path}: {keys[name]} and {key} are the same setting")
        if isinstance(value, dict) or (
            isinstance(value, list) and not all(isinstance(word, str) for word in value)
        ):
            raise UserError(f"{path}: {key} must be a single value or a list of values")
        if isinstance(value, str) and value.lower() in _NULLS:
            if not OPTIONS[name].takes_none and NONE not in OPTIONS[name].choices:
                raise UserError(
                    f"{path}: {key} is {value or 'empty'}, which it does not take: leave it out "
                    "for its default"
                )
            value = NONE
        words[name], keys[name] = value, key
    return words, keys


def _unknown(what: str, word: str, known: Sequence[str]) -> str:
    """Returns the message for an unknown option or setting, with the closest known one."""
    advice = advice_for(word.lstrip("-").replace("-", "_"))
    shown_word = word if what == "option" else repr(word)
    if advice is not None:
        return f"unknown {what} {shown_word}, which earlier versions had. {advice}"
    close = difflib.get_close_matches(word.replace("_", "-"), known, n=1)
    return f"unknown {what} {shown_word}" + (f": did you mean {close[0]!r}?" if close else "")
