"""Machine files: checked data about a cluster, for job scripts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "machines"

KINDS = ("slurm", "lsf", "none")
LAUNCHERS = {
    "slurm": ("srun", "mpirun", "torchrun"),
    "lsf": ("jsrun",),
    "none": ("mpirun", "horovodrun"),
}
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words that schedulers take in a script's head without quotes.
PLAIN = re.compile(r"[A-Za-z0-9][\w.+@:/-]*", re.ASCII)
MOST = 1_000_000
"""Largest count that is taken. A larger one is a slip, and loops over it would take very long."""
# The script has such a path between double quotes, where only variables may be expanded.
SHELL_PATH = re.compile(r"/([\w./-]|\$\w+|\$\{\w+\})*")


class LaunchError(Exception):
    """Wrong input; the message names the parameter, its value, what is allowed and what to do."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of the machine.

    Attributes:
        gpus: GPUs that the scheduler counts; None leaves it to `--gpus-per-node`, 0 without that.
        cores: Physical cores a job may use; None leaves it to `--cores-per-node`.
        cpus_per_core: CPUs that the scheduler counts per core: 2 where hardware threads are CPUs.
        local_storage: Folder on the node's own disk; may hold shell variables.
    """

    gpus: int | None = None
    cores: int | None = None
    cpus_per_core: int = 1
    local_storage: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest walltime of a job of at most so many nodes in the default queue."""

    nodes: int
    walltime: str


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """How jobs are queued and ranks started.

    Attributes:
        kind: "slurm", "lsf" or "none".
        launcher: "srun", "jsrun", "mpirun", "torchrun" or "horovodrun". On SLURM `--launcher` may
            change it.
        queue: Used unless `--queue` names another.
        queue_option: SLURM's word for a queue: "partition", or "qos".
        qos: Values of `--queue` that are a QOS where the others are partitions.
        account_required: Jobs without an account are refused.
        limits: By size, smallest first; the last one is the machine's size.
        directives: Further lines of the script's head, without `#SBATCH` or `#BSUB`.
        storage_directives: The same, for jobs that use the node's own disk.
        launcher_options: Further options of the launcher.
        modules: Environment modules that the job loads before it sets variables.
        warning_seconds: How long before its end a job is asked to stop.
        broadcast: SLURM's `sbcast` reaches the node's own disk.
    """

    kind: str
    launcher: str
    queue: str | None = None
    queue_option: str = "partition"
    qos: tuple[str, ...] = ()
    account_required: bool = False
    limits: tuple[Limit, ...] = ()
    directives: tuple[str, ...] = ()
    storage_directives: tuple[str, ...] = ()
    launcher_options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    warning_seconds: int = 300
    broadcast: bool = False


@dataclass(frozen=True, kw_only=True)
class Variable:
    """An environment variable of the ranks, and why it is set.

    Attributes:
        value: The value.
        reason: Why it is set.
        folder: The value is a folder on every node's own disk. It may hold shell variables, and is
            made before the ranks start.
    """

    value: str
    reason: str
    folder: bool = False


@dataclass(frozen=True, kw_only=True)
class Performance:
    """Peak figures, for models of time and memory; bytes, seconds, bytes per second.

    Attributes:
        gpu: Name of the GPU.
        gpu_memory_bytes: Memory of one GPU.
        memory_bandwidth: Bandwidth of one GPU's memory.
        intranode_bandwidth: Bandwidth between two GPUs of a node, per direction.
        intranode_latency: Latency of a message within a node.
        injection_bandwidth: Bandwidth from one node to the network, per direction.
        network_latency: Latency of a message between nodes.
    """

    gpu: str
    gpu_memory_bytes: float
    memory_bandwidth: float
    intranode_bandwidth: float
    intranode_latency: float
    injection_bandwidth: float
    network_latency: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine file.

    Attributes:
        description: One line for `--machines`.
        node: See `Node`.
        scheduler: See `Scheduler`.
        retired: When the machine left service, as "November 2024"; None: it is in service.
        environment: Variables of the ranks by name.
        performance: See `Performance`.
        name: The file's name without its suffix.
    """

    description: str
    node: Node
    scheduler: Scheduler
    retired: str | None = None
    environment: Mapping[str, Variable] = field(default_factory=dict)
    performance: Performance | None = None
    name: str = ""


def machine_names() -> list[str]:
    """Returns the names of the project's machines. Those that left service come last."""

    def place(path: Path) -> tuple[bool, str]:
        return "retired" in tomllib.loads(path.read_text(encoding="utf-8")), path.stem

    return [path.stem for path in sorted(FOLDER.glob("*.toml"), key=place)]


