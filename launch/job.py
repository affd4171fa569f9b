"""A job: the options of the command line, checked against the machine and completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launch.directives import check_directives
from launch.hosts import parse_hosts
from launch.machines import (
    MOST,
    PLAIN,
    VARIABLE_NAME,
    WALLTIME,
    LaunchError,
    Machine,
    Variable,
    parse_walltime,
)

PLACEHOLDER = "{data}"
THREADS = "OMP_NUM_THREADS"
PREEMPTED = 75
"""Exit code of a training that was asked to stop and left a checkpoint; see models.preemption."""
KEEPALIVE = {
    f"OMPI_MCA_oob_tcp_keepalive_{name}": Variable(value=str(value), reason=reason)
    for name, value, reason in (
        ("time", 60, "s; then mpirun asks a node of which it has heard nothing"),
        ("intvl", 10, "s between two such questions"),
        ("probes", 6, "questions without an answer, after which it ends the job: 2 minutes in all"),
    )
}
"""How soon Open MPI notices that a node is gone; 8 minutes by itself."""
ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options as they were given; None: not given. See `python -m launch --help`."""

    command: Sequence[str]
    nodes: int | None = None
    ranks_per_node: int | None = None
    gpus_per_node: int | None = None
    cores_per_node: int | None = None
    launcher: str | None = None
    hosts: str | None = None
    hostfile: str | None = None
    controller: str | None = None
    walltime: str | None = None
    account: str | None = None
    queue: str | None = None
    qos: str | None = None
    directives: Sequence[str] = ()
    name: str = "aadl_hvd"
    stage: str | None = None
    requeue: bool | None = None
    env: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """The data that a script is rendered from.

    Attributes:
        machine: The machine that it runs on.
        command: The training program with its arguments; `{data}` stands for the staged data.
        nodes: Number of nodes.
        ranks: Number of ranks in total.
        ranks_per_node: Ranks on each node; None if hosts differ.
        gpus_per_node: GPUs of a node that the job has; each rank takes one.
        cores_per_rank: Physical cores of a rank; None if the number is not known.
        launcher: The program that starts the ranks; see `Scheduler`.
        mpi_type: What srun speaks to the ranks' MPI (`--mpi`); None leaves it to the cluster.
        bind: Each rank is bound to its cores by srun.
        hosts: Names and ranks, if no scheduler knows them.
        controller: horovodrun's controller, "mpi" or "gloo"; None with other launchers.
        walltime: Time limit in seconds; None without a scheduler.
        account: Account to charge.
        queue: Queue or partition.
        qos: SLURM's quality of service.
        directives: Further lines of the script's head; they replace those of the machine file.
        name: Name of the job.
        stage: Folder or archive to copy to every node's own disk.
        requeue: Queue again when the program leaves with exit code 75.
        environment: Variables of the ranks, by name.
    """

    machine: Machine
    command: tuple[str, ...]
    nodes: int
    ranks: int
    ranks_per_node: int | None
    gpus_per_node: int
    cores_per_rank: int | None
    launcher: str
    hosts: tuple[tuple[str, int], ...]
    controller: str | None
    walltime: int | None
    account: str | None
    queue: str | None
    qos: str | None
    directives: tuple[str, ...]
    name: str
    stage: str | None
    requeue: bool
    environment: Mapping[str, Variable]
    mpi_type: str | None = None
    bind: bool = True


def plan(machine: Machine, options: Options) -> Job:
    """Checks the options against the machine.

    Raises:
        LaunchError: An option is missing, impossible or means nothing on this machine.
    """
    if not options.command:
        raise LaunchError(
            "the training command is missing: put it last, after --, as in "
            "-- python -m models.train --data DIR"
        )
    if not options.command[0] or options.command[0].startswith("-"):
        _refuse("the training command", repr(options.command[0]), "a program, as python")
    if any("\0" in word for word in options.command):
        raise LaunchError("the training command holds a null character, which no program can get")
    scheduled = machine.scheduler.kind != "none"
    for option, value in {
        "--name": options.name,
        "--account": options.account,
        "--queue": options.queue,
        "--qos": options.qos,
    }.items():
        if value is not None and not PLAIN.fullmatch(value):
            _refuse(option, repr(value), "letters, digits and . _ - + @ : / alone")
    if "/" in options.name:
        _refuse("--name", repr(options.name), "without /: the output's file is called so")
    if scheduled:
        _forbid(machine, "has a scheduler", hosts=options.hosts, hostfile=options.hostfile)
        if machine.scheduler.kind != "slurm":
            _forbid(machine, "has no SLURM", qos=options.qos)
        hosts: tuple[tuple[str, int], ...] = ()
    else:
        _forbid(
            machine,
            "has no scheduler",
            walltime=options.walltime,
            account=options.account,
            queue=options.queue,
            qos=options.qos,
            directive=options.directives or None,
            requeue=options.requeue,
        )
        hosts = _hosts(machine, options)
    nodes = _nodes(machine, options, hosts)
    # Not required: a cluster without GPUs is an ordinary one.
    gpus = _known(machine, "gpus", options.gpus_per_node, required=False)
    cores = _known(machine, "cores", options.cores_per_node, required=scheduled)
    ranks_per_node = _ranks_per_node(machine, options, gpus, hosts)
    queue, qos = _queue(machine, options)
    return Job(
        machine=machine,
        command=tuple(options.command),
        nodes=nodes,
        ranks=sum(slots for _, slots in hosts) if hosts else nodes * (ranks_per_node or 0),
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus or 0,
        cores_per_rank=_cores_per_rank(cores, ranks_per_node),
        launcher=_launcher(machine, options),
        hosts=hosts,
        controller=_controller(machine, options),
        walltime=_walltime(machine, options, nodes) if scheduled else None,
        account=_account(machine, options),
        queue=queue,
        qos=qos,
        directives=check_directives(machine.scheduler.kind, options.directives),
        name=options.name,
        stage=_stage(machine, options),
        requeue=scheduled and options.requeue is not False,
        environment=_environment(machine, options, _cores_per_rank(cores, ranks_per_node)),
    )


