"""Build Horovod for this machine: find what it needs, set up the build, and check the result.

PyPI has no wheels of Horovod. The built one is kept outside the checkout, in a folder whose name
is a hash of everything that it depends on. horovod.cmake has the changes to Horovod's build.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from sysconfig import get_config_var

HOROVOD = "0.28.1"
# Part of the cache's key. Raise it when the way Horovod is built changes.
BUILD_RECIPE = 1

CXX20_PROGRAM = "#include <bit>\n#include <span>\nint main() { return std::bit_width(0u); }\n"
MPI_PROGRAM = "#include <mpi.h>\nint main() { return MPI_Init(nullptr, nullptr); }\n"

Found = Mapping[str, str]


def clean_environment(**more: str) -> dict[str, str]:
    """The environment for pip, compilers and checks, without settings of other Pythons or jobs."""
    dropped = re.compile(
        r"PYTHON(HOME|PATH|STARTUP|NOUSERSITE)|VIRTUAL_ENV.*|CONDA_PREFIX|__PYVENV_LAUNCHER__"
        r"|PIP_(TARGET|PREFIX|ROOT|USER|REQUIRE_HASHES|NO_BINARY|ONLY_BINARY)"
        r"|MAKE(FLAGS|LEVEL|FILES)|MFLAGS|HOROVOD_.*|CMAKE_.*|(OMPI|PMIX|PMI|ORTE)_.*"
    )
    env = {name: value for name, value in os.environ.items() if not dropped.fullmatch(name)}
    # A cluster's module may set OPAL_PREFIX for an MPI that was moved; that value is kept.
    if os.path.exists(os.path.join(env.get("OPAL_PREFIX", "/"), "pyvenv.cfg")):
        del env["OPAL_PREFIX"]
    return {**env, "PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off", **more}


def output_of(*command: str | Path) -> tuple[bool, str]:
    """Whether a command succeeds within a minute, and its output."""
    env = clean_environment()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return False, ""
    return done.returncode == 0, done.stdout + done.stderr


def compiles(compiler: list[str], program: str) -> bool:
    """Whether a compiler turns a C++ program into an executable."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cc")
        source.write_text(program)
        return output_of(*compiler, source, "-o", source.with_suffix(""))[0]


def find_compiler(names: list[str]) -> dict[str, str] | None:
    """The first compiler that supports C++20, with the first line of its version."""
    for name in names:
        command = shlex.split(name)
        if compiles([*command, "-std=c++20"], CXX20_PROGRAM):
            return {"cxx": name, "version": output_of(command[0], "--version")[1].split("\n")[0]}
    return None


def find_system_mpi(path: str) -> dict[str, str] | None:
    """The first usable MPI on PATH: Open MPI 4 or MPICH, its mpirun and mpicxx in one folder.

    Open MPI 5 is not usable: it does not understand the options that horovodrun gives it. An MPI
    inside a Python environment is not the machine's. mpicxx must find MPI's headers.
    """
    for folder in filter(None, path.split(os.pathsep)):
        mpirun, mpicxx = os.path.join(folder, "mpirun"), os.path.join(folder, "mpicxx")
        in_venv = os.path.exists(os.path.join(folder, os.pardir, "pyvenv.cfg"))
        if in_venv or not (os.access(mpirun, os.X_OK) and os.access(mpicxx, os.X_OK)):
            continue
        said = output_of(mpirun, "--version")[1]
        name = re.search(r"Open MPI\)?\s+v?(4\.\S+)|(?:HYDRA|MPICH).*?Version:\s*(\S+)", said, re.S)
        if name and compiles([mpicxx], MPI_PROGRAM):
            about = f"Open MPI {name[1]}" if name[1] else f"MPICH {name[2]}"
            show = output_of(mpicxx, "-show")[1].strip()
            return {"kind": "system", "name": about, "bin": folder, "show": show}
    return None


def gpu_present() -> bool:
    """Whether this machine shows an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def find_gpu(environ: Found) -> dict[str, str] | None:
    """CUDA's toolkit and the compute capabilities to build for; None where there is no nvcc."""
    nvcc = Path(environ.get("CUDA_HOME", "unset"), "bin", "nvcc")
    if not nvcc.exists():
        nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    # nvcc on PATH may be a wrapper, which would mislead CMake. nvcc itself knows where it is.
    here = re.search(r"_HERE_=(.+)", output_of(nvcc, "--dryrun", "-c", "x.cu")[1])
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version")[1])
    if not (here and version):
        return None
    said = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")[1]
    seen = ",".join(sorted({a + b for a, b in re.findall(r"^(\d+)\.(\d+)$", said, re.M)}))
    archs = environ.get("HOROVOD_BUILD_CUDA_CC_LIST") or seen
    return {"home": str(Path(here[1]).resolve().parent), "version": version[1], "archs": archs}


