"""Lines of a script's head, and the scheduler's options that each of them sets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from launch.machines import LaunchError

PREFIX = {"slurm": "#SBATCH", "lsf": "#BSUB"}
# The short options of sbatch that the script or a machine file may also set.
LONG = {
    "A": "account", "C": "constraint", "G": "gpus", "J": "job-name", "N": "nodes",
    "c": "cpus-per-task", "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time",
}  # fmt: skip
STOPPING = "warning_seconds in a machine file"
# Options that the script's head sets itself, and what the user gives in their place.
OWN = {
    "slurm": {
        "account": "--account",
        "cpus-per-task": "--ranks-per-node, the ranks share a node's cores",
        "gpus": "--gpus-per-node",
        "gpus-per-node": "--gpus-per-node",
        "job-name": "--name",
        "no-requeue": "--no-requeue",
        "nodes": "--nodes",
        "ntasks": "--nodes and --ranks-per-node",
        "ntasks-per-node": "--ranks-per-node",
        "partition": "--queue",
        "qos": "--qos",
        "requeue": "--requeue",
        "signal": STOPPING,
        "time": "--walltime",
    },
    "lsf": {
        "J": "--name",
        "P": "--account",
        "Q": "--requeue or --no-requeue",
        "W": "--walltime",
        "n": "--nodes and --ranks-per-node",
        "nnodes": "--nodes",
        "q": "--queue",
        "wa": STOPPING,
        "wt": STOPPING,
    },
}


def check_directives(kind: str, lines: Iterable[str]) -> tuple[str, ...]:
    """Checks the lines of `--directive` and returns them without `#SBATCH` or `#BSUB`.

    Args:
        kind: The scheduler, "slurm" or "lsf".
        lines: The lines as they were given.

    Raises:
        LaunchError: A line is no option, or sets what another option of the program sets.
    """
    found = []
    for line in lines:
        text = line.strip(" ").removeprefix(PREFIX[kind]).strip(" ")
        try:
            names = list(_options(kind, text))
        except ValueError:  # a quote is left open
            names = []
        # Characters that end a line are not printable. What follows one could run as a command.
        if not names or not text.startswith("-") or not text.isprintable():
            raise LaunchError(
                f"--directive is {line!r}, must be one line of printable characters that begins "
                f"with an option of {PREFIX[kind][1:].lower()} and closes its quotes, as "
                '--directive="--reservation=NAME"'
            )
        for name in names:
            for own, instead in OWN[kind].items():
                # sbatch takes any unambiguous prefix of a long option.
                if name == own or (kind == "slurm" and len(name) > 1 and own.startswith(name)):
                    raise LaunchError(
                        f"--directive is {line!r}, but the script sets that itself: use {instead}"
                    )
        found.append(text)
    return tuple(found)


def replaced(kind: str, lines: Sequence[str], by: Sequence[str]) -> list[str]:
    """Returns the lines that set an option which a line of `by` sets, too."""
    taken = {name for line in by for name in _options(kind, line)}
    return [line for line in lines if taken & set(_options(kind, line))]


def _options(kind: str, line: str) -> Iterator[str]:
    """Yields the names of the options in a line; short ones of SLURM in full, if in `LONG`."""
    for word in shlex.split(line):
        if kind == "lsf":
            if match := re.match(r"-([A-Za-z]\w*)", word):
                yield match.group(1)
        elif match := re.match(r"--([A-Za-z][\w-]*)|-([A-Za-z])", word):
            yield match.group(1) or LONG.get(match.group(2), match.group(2))