def load_machine(name: str) -> Machine:
    """Reads and checks a machine file.

    Args:
        name: One of `machine_names`, or the path of a TOML file.

    Raises:
        LaunchError: There is no such machine, or its file is wrong; the message names the key.
    """
    is_path = name.endswith(".toml") or "/" in name
    if not is_path and name not in machine_names():
        raise LaunchError(
            f"--machine is {name!r}, must be one of {', '.join(machine_names())}, or the path of a "
            f"machine file (.toml){_suggestion(name, machine_names())}"
        )
    path = Path(name) if is_path else FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"--machine: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # invalid TOML or UTF-8, or a number too long for Python
        raise LaunchError(f"--machine: {path} is no TOML: {error}") from None
    if "name" in content:
        raise LaunchError(f"{path}: name is not a key, the file's name is the machine's")
    machine: Machine = _read(Machine, content | {"name": path.stem}, str(path), "")
    _check(machine, str(path))
    return machine


WALLTIME = "minutes, H:MM, H:MM:SS, D-H, D-H:MM or D-H:MM:SS"
WALLTIME_FORM = re.compile(
    r"(?P<minutes>\d{1,6})"
    r"|(?P<hours>\d{1,4}):(?P<minute>\d\d)(?::(?P<second>\d\d))?"
    r"|(?P<days>\d{1,3})-(?P<hour>\d{1,2})(?::(?P<m>\d\d)(?::(?P<s>\d\d))?)?",
    re.ASCII,
)


def parse_walltime(text: str) -> int | None:
    """Returns the seconds of a time in one of the forms of `WALLTIME`; None for any other text.

    The forms are SLURM's, with one difference: `1:30` is an hour and a half, as in LSF. SLURM
    itself reads 1 minute and 30 seconds.
    """
    match = WALLTIME_FORM.fullmatch(text)
    if match is None:
        return None
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    minute, second = part["minute"] + part["m"], part["second"] + part["s"]
    if part["hour"] > 23 or minute > 59 or second > 59:
        return None
    hours = 24 * part["days"] + part["hours"] + part["hour"]
    return 3600 * hours + 60 * (part["minutes"] + minute) + second


