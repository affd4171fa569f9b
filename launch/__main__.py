"""The command line: renders a job script, writes it to a file, or submits it."""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from launch import slurm
from launch.job import PLACEHOLDER, Job, Options, plan
from launch.machines import LAUNCHERS, WALLTIME, LaunchError, Machine, load_machine, machine_names
from launch.render import render, replaced_directives

SUBMIT = {"slurm": ["sbatch"], "lsf": ["bsub"]}
JOB_ID = re.compile(r"(?:Submitted batch job |Job <)(\d+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line without the program's name; None takes this process's.

    Returns:
        Exit code: 0; 2 for wrong input; what sbatch or bsub returned, where that is not 0.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(arguments)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: Sequence[str]) -> int:
    # The command is cut off here: argparse would drop a further -- from it.
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    for word in arguments[:cut]:
        if word.startswith("--") and word.endswith("=--"):  # argparse makes an empty list of that
            raise LaunchError(f"{word.removesuffix('=--')} is '--', must be a value (see --help)")
    options = vars(_parser().parse_args(arguments[:cut]))
    if options.pop("machines"):
        for name in machine_names():
            print(_line(load_machine(name)))
        return 0
    name, output = options.pop("machine"), options.pop("output")
    submit, dry_run = options.pop("submit"), options.pop("dry_run")
    if name is None:
        raise LaunchError(f"--machine is missing: one of {', '.join(machine_names())}, or a path")
    if submit and dry_run:
        raise LaunchError("--submit and --dry-run exclude each other: leave one of them out")
    machine = load_machine(name)
    if submit and machine.scheduler.kind == "none":
        raise LaunchError(
            f"--submit needs a scheduler, --machine {machine.name} has none: write the script with "
            "--output FILE and run it with bash FILE"
        )
    job = plan(machine, Options(command=arguments[cut + 1 :], **options))
    if submit and job.stage is not None and not Path(job.stage).exists():
        raise LaunchError(f"--stage is {job.stage!r}, must exist: there is no such file or folder")
    if job.requeue and "models.train" in job.command and "--overwrite" in job.command:
        raise LaunchError(
            "--overwrite is given in a job that is queued again: each time it would remove what it "
            "has trained so far; give --resume auto to the training, or --no-requeue"
        )
    job, fitted = _fit(job, submit=submit)
    for note in (*_notes(job), *fitted):
        print(f"note: {note}", file=sys.stderr)
    script = render(job)
    if output is not None:
        _write(Path(output), script)
    if submit:
        return _submit(machine, script)
    if output is None or dry_run:
        print(script, end="")
    return 0


def _notes(job: Job) -> Iterator[str]:
    machine, words = job.machine, job.command
    if machine.retired is not None:
        yield f"{machine.name} left service in {machine.retired}: nothing can run this script"
    for line in replaced_directives(job):
        yield f"--directive takes the place of {line!r}"
    if job.requeue and "models.train" in words and not any("--resume" in word for word in words):
        yield "without --resume auto a requeued training is refused, since --out holds one"
    if job.stage is None and any(PLACEHOLDER in word for word in words):
        yield f"nothing is staged on {machine.name}, {PLACEHOLDER} is passed on as it is"


def _fit(job: Job, *, submit: bool) -> tuple[Job, list[str]]:
    """The job as the Slurm that is here can start it, and notes; as it is where there is none."""
    here = slurm.ask() if job.machine.scheduler.kind == "slurm" else None
    if here is None:
        return job, []
    try:
        job = slurm.fit(job, here)
    except LaunchError as error:
        if submit:
            raise
        return job, [str(error)]
    return job, list(slurm.notes(job, here))


def _submit(machine: Machine, script: str) -> int:
    command = SUBMIT[machine.scheduler.kind]
    try:
        # On standard input: both read it, and LSF's bsub reads a script's head only there.
        run = subprocess.run(command, input=script, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise LaunchError(
            f"--submit: cannot run {command[0]} ({error.strerror}): call it on a login node of "
            f"{machine.name}, or write the script with --output FILE"
        ) from None
    job_id = JOB_ID.search(run.stdout)
    if run.returncode:
        print(run.stdout, end="")
        print(f"error: {command[0]} ended with exit code {run.returncode}", file=sys.stderr)
    else:
        print(f"job {job_id.group(1)}" if job_id else run.stdout.strip())
    return run.returncode


def _write(path: Path, script: str) -> None:
    try:
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise LaunchError(f"--output: cannot write {path}: {error.strerror}") from None


def _line(machine: Machine) -> str:
    gone = f"; left service in {machine.retired}" if machine.retired is not None else ""
    return f"{machine.name:<12}{machine.scheduler.launcher:<12}{machine.description}{gone}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += ", one that begins with - follows a =, as --directive=--reservation=NAME"
        raise LaunchError(f"{message} (see --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m launch",
        usage="python -m launch --machine NAME|FILE [option ...] -- PROGRAM [argument ...]",
        description="Renders the job script of a training on a cluster. Without --output and "
        "--submit it is printed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    add("--machine", metavar="NAME|FILE", help="a machine of --machines, or a machine file (.toml)")
    add("--machines", action="store_true", help="list the machines")
    add("--nodes", type=int, metavar="N", help="nodes")
    add("--ranks-per-node", type=int, metavar="N", help="ranks on a node (default: one a GPU)")
    add("--gpus-per-node", type=int, metavar="N", help="where the machine file does not say it")
    add("--cores-per-node", type=int, metavar="N", help="where the machine file does not say it")
    add("--launcher", choices=LAUNCHERS["slurm"], help="what starts the ranks on SLURM (default: "
        "that of the machine file); mpirun is Open MPI's, torchrun is torch's, inside the "
        "allocation")  # fmt: skip
    add("--hosts", metavar="HOST:RANKS,...", help="nodes, where there is no scheduler")
    add("--hostfile", metavar="FILE", help="the same from a file of lines HOST slots=RANKS; a host "
        "that is named more than once gets the sum")  # fmt: skip
    add("--controller", choices=("mpi", "gloo"), help="what horovodrun uses (default: mpi)")
    add("--walltime", metavar="TIME", help=f"time limit: {WALLTIME}; 1:30 is an hour and a half, "
        "on SLURM too")  # fmt: skip
    add("--account", metavar="NAME", help="project to charge")
    add("--queue", "--partition", metavar="NAME", help="what the machine calls a queue: a queue, a "
        "partition or a QOS")  # fmt: skip
    add("--qos", metavar="NAME", help="SLURM's quality of service")
    add("--directive", action="append", default=[], dest="directives", metavar="LINE",
        help="a further line of the script's head, without #SBATCH or #BSUB, as "
        '--directive="--reservation=NAME"; may be repeated')  # fmt: skip
    add("--name", default=defaults["name"], help="the job's name (default: %(default)s)")
    add("--stage", metavar="DIR", help="folder or .tar to copy to each node's own disk before the "
        "training; {data} in its arguments becomes the copy's path")  # fmt: skip
    add("--requeue", action=argparse.BooleanOptionalAction, default=None,
        help="queue the job again when it is stopped before its end (default: yes)")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the ranks")
    add("--output", metavar="FILE", help="write the script there")
    add("--submit", action="store_true", help="hand the script to sbatch or bsub")
    add("--dry-run", action="store_true", help="print the script (the default)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