def _refuse(option: str, value: object, allowed: str) -> NoReturn:
    raise LaunchError(f"{option} is {value}, must be {allowed}")


def _forbid(machine: Machine, why: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            option = f"--{name}" if value is not False else f"--no-{name}"
            raise LaunchError(
                f"{option} means nothing with --machine {machine.name}, which {why}: leave it out"
            )


def _hosts(machine: Machine, options: Options) -> tuple[tuple[str, int], ...]:
    if (options.hosts is None) == (options.hostfile is None):
        raise LaunchError(
            f"--machine {machine.name} has no scheduler that knows the nodes: give one of "
            "--hosts HOST:RANKS,... and --hostfile FILE"
        )
    return parse_hosts(options.hosts, options.hostfile, options.ranks_per_node)


def _nodes(machine: Machine, options: Options, hosts: Sequence[object]) -> int:
    nodes = options.nodes
    if hosts:
        if nodes is not None and nodes != len(hosts):
            _refuse("--nodes", nodes, f"the number of hosts, {len(hosts)}, or left out")
        return len(hosts)
    if nodes is None:
        raise LaunchError("--nodes is missing: how many nodes the job takes")
    limits = machine.scheduler.limits
    most = limits[-1].nodes if limits else MOST
    if not 1 <= nodes <= most:
        _refuse("--nodes", nodes, f"at least 1 and at most {most}")
    return nodes


def _known(machine: Machine, what: str, given: int | None, *, required: bool) -> int | None:
    """Returns a node's number of `what`, from the machine file or else the command line."""
    own: int | None = getattr(machine.node, what)
    option = f"--{what}-per-node"
    least = 0 if what == "gpus" else 1
    if given is not None and not least <= given <= MOST:
        _refuse(option, given, f"at least {least} and at most {MOST}")
    if own is not None and given is not None and given != own:
        raise LaunchError(
            f"{option} is {given}, but a node of {machine.name} has {own}: leave the option out, "
            "or copy the machine file and pass the copy's path to --machine"
        )
    if own is None and given is None and required:
        raise LaunchError(
            f"{option} is missing: {machine.name} does not say how many {what} a node has"
        )
    return given if own is None else own


def _ranks_per_node(
    machine: Machine, options: Options, gpus: int | None, hosts: Sequence[tuple[str, int]]
) -> int | None:
    if hosts:
        for host, slots in hosts:
            if gpus and slots > gpus:
                _refuse(
                    f"the number of ranks on {host}", slots, f"at most {gpus}, one for each GPU"
                )
        different = {slots for _, slots in hosts}
        return different.pop() if len(different) == 1 else None
    ranks = options.ranks_per_node
    if ranks is None:
        if not gpus:
            raise LaunchError(
                "--ranks-per-node is missing: without GPUs (--gpus-per-node) there is no default "
                "of one rank for each"
            )
        return gpus
    if not 1 <= ranks <= (gpus or MOST):
        most = f"{gpus}, one for each GPU of a node" if gpus else MOST
        _refuse("--ranks-per-node", ranks, f"at least 1 and at most {most}")
    return ranks


def _cores_per_rank(cores: int | None, ranks_per_node: int | None) -> int | None:
    if cores is None:
        return None
    if ranks_per_node is None:
        raise LaunchError(
            "--cores-per-node needs equally many ranks on all hosts: leave it out, or even them out"
        )
    if cores % ranks_per_node:
        possible = ", ".join(str(n) for n in range(1, cores + 1) if cores % n == 0)
        _refuse(
            "--ranks-per-node",
            ranks_per_node,
            f"a divisor of the {cores} cores of a node: {possible}",
        )
    return cores // ranks_per_node


def _launcher(machine: Machine, options: Options) -> str:
    scheduler = machine.scheduler
    if scheduler.kind != "slurm":
        _forbid(machine, "has no SLURM", launcher=options.launcher)
    launcher = options.launcher or scheduler.launcher
    if launcher == "torchrun" and "models.train" in options.command:
        raise LaunchError(
            "--launcher is 'torchrun', but models.train reduces gradients with Horovod: leave it "
            "out, or give a script that calls torch.distributed.init_process_group()"
        )
    return launcher


def _controller(machine: Machine, options: Options) -> str | None:
    if machine.scheduler.launcher != "horovodrun":
        _forbid(machine, "does not use horovodrun", controller=options.controller)
        return None
    return options.controller or "mpi"


def _queue(machine: Machine, options: Options) -> tuple[str | None, str | None]:
    """The queue or partition, and the QOS; `--queue` names what the machine calls a queue."""
    scheduler = machine.scheduler
    queue, qos = options.queue, options.qos
    if queue is not None and (scheduler.queue_option == "qos" or queue in scheduler.qos):
        if qos is not None:
            raise LaunchError(
                f"--queue {queue} is a QOS on {machine.name}, and --qos is {qos}: give one of them"
            )
        queue, qos = None, queue
    if scheduler.queue_option == "qos":
        return queue, qos or scheduler.queue
    return queue or scheduler.queue, qos


def _walltime(machine: Machine, options: Options, nodes: int) -> int:
    if options.walltime is None:
        raise LaunchError(f"--walltime is missing: the job's time limit, {WALLTIME}")
    seconds = parse_walltime(options.walltime)
    warning = machine.scheduler.warning_seconds
    if seconds is None:
        _refuse("--walltime", repr(options.walltime), f"{WALLTIME}, as 2:00 for two hours")
    if seconds <= warning:
        _refuse(
            "--walltime",
            options.walltime,
            f"longer than the {warning} s before its end at which the job is asked to stop",
        )
    # The limits are those of the default queue only.
    if {options.queue, options.qos} <= {None, machine.scheduler.queue}:
        for limit in machine.scheduler.limits:
            if nodes <= limit.nodes:
                if seconds > (parse_walltime(limit.walltime) or 0):
                    _refuse(
                        "--walltime",
                        options.walltime,
                        f"at most {limit.walltime} on up to {limit.nodes} nodes of {machine.name}; "
                        "ask for less, or name another queue with --queue",
                    )
                break
    return seconds


def _account(machine: Machine, options: Options) -> str | None:
    if machine.scheduler.account_required and options.account is None:
        raise LaunchError(
            f"--account is missing: {machine.name} charges every job to a project, name yours"
        )
    return options.account


def _stage(machine: Machine, options: Options) -> str | None:
    wanted = any(PLACEHOLDER in word for word in options.command)
    if options.stage is None:
        if wanted and machine.node.local_storage is not None:
            raise LaunchError(
                f"--stage is missing: {PLACEHOLDER} in the training command stands for staged "
                "data; name them with --stage, or write their path in its place"
            )
        return None
    if machine.node.local_storage is None:
        raise LaunchError(
            f"--stage is {options.stage!r}, but {machine.name} names no disk of a node's own "
            "(node.local_storage in a machine file): leave it out, or copy the machine file, add "
            "the folder and pass the copy's path to --machine"
        )
    if not wanted:
        raise LaunchError(
            f"--stage is {options.stage!r}, but the training command has no {PLACEHOLDER} for the "
            f"staged data: write for instance --data {PLACEHOLDER}"
        )
    path = Path(options.stage)
    if "\0" in options.stage or path.name in ("", ".."):
        _refuse("--stage", repr(options.stage), f"a folder or an archive {ARCHIVES} with a name")
    # The script may be rendered on another machine, so it goes by the name alone.
    if path.is_dir() and path.name.endswith(ARCHIVES):
        _refuse("--stage", repr(options.stage), f"a folder whose name does not end in {ARCHIVES}")
    if path.is_file() and not path.name.endswith(ARCHIVES):
        _refuse("--stage", repr(options.stage), f"a folder, or an archive that ends in {ARCHIVES}")
    return options.stage


def _environment(
    machine: Machine, options: Options, cores_per_rank: int | None
) -> Mapping[str, Variable]:
    environment = {}
    if cores_per_rank is not None:
        reason = f"one thread for each of a rank's {cores_per_rank} cores"
        environment[THREADS] = Variable(value=str(cores_per_rank), reason=reason)
    if _launcher(machine, options) == "mpirun" or _controller(machine, options) == "mpi":
        environment |= KEEPALIVE
    environment |= machine.environment
    for setting in options.env:
        name, equals, value = setting.partition("=")
        if not equals or not VARIABLE_NAME.fullmatch(name) or "\0" in value:
            _refuse("--env", repr(setting), "NAME=VALUE")
        environment[name] = Variable(value=value, reason="set by --env")
    return environment
