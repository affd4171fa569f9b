"""Renders a job as a bash script. Nothing is read, run or looked up here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from launch.directives import PREFIX, replaced
from launch.job import ARCHIVES, PLACEHOLDER, PREEMPTED, THREADS, Job
from launch.torchrun import AGENT


def render(job: Job) -> str:
    """Returns the bash script: a batch job, or one to run by hand if there is no scheduler."""
    parts = [
        ["#!/bin/bash", *_head(job)],
        [f"# {line}" for line in _summary(job)],
        list(_environment(job)),
        list(_stopping(job)),
        list(_folders(job)),
        list(_staging(job)),
        list(_training(job)),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def replaced_directives(job: Job) -> list[str]:
    """Returns the lines of the script's own head that lines of `--directive` replace."""
    return replaced(job.machine.scheduler.kind, _own_head(job), job.directives)


def _head(job: Job) -> Iterator[str]:
    gone = replaced_directives(job)
    lines = [*(line for line in _own_head(job) if line not in gone), *job.directives]
    yield from (f"{PREFIX[job.machine.scheduler.kind]} {line}" for line in lines)


def _own_head(job: Job) -> list[str]:
    scheduler = job.machine.scheduler
    lines = []
    if scheduler.kind == "slurm":
        lines = [
            f"--job-name={job.name}",
            f"--nodes={job.nodes}",
            f"--ntasks-per-node={job.ranks_per_node}",
            f"--cpus-per-task={_cpus(job)}",
            f"--time={_clock(job.walltime)}",
            "--output=%x-%j.out",
            "--open-mode=append",  # a requeued job writes to the same file
            f"--signal=B:USR1@{scheduler.warning_seconds}",
            "--requeue" if job.requeue else "--no-requeue",
        ]
        if job.gpus_per_node:
            lines.append(f"--gpus-per-node={job.gpus_per_node}")
        if job.account:
            lines.append(f"--account={job.account}")
        if job.queue:
            lines.append(f"--partition={job.queue}")
        if job.qos:
            lines.append(f"--qos={job.qos}")
    elif scheduler.kind == "lsf":
        minutes = -(-(job.walltime or 0) // 60)
        lines = [
            f"-J {job.name}",
            f"-nnodes {job.nodes}",
            f"-W {minutes // 60}:{minutes % 60:02}",
            f"-o {job.name}-%J.out",
            f"-wa USR2 -wt {-(-scheduler.warning_seconds // 60)}",
        ]
        if job.requeue:
            lines.append(f"-Q {PREEMPTED}")
        if job.account:
            lines.append(f"-P {job.account}")
        if job.queue:
            lines.append(f"-q {job.queue}")
    return [*lines, *scheduler.directives, *(scheduler.storage_directives if job.stage else ())]


def _summary(job: Job) -> Iterator[str]:
    each = f", {job.ranks_per_node} on each" if job.ranks_per_node else ""
    cores = f", {job.cores_per_rank} cores for each rank" if job.cores_per_rank else ""
    yield f"{job.machine.name}: {job.ranks} ranks on {job.nodes} nodes{each}{cores}"


def _environment(job: Job) -> Iterator[str]:
    for module in job.machine.scheduler.modules:
        yield f"module load {module} || exit 1"
    for name, variable in job.environment.items():
        value = f'"{variable.value}"' if variable.folder else shlex.quote(variable.value)
        yield f"export {name}={value}  # {variable.reason}"
    if THREADS not in job.environment:
        # Unset, each rank starts a thread for every core of its node; 1 leaves most cores idle.
        ranks = max(slots for _, slots in job.hosts)
        yield "launch_cores=$(nproc)"
        yield (
            f"export {THREADS}=${{{THREADS}:-$((launch_cores > {ranks} ? launch_cores / {ranks} : "
            f"1))}}  # this host's cores over its {ranks} ranks; --env {THREADS}=N if others differ"
        )
    if job.launcher == "torchrun":
        # The script runs on the first node of the job.
        yield "launch_head=$(hostname):$((20000 + SLURM_JOB_ID % 10000))  # where all nodes meet"
        reason = "each start of the ranks has a store of its own"
        yield f"export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # {reason}"
        yield f"launch_agent={shlex.quote(AGENT)}"
    if job.launcher == "mpirun":
        # Open MPI passes to other hosts only what -x names, and warns of names that are not set.
        names = ["PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", THREADS, *job.environment]
        yield "launch_pass=()"
        yield f"for launch_name in {' '.join(dict.fromkeys(names))}; do"
        yield '    [[ -z ${!launch_name+set} ]] || launch_pass+=(-x "$launch_name")'
        yield "done"


def _stopping(job: Job) -> Iterator[str]:
    if job.launcher == "horovodrun":
        return
    yield f"""\
# A request to stop, by the scheduler before the end or by hand, is passed to the ranks. They write
# a checkpoint and leave with exit code {PREEMPTED}.
launch_ranks= launch_interrupted=
launch_stop() {{
    launch_interrupted=1
    [[ -z $launch_ranks ]] || kill -USR1 "$launch_ranks" 2>/dev/null
}}
trap launch_stop TERM USR1 USR2"""
    if _requeues_itself(job):
        yield """\
# SLURM asks by USR1 before the time limit, and sends TERM when it ends the job: it was cancelled or
# preempted, or its node is lost. A cancelled job that queued itself again would come back.
launch_warned= launch_ended=
trap 'launch_warned=1; launch_stop' USR1
trap '[[ $launch_warned ]] || launch_ended=1; launch_stop' TERM"""


def _folders(job: Job) -> Iterator[str]:
    names = [name for name, variable in job.environment.items() if variable.folder]
    if names:
        paths = " ".join(f'"${name}"' for name in names)
        yield f"{_on_each_node(job)} mkdir -p -- {paths} || exit 1  # on every node"


def _staging(job: Job) -> Iterator[str]:
    if job.stage is None:
        return
    storage = job.machine.node.local_storage
    source = PurePosixPath(job.stage)
    suffix = next((end for end in ARCHIVES if source.name.endswith(end)), "")
    name = source.name.removesuffix(suffix) or "data"
    path = _path(job.stage)
    failed = " || exit 1"
    yield f'launch_data="{storage}"/{shlex.quote(name)}  # on every node\'s own disk'
    if not suffix:
        copy = 'mkdir -p -- "$2" && cp -R -- "$1"/. "$2"'
        command = f'bash -c {shlex.quote(copy)} stage {path} "$launch_data"'
        yield f"{_on_each_node(job)} {command}{failed}"
        return
    archive, remove = path, ""
    if job.machine.scheduler.broadcast:
        # sbcast sends it from one node to all the others, so the file system is read once.
        archive, remove = f'"$launch_data"{suffix}', ' && rm -- "$1"'
        yield f"sbcast --force {path} {archive}{failed}"
    unpack = 'mkdir -p -- "$2" && tar -xf "$1" -C "$2"' + remove
    command = f'bash -c {shlex.quote(unpack)} stage {archive} "$launch_data"'
    yield f"{_on_each_node(job)} {command}{failed}"


def _training(job: Job) -> Iterator[str]:
    command = " ".join(_word(word, staged=job.stage is not None) for word in job.command)
    start = f"{_launcher(job)} {command}"
    if job.launcher == "horovodrun":
        yield "# horovodrun hands no signals on to the ranks."
        yield f"exec {start}"
        return
    if job.stage is not None:
        # It is not requeued, since it would get no further.
        yield """\
if [[ $launch_interrupted ]]; then
    echo "asked to stop before the data was staged; the job's time is too short" >&2
    exit 1
fi"""
    yield f"""\
{start} &
launch_ranks=$!
[[ -z $launch_interrupted ]] || launch_stop  # a signal came before launch_ranks was set
while launch_interrupted=; wait "$launch_ranks"; launch_status=$?; [[ $launch_interrupted ]]; do
    : # wait was cut short by a signal: the ranks still run
done"""
    if _requeues_itself(job):
        yield f"""\
if ((launch_status == {PREEMPTED})) && [[ $launch_ended ]]; then
    echo "ended by SLURM; unless SLURM queues it again itself, submit it again to go on" >&2
elif ((launch_status == {PREEMPTED})); then
    echo "stopped before its end; requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi"""
    elif job.requeue:
        yield f"# LSF queues the job again after exit code {PREEMPTED} (-Q)."
    yield 'exit "$launch_status"'


def _requeues_itself(job: Job) -> bool:
    """Whether the script asks to be queued again; LSF looks at its exit code."""
    return job.requeue and job.machine.scheduler.kind == "slurm"


def _launcher(job: Job) -> str:
    """The words that start the ranks, up to the program."""
    scheduler = job.machine.scheduler
    if job.launcher == "srun":
        words = [
            "srun",
            f"--nodes={job.nodes}",
            f"--ntasks={job.ranks}",
            f"--ntasks-per-node={job.ranks_per_node}",
            f"--cpus-per-task={_cpus(job)}",
            *(["--cpu-bind=cores"] if job.bind else []),
            *([f"--mpi={job.mpi_type}"] if job.mpi_type else []),
            # Ranks that leave together must not kill each other. A crash must leave none behind.
            "--kill-on-bad-exit=0",
            "--wait=60",
        ]
        if job.gpus_per_node:
            words.append(f"--gpus-per-node={job.gpus_per_node}")
    elif job.launcher == "torchrun":
        return f"{shlex.join(_srun_of_agents(job))} {_agent(job)}"
    elif job.launcher == "jsrun":
        words = _jsrun(
            job.nodes, job.ranks_per_node or 1, job.cores_per_rank or 1, job.gpus_per_node
        )
    elif job.launcher == "mpirun":
        # A scheduler tells Open MPI itself on which nodes it may start how many ranks.
        words = ["mpirun", "-np", str(job.ranks), *(["-H", _hosts(job)] if job.hosts else [])]
        if job.cores_per_rank and job.ranks_per_node:
            layout = f"ppr:{job.ranks_per_node}:node:PE={job.cores_per_rank}"
            words += ["--map-by", layout, "--bind-to", "core"]
        else:
            words += ["--map-by", "slot", "--bind-to", "none"]
    else:
        words = ["horovodrun", "-np", str(job.ranks), "-H", _hosts(job), f"--{job.controller}"]
    # A machine file's options are those of its own launcher.
    own = scheduler.launcher_options if job.launcher == scheduler.launcher else ()
    return _join([*words, *own], job)


def _srun_of_agents(job: Job) -> list[str]:
    """srun's words for one process on each node, which has all of the node's cores and GPUs."""
    return [
        "srun",
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(job) * (job.ranks_per_node or 1)}",
        *(["--cpu-bind=cores"] if job.bind else []),
        "--mpi=none",
        "--kill-on-bad-exit=0",
        "--wait=60",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
    ]


