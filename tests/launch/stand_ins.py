"""Schedulers and their launchers for tests: they know the options that are rendered, and no others.

Called as a program, ``stand_ins.py NAME OPTIONS``, it is the command NAME: srun and jsrun start the
ranks with mpirun on this machine; sbatch and bsub keep the job for `Cluster.run`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB_ID = 4711
COMMANDS = ("srun", "sbatch", "scontrol", "sbcast", "jsrun", "bsub", "module")


class Strict(argparse.ArgumentParser):
    def __init__(self, name):
        super().__init__(prog=f"stand-in {name}", allow_abbrev=False, add_help=False)


def state():
    return Path(os.environ["STAND_IN_STATE"])


def start_ranks(ranks, cores, command, *, bind=True):
    words = ["mpirun", "-np", str(ranks)]
    words += ["--map-by", f"slot:PE={cores}", "--bind-to", "core"] if bind else ["--oversubscribe"]
    os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    with open(state() / "launched", "a") as log:
        log.write(f"{ranks} {shlex.join(command)}\n")
    sys.stdout.flush()
    os.execvp("mpirun", [*words, *command])  # so that it gets the signals, and hands them on


def slurm():
    return json.loads((state() / "slurm.json").read_text())


def srun(arguments):
    if arguments == ["--mpi=list"]:
        print("MPI plugin types are...", *slurm()["mpi_types"], sep="\n\t")
        return
    if "--test-only" in arguments:
        assert arguments[1:] == ["--test-only", "--ntasks=1", "true"]
        wanted = arguments[0].removeprefix("--mpi=")
        if wanted not in slurm()["mpi_types"] or wanted in slurm()["broken"]:
            sys.exit(f"srun: error: Invalid MPI type '{wanted}', --mpi=list for acceptable types")
        return
    parser = Strict("srun")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ntasks", type=int, required=True)
    parser.add_argument("--ntasks-per-node", type=int, required=True)
    parser.add_argument("--cpus-per-task", type=int, default=1)
    parser.add_argument("--cpu-bind", choices=["cores"])
    parser.add_argument("--kill-on-bad-exit", choices=["0"])
    parser.add_argument("--wait", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--gpu-bind", choices=["closest", "none"])
    parser.add_argument("--mpi", choices=["pmix"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    job = json.loads((state() / "job.json").read_text())
    assert os.environ["SLURM_JOB_ID"] == str(JOB_ID)
    assert options.nodes == job["nodes"] == 1, "one machine stands for one node"
    assert options.ntasks == options.nodes * options.ntasks_per_node
    assert options.ntasks_per_node <= job["ntasks_per_node"]
    assert options.gpus_per_node in (None, job["gpus_per_node"])
    bind = options.cpu_bind is not None
    start_ranks(options.ntasks, options.cpus_per_task, options.command, bind=bind)


def sbatch(arguments):
    Strict("sbatch").parse_args(arguments)
    parser = Strict("#SBATCH")
    for name in ("job-name", "time", "output", "signal", "account", "partition", "qos"):
        parser.add_argument(f"--{name}")
    for name in ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--open-mode", choices=["append"], required=True)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("--exclusive", action="store_true")
    parser.add_argument("--network", choices=["disable_rdzv_get"])
    parser.add_argument("-C")
    keep_job(parser, "#SBATCH ")
    print(f"Submitted batch job {JOB_ID}")


def module(arguments):
    """A function of the login shell, on clusters; a job inherits it."""
    parser = Strict("module")
    parser.add_argument("what", choices=["load"])
    parser.add_argument("name", choices=["rccl-net-plugin"])
    parser.parse_args(arguments)


def scontrol(arguments):
    if arguments == ["show", "config"]:
        for name, value in slurm()["settings"].items():
            print(f"{name:<24}= {value}")
        return
    parser = Strict("scontrol")
    parser.add_argument("what", choices=["requeue"])
    parser.add_argument("job", type=int, choices=[JOB_ID])
    parser.parse_args(arguments)
    assert json.loads((state() / "job.json").read_text())["requeue"], "the job may not be requeued"
    (state() / "requeued").touch()


def sbcast(arguments):
    parser = Strict("sbcast")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("source")
    parser.add_argument("destination")
    options = parser.parse_args(arguments)
    shutil.copyfile(options.source, options.destination)
    (state() / "broadcast").touch()


def jsrun(arguments):
    parser = Strict("jsrun")
    for name in "nracg":
        parser.add_argument(f"-{name}", type=int, required=True)
    parser.add_argument("-b", required=True)
    parser.add_argument("-d", choices=["packed"], required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    job = json.loads((state() / "job.json").read_text())
    assert options.n == options.r * job["nnodes"] and job["nnodes"] == 1
    cores = int(re.fullmatch(r"proportional-packed:(\d+)", options.b).group(1))
    assert options.c == options.a * cores, "ranks share cores, or leave some idle"
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(options.g)))
    start_ranks(options.n * options.a, cores, options.command)


def bsub(arguments):
    Strict("bsub").parse_args(arguments)
    parser = Strict("#BSUB")
    for name in ("J", "W", "o", "wa", "P", "q", "Q", "alloc_flags"):
        parser.add_argument(f"-{name}")
    parser.add_argument("-nnodes", type=int, required=True)
    parser.add_argument("-wt", type=int)
    keep_job(parser, "#BSUB ")
    print(f"Job <{JOB_ID}> is submitted to queue <batch>.")


def keep_job(parser, prefix):
    script = sys.stdin.read()
    assert script.startswith("#!/bin/bash\n")
    words = [
        word
        for line in script.splitlines()
        if line.startswith(prefix)
        for word in shlex.split(line.removeprefix(prefix))
    ]
    options = parser.parse_args(words)
    (state() / "job.json").write_text(json.dumps(vars(options)))
    (state() / "job.sh").write_text(script)


class Cluster:
    """One machine as a cluster of one node: the commands on PATH, and what runs their jobs.

    Args:
        folder: an empty one.
        mpi_types: what srun --mpi=list names.
        broken: those of them that srun cannot load.
        settings: of slurm.conf, as scontrol show config has them.
    """

    def __init__(self, folder, mpi_types=("none", "pmi2", "pmix"), broken=(), **settings):
        self.state = folder / "state"
        self.programs = folder / "programs"
        for path in (self.state, self.programs):
            path.mkdir()
        usual = {"GresTypes": "(null)", "MpiDefault": "pmix", "TaskPlugin": "task/affinity"}
        about = {"mpi_types": mpi_types, "broken": broken, "settings": usual | settings}
        (self.state / "slurm.json").write_text(json.dumps(about))
        for name in COMMANDS:
            path = self.programs / name
            words = shlex.join([sys.executable, __file__, name])
            path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            path.chmod(0o755)
        binaries = Path(sys.executable).parent
        self.environment = dict(
            os.environ,
            PATH=os.pathsep.join([str(self.programs), str(binaries), os.environ["PATH"]]),
            PYTHONPATH=str(Path(__file__).resolve().parents[2]),
            STAND_IN_STATE=str(self.state),
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        )

    @property
    def job(self):
        return json.loads((self.state / "job.json").read_text())

    def run(self, *, cwd, until=None, number=None):
        """Runs the submitted job once, as its scheduler would.

        Args:
            cwd: Where it was submitted.
            until: The job's time is over when this file exists: it is sent the signal it asked for.
            number: The signal in place of that, on SLURM.

        Returns:
            Exit code, output, and whether the job is queued again.
        """
        job = self.job
        slurm = "requeue" in job
        (self.state / "requeued").unlink(missing_ok=True)
        name = "SLURM_JOB_ID" if slurm else "LSB_JOBID"

        def warn(process):
            if slurm:  # B: the batch shell alone
                asked, seconds = re.fullmatch(r"B:(\w+)@(\d+)", job["signal"]).groups()
                assert int(seconds) > 0
                process.send_signal(number or getattr(signal, f"SIG{asked}"))
            else:  # every process of the job on this host
                assert job["wt"] > 0
                os.killpg(process.pid, getattr(signal, f"SIG{job['wa']}"))

        script = self.state / "job.sh"
        environment = dict(self.environment, **{name: str(JOB_ID)})
        code, output = run_script(script, environment, cwd=cwd, until=until, warn=warn)
        if slurm:
            return code, output, (self.state / "requeued").exists()
        return code, output, job["Q"] is not None and str(code) in job["Q"].split()


def run_script(script, environment, *, cwd, until=None, warn=None, limit=240):
    """Runs a script under bash; `warn` is called with the process when the file `until` exists."""
    output = script.with_suffix(".out")
    with open(output, "w") as file:
        process = subprocess.Popen(
            ["bash", str(script)],
            env=environment,
            cwd=cwd,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + limit
    warned = until is None
    try:
        while process.poll() is None:
            assert time.monotonic() < end, f"no end after {limit} s: {output.read_text()[-4000:]}"
            if not warned and until.exists():
                warn(process)
                warned = True
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output.read_text()


if __name__ == "__main__":
    {"srun": srun, "sbatch": sbatch, "scontrol": scontrol, "sbcast": sbcast, "jsrun": jsrun,
     "bsub": bsub, "module": module}[sys.argv[1]](sys.argv[2:])  # fmt: skip