def digest(*parts: object) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def ingredients(
    torch: str, torch_cuda: str, nccl: str, mpi: Found, gpu: Found | None, compiler: Found
) -> dict[str, object]:
    """Everything that the built Horovod depends on; the cache's key is its digest."""
    return {
        "horovod": HOROVOD,
        "recipe": BUILD_RECIPE,
        "python": get_config_var("SOABI"),
        "platform": [platform.system(), platform.machine(), os.confstr("CS_GNU_LIBC_VERSION")],
        "cpu": sorted({"f16c", "avx", "fma"} & {*Path("/proc/cpuinfo").read_text().split()}),
        "torch": torch,
        "torch_cuda": None if torch_cuda == "None" else torch_cuda,
        "mpi": mpi,
        "gpu": {**gpu, "nccl": nccl} if gpu else "cpu",
        "compiler": compiler["version"],
        "flags": [os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")],
    }


def build_environment(
    site: Path, work: Path, mpi: Found, gpu: Found | None, compiler: Found, jobs: str
) -> dict[str, str]:
    """The variables for ``pip wheel horovod``; gpu=None builds for the CPU.

    `site` is .venv's site-packages, and `work` an empty folder. `jobs` compilers run at a time.
    """
    venv = str(site.parents[2])
    path = [f"{venv}/bin", os.environ.get("PATH", os.defpath)]
    on = ["HOROVOD_WITH_PYTORCH", "HOROVOD_WITH_MPI", "HOROVOD_WITH_GLOO"]
    on += ["HOROVOD_WITHOUT_TENSORFLOW", "HOROVOD_WITHOUT_MXNET"]
    more = dict.fromkeys(on, "1")
    more.update(HOROVOD_CMAKE=f"{venv}/bin/cmake", CXX=compiler["cxx"])
    more.update(CMAKE_TOOLCHAIN_FILE=str(Path(__file__).with_name("horovod.cmake")))
    more.update(CMAKE_GENERATOR="Unix Makefiles", MAKEFLAGS=f"-j{jobs}")
    if gpu:
        cuda, nccl = gpu["home"], work / "nccl"
        # FindNCCL.cmake looks for libnccl.so, a name that pip's NCCL does not have.
        (nccl / "lib").mkdir(parents=True)
        (nccl / "include").symlink_to(site / "nvidia/nccl/include")
        (nccl / "lib/libnccl.so").symlink_to(site / "nvidia/nccl/lib/libnccl.so.2")
        path.insert(1, f"{cuda}/bin")
        more.update(CUDA_HOME=cuda, CUDACXX=f"{cuda}/bin/nvcc", CUDAToolkit_ROOT=cuda)
        more.update(HOROVOD_CUDA_HOME=cuda, HOROVOD_GPU_OPERATIONS="NCCL")
        more.update(HOROVOD_NCCL_HOME=str(nccl), HOROVOD_NCCL_LINK="SHARED")
        more.update({"HOROVOD_BUILD_CUDA_CC_LIST": gpu["archs"]} if gpu["archs"] else {})
    else:
        more["HOROVOD_WITHOUT_NVTX"] = "1"
    if mpi["kind"] == "wheel":
        more.update(OPAL_PREFIX=venv, MPI_HOME=venv)
    else:
        path.insert(0, mpi["bin"])
    return clean_environment(**more, PATH=os.pathsep.join(path), TMPDIR=str(work))


def check(kind: str, ranks: int, controller: str) -> None:
    """Test Horovod on each of `ranks` ranks, together with mpi4py if MPI started them."""
    from mpi4py import rc

    rc.initialize = False  # so that an MPI library that is not Horovod's stays uninitialised
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI

    assert hvd.mpi_built() and hvd.gloo_built(), "Horovod was built without MPI or Gloo"
    assert bool(hvd.nccl_built()) == bool(hvd.cuda_built()) == (kind == "nccl"), f"not for {kind}"
    hvd.init()
    assert hvd.size() == float(hvd.allreduce(torch.ones(1), op=hvd.Sum)) == ranks
    assert controller != "--mpi" or MPI.COMM_WORLD.allreduce(1) == ranks, "mpi4py has another MPI"
    hvd.shutdown()


if __name__ == "__main__":
    check(sys.argv[1], int(sys.argv[2]), sys.argv[3])