def _agent(job: Job) -> str:
    """The words that start the ranks of a node, up to the program. Python is the program's own."""
    words = [
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.ranks_per_node}",
        "--rdzv-backend=c10d",
        '--rdzv-endpoint="$launch_head"',
        '--rdzv-id="$SLURM_JOB_ID"',
        "--no-python",
    ]
    own = job.machine.scheduler
    options = own.launcher_options if own.launcher == "torchrun" else ()
    given = job.command[0]
    python = given if PurePosixPath(given).name.startswith("python") else "python"
    start = [shlex.quote(python), "-c", '"$launch_agent"']
    return " ".join([*start, *words[:-1], *map(shlex.quote, options), words[-1]])


def _on_each_node(job: Job) -> str:
    """The words that start one process on each node."""
    launcher = job.launcher
    if job.machine.scheduler.kind == "slurm":
        return _join(["srun", f"--nodes={job.nodes}", f"--ntasks={job.nodes}",
                      "--ntasks-per-node=1"], job)  # fmt: skip
    if launcher == "jsrun":
        return _join(_jsrun(job.nodes, 1, 1, 0), job)
    words = [launcher, "-np", str(job.nodes), "-H", ",".join(f"{host}:1" for host, _ in job.hosts)]
    return _join(words, job)


def _jsrun(nodes: int, ranks: int, cores: int, gpus: int) -> list[str]:
    """Returns jsrun's words: a node is one resource set, and its ranks are bound to separate cores.

    jsrun hides GPUs outside a rank's resource set, and NCCL cannot reach them over NVLink. So one
    set has all GPUs of a node, and a rank takes that of its local rank. `--smpiargs` is not needed:
    MPI uses GPUs only if told so (`-gpu`), and here it gets host memory only.
    """
    return ["jsrun", "-n", str(nodes), "-r", "1", "-a", str(ranks), "-c", str(ranks * cores),
            "-g", str(gpus), "-b", f"proportional-packed:{cores}", "-d", "packed"]  # fmt: skip


def _join(words: Sequence[str], job: Job) -> str:
    passed = ' "${launch_pass[@]}"' if words[0] == "mpirun" else ""
    return shlex.join(words) + passed


def _hosts(job: Job) -> str:
    return ",".join(f"{host}:{slots}" for host, slots in job.hosts)


def _cpus(job: Job) -> int:
    """CPUs of one rank, as SLURM counts them."""
    return (job.cores_per_rank or 1) * job.machine.node.cpus_per_core


def _clock(seconds: int | None) -> str:
    minutes, rest = divmod(seconds or 0, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _path(path: str) -> str:
    """Quotes a path. A relative one must not be taken for an option."""
    return shlex.quote(path if path.startswith("/") else f"./{path}")


def _word(word: str, *, staged: bool) -> str:
    """Quotes one word of the training command, so that bash passes it on unchanged."""
    if not staged or PLACEHOLDER not in word:
        return shlex.quote(word)
    return '"$launch_data"'.join(
        shlex.quote(part) if part else "" for part in word.split(PLACEHOLDER)
    )
