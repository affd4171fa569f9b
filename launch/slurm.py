"""What the Slurm that is here says of itself, and what a job script needs for it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.build_horovod import output_of
from launch.job import Job
from launch.machines import LaunchError

TYPE_VARIABLE = "SLURM_MPI_TYPE"
"""srun takes its value for `--mpi`."""
# How an MPI library's processes find each other under srun: the plugin of Slurm that it speaks to.
SPEAKS = {"Open MPI": "pmix"}


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What a Slurm says of itself.

    Attributes:
        mpi_types: Values of srun's `--mpi`, in the order in which srun lists them.
        mpi_default: The value where none is given (`MpiDefault`).
        binds: srun can bind ranks to cores (`TaskPlugin` is not none).
        gpus: It counts GPUs (`GresTypes`).
    """

    mpi_types: tuple[str, ...]
    mpi_default: str
    binds: bool
    gpus: bool


def ask() -> Slurm | None:
    """Asks the Slurm whose commands are on PATH; None where none is, or it does not answer."""
    if shutil.which("srun") is None or shutil.which("scontrol") is None:
        return None
    listed, types = output_of("srun", "--mpi=list")
    answered, text = output_of("scontrol", "show", "config")
    if not (listed and answered):
        return None
    settings = dict(re.findall(r"(?m)^(\w+) *= (.*?) *$", text))
    # One name a line, indented by a tab or blanks and, before Slurm 21, after "srun: ".
    names = re.findall(r"(?m)^(?:srun:)?\s+(\w+)$", types)
    names += re.findall(r"\bpmix_v\d+\b", types)
    return Slurm(
        mpi_types=tuple(dict.fromkeys(names)),
        mpi_default=settings.get("MpiDefault", "none"),
        binds=settings.get("TaskPlugin", "task/none") not in ("task/none", "none", "(null)", ""),
        gpus="gpu" in settings.get("GresTypes", "").split(","),
    )


def loads(mpi_type: str) -> bool:
    """Whether srun can load its plugin of that name; it lists some whose library is not there."""
    words = ("srun", f"--mpi={mpi_type}", "--test-only", "--ntasks=1", "true")
    return "Invalid MPI type" not in output_of(*words)[1]


def mpi_of(job: Job) -> str | None:
    """The MPI library that the job's program will find: a key of `SPEAKS`, or None: not known."""
    program = shutil.which(job.command[0])
    beside = Path(program).with_name("mpirun") if program else None
    mpirun = beside if beside and os.access(beside, os.X_OK) else shutil.which("mpirun")
    said = output_of(mpirun, "--version")[1] if mpirun else ""
    return next((name for name in SPEAKS if f"({name})" in said), None)


def fit(job: Job, slurm: Slurm) -> Job:
    """The job as this Slurm can start it.

    Raises:
        LaunchError: srun cannot start the ranks of this MPI.
    """
    if job.launcher == "torchrun":
        return dataclasses.replace(job, bind=slurm.binds)
    if job.launcher != "srun":
        return job
    return dataclasses.replace(job, bind=slurm.binds, mpi_type=_mpi_type(job, slurm))


def _mpi_type(job: Job, slurm: Slurm) -> str | None:
    """What to give to srun's `--mpi`; None: nothing, since what it takes by itself will do."""
    variable = job.environment.get(TYPE_VARIABLE)
    own = [word.removeprefix("--mpi=") for word in job.machine.scheduler.launcher_options
           if word.startswith("--mpi=")]  # fmt: skip
    given = own[-1] if own else variable.value if variable else os.environ.get(TYPE_VARIABLE)
    mpi = mpi_of(job)
    wanted = given or (SPEAKS[mpi] if mpi else None)
    if wanted is None:
        return None
    # Its own choice is looked at, too: Debian's default may be a plugin that does not load.
    if any(_is(name, wanted) for name in slurm.mpi_types) and loads(wanted):
        return None if given or _is(slurm.mpi_default, wanted) else wanted
    why = f"{mpi}'s ranks need it" if not given else "it was asked for"
    raise LaunchError(
        f"this Slurm has no MPI type {wanted!r} that works, and {why}: srun --mpi=list names "
        f"{', '.join(slurm.mpi_types)}, MpiDefault is {slurm.mpi_default}. Add --launcher mpirun, "
        "which starts the ranks inside the allocation without it, or ask for Slurm's PMIx plugin "
        "and its libpmix"
    )


def _is(name: str, wanted: str) -> bool:
    """Whether a type is the one wanted: pmix_v4 is pmix."""
    return name == wanted or name.startswith(f"{wanted}_v")


def notes(job: Job, slurm: Slurm) -> Iterator[str]:
    """What the user should know of a job that `fit` has returned."""
    if job.launcher == "srun" and job.mpi_type:
        yield (
            f"srun gets --mpi={job.mpi_type}: this Slurm's own choice is {slurm.mpi_default}, "
            "which does not start this MPI"
        )
    if job.launcher in ("srun", "torchrun") and not job.bind:
        yield "ranks are not bound to cores: this Slurm's TaskPlugin is none"
    if slurm.gpus and not job.gpus_per_node:
        yield "this Slurm has GPUs, and the job asks for none: --gpus-per-node N does"