def _read(kind: Any, value: Any, file: str, key: str) -> Any:
    """Converts a TOML value to a dataclass, or to the type of a dataclass's field."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    where = f"{file}: {key or 'the file'}"
    if origin is tuple:
        if not isinstance(value, list):
            raise LaunchError(f"{where} is {value!r}, must be a list")
        return tuple(_read(arguments[0], one, file, f"{key}[{i}]") for i, one in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise LaunchError(f"{where} is {value!r}, must be a table")
        return {
            name: _read(arguments[1], one, file, f"{key}.{name}") for name, one in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _read_table(kind, value, file, key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: True is an int
        raise LaunchError(f"{where} is {value!r}, must be of type {kind.__name__}")
    if kind is float and not (value >= 0 and value < float("inf")):
        raise LaunchError(f"{where} is {value!r}, must not be negative, and finite")
    if kind is int and not 0 <= value <= MOST:
        raise LaunchError(f"{where} is {value!r}, must not be negative, and at most {MOST}")
    if kind is str and "\0" in value:
        raise LaunchError(f"{where} is {value!r}, must hold no null character")
    return value


def _read_table(kind: Any, value: Any, file: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise LaunchError(f"{file}: {key} is {value!r}, must be a table")
    fields = {one.name: one for one in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise LaunchError(
                f"{file}: unknown key {prefix}{name}, known are {', '.join(fields)}"
                + _suggestion(name, fields)
            )
    hints = typing.get_type_hints(kind)
    for name, one in fields.items():
        no_default = one.default is one.default_factory is dataclasses.MISSING
        if name not in value and no_default:
            raise LaunchError(f"{file}: the key {prefix}{name} is missing")
    return kind(
        **{name: _read(hints[name], one, file, prefix + name) for name, one in value.items()}
    )


def _check(machine: Machine, file: str) -> None:
    """Checks what types do not say."""

    def require(holds: bool, key: str, value: Any, allowed: str) -> None:
        if not holds:
            raise LaunchError(f"{file}: {key} is {value!r}, must be {allowed}")

    node, scheduler = machine.node, machine.scheduler
    require(scheduler.kind in KINDS, "scheduler.kind", scheduler.kind, f"one of {KINDS}")
    launchers = LAUNCHERS[scheduler.kind]
    require(
        scheduler.launcher in launchers,
        "scheduler.launcher",
        scheduler.launcher,
        f"one of {launchers} with kind {scheduler.kind!r}",
    )
    require(
        scheduler.queue_option in ("partition", "qos"),
        "scheduler.queue_option",
        scheduler.queue_option,
        "'partition' or 'qos'",
    )
    require(node.cores != 0, "node.cores", node.cores, "at least 1")
    require(node.cpus_per_core >= 1, "node.cpus_per_core", node.cpus_per_core, "at least 1")
    require(
        node.local_storage is None or SHELL_PATH.fullmatch(node.local_storage) is not None,
        "node.local_storage",
        node.local_storage,
        "an absolute path of letters, digits, . _ - / and $VARIABLES",
    )
    for key, words in {
        "queue": () if scheduler.queue is None else (scheduler.queue,),
        "qos": scheduler.qos,
        "modules": scheduler.modules,
    }.items():
        for word in words:
            allowed = "letters, digits and . _ - + @ : / alone"
            require(PLAIN.fullmatch(word) is not None, f"scheduler.{key}", word, allowed)
    warning = scheduler.warning_seconds
    require(warning >= 1, "scheduler.warning_seconds", warning, "at least 1")
    sizes = [limit.nodes for limit in scheduler.limits]
    require(sizes == sorted(set(sizes)), "scheduler.limits", sizes, "ordered by nodes")
    require(0 not in sizes, "scheduler.limits: nodes", 0, "at least 1")
    for limit in scheduler.limits:
        valid = parse_walltime(limit.walltime) is not None
        require(valid, "scheduler.limits: walltime", limit.walltime, WALLTIME)
    figures = dataclasses.asdict(machine.performance) if machine.performance else {}
    for key, value in figures.items():
        positive = isinstance(value, str) or 0.0 < value < math.inf
        require(positive, f"performance.{key}", value, "positive and finite")
    for key in ("directives", "storage_directives"):
        for line in getattr(scheduler, key):
            # Characters that end a line are not printable. What follows one could run as a command.
            one_line = bool(line.strip()) and line.isprintable()
            require(one_line, f"scheduler.{key}", line, "one line of printable characters")
            require(_quotes_close(line), f"scheduler.{key}", line, "without a quote left open")
    for name, variable in machine.environment.items():
        require(VARIABLE_NAME.fullmatch(name) is not None, "environment", name, "a variable's name")
        reason = variable.reason
        require(
            not variable.folder or SHELL_PATH.fullmatch(variable.value) is not None,
            f"environment.{name}.value",
            variable.value,
            "an absolute path of letters, digits, . _ - / and $VARIABLES, for it is a folder",
        )
        require(
            bool(reason.strip()) and reason.isprintable(),
            f"environment.{name}.reason",
            reason,
            "one line that says why it is set",
        )


def _quotes_close(line: str) -> bool:
    try:
        shlex.split(line)
    except ValueError:
        return False
    return True


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ""
