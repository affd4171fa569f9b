"""Hosts without a scheduler: reads `--hosts` or a hostfile as names and numbers of ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.machines import MOST, LaunchError

HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::(\d+))?", re.ASCII)
SETTING = re.compile(r"(slots|max_slots)=(\d+)", re.ASCII)
LINE_FORM = "HOST, HOST:RANKS, HOST slots=RANKS or HOST slots=RANKS max_slots=MOST"


@dataclass(frozen=True)
class Entry:
    """One mention of a host.

    Attributes:
        host: Its name.
        slots: Ranks that the mention adds; None where it does not say.
        most: Ranks that the host takes at most.
        where: The place that an error names.
    """

    host: str
    slots: int | None
    most: int
    where: str


def parse_hosts(
    hosts: str | None, hostfile: str | None, ranks_per_node: int | None
) -> tuple[tuple[str, int], ...]:
    """Returns names and numbers of ranks, in the order of the first mentions.

    A host that is named more than once gets the sum, as in Open MPI. A mention without a number
    counts as one rank if any host is named repeatedly (one line per slot), else as
    `ranks_per_node`.

    Args:
        hosts: HOST:RANKS,HOST:RANKS,...; None takes the hostfile.
        hostfile: Path of a file in Open MPI's format.
        ranks_per_node: On each host; None leaves it to the mentions.

    Raises:
        LaunchError: The input is wrong. The message names the file and the line, or the option.
    """
    entries = list(_of_option(hosts) if hosts is not None else _of_file(str(hostfile)))
    if ranks_per_node is not None and not 1 <= ranks_per_node <= MOST:
        raise LaunchError(
            f"--ranks-per-node is {ranks_per_node}, must be at least 1 and at most {MOST}"
        )
    mentions: dict[str, list[Entry]] = {}
    for entry in entries:
        mentions.setdefault(entry.host, []).append(entry)
    unsaid = 1 if len(mentions) < len(entries) else ranks_per_node
    found = []
    for name, own in mentions.items():
        where, ranks = own[-1].where, 0
        for entry in own:
            slots = unsaid if entry.slots is None else entry.slots
            if slots is None:
                raise LaunchError(
                    f"{where}: how many ranks on {name}? Say {name}:RANKS, or --ranks-per-node for "
                    "all hosts"
                )
            ranks += slots
        if ranks_per_node is not None and ranks != ranks_per_node:
            raise LaunchError(
                f"--ranks-per-node is {ranks_per_node}, but {name} is given {ranks} ({where}): "
                "leave one of them out"
            )
        most = min(entry.most for entry in own)
        if ranks > most:
            raise LaunchError(
                f"{where}: the number of ranks on {name} is {ranks}, must be at most {most}"
            )
        found.append((name, ranks))
    return tuple(found)


def _of_option(text: str) -> Iterator[Entry]:
    for word in text.split(","):
        match = HOST.fullmatch(word)
        if match is None:
            raise LaunchError(
                f"--hosts is {text!r}, must be HOST:RANKS,HOST:RANKS,...{_hint(word)}"
            )
        host, slots = match.groups()
        yield Entry(host, _number(slots, host, "--hosts"), MOST, "--hosts")


def _of_file(path: str) -> Iterator[Entry]:
    try:
        # Editors under Windows put a byte-order mark first, which utf-8-sig leaves out.
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null character in the path
        raise LaunchError(f"--hostfile: cannot read {path}: {error}") from None
    empty = True
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            empty = False
            yield _of_line(text, f"--hostfile: {path}, line {number}")
    if empty:
        raise LaunchError(f"--hostfile: {path} names no host")


def _of_line(text: str, where: str) -> Entry:
    first, *words = re.sub(r"\s*=\s*", "=", text).split()
    host = HOST.fullmatch(first)
    settings = [SETTING.fullmatch(word.replace("max-slots", "max_slots")) for word in words]
    pairs: list[tuple[str, str]] = [
        (setting[1], setting[2]) for setting in settings if setting is not None
    ]
    if host is not None and host.group(2) is not None:
        pairs.append(("slots", host.group(2)))
    given = dict(pairs)
    if host is None or None in settings or len(given) < len(pairs):
        raise LaunchError(f"{where} is {text!r}, must be {LINE_FORM}{_hint(first)}")
    name = host.group(1)
    slots, most = (_number(given.get(key), name, where) for key in ("slots", "max_slots"))
    return Entry(name, slots, most or MOST, where)


def _number(digits: str | None, host: str, where: str) -> int | None:
    if digits is None:
        return None
    # Python's int() refuses thousands of digits.
    number = int(digits) if len(digits) <= 9 else MOST + 1
    if not 1 <= number <= MOST:
        raise LaunchError(
            f"{where}: the number of ranks on {host} is {digits}, must be at least 1 and at most "
            f"{MOST}"
        )
    return number


def _hint(word: str) -> str:
    # horovodrun's -H takes no IPv6 address, and Open MPI's splits it at its colons.
    if word.startswith("[") or word.count(":") > 1:
        return "; launchers take no IPv6 address here: use the host's name"
    return ""
