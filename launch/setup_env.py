#!/usr/bin/env python3
"""Set up .venv: pinned packages, Horovod built for this machine, the project itself.

Called by "make setup", "make test" and "make demo"; a call that finds nothing to do returns at
once. An interrupted or damaged set-up is mended by calling it again: each step is recorded only
when it is done, and checks what it finds.

Only the standard library is used, and the file parses on Python 3.6, so that an old Python can say
which one is needed.
"""

import argparse
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

PYTHON_MIN, PYTHON_MAX = (3, 11), (3, 13)
HOROVOD = "0.28.1"
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
# Part of the cache's key: raise it when the way Horovod is built changes.
BUILD_RECIPE = 1
VENV_BYTES = 8 * 10**9
# What pip keeps of its downloads, where there is room.
CACHE_BYTES = 4 * 10**9
PTH_NAME = "aadl_hvd_mpi.pth"

# Open MPI's wheel was built to live elsewhere: without OPAL_PREFIX a plain "python script.py"
# aborts in MPI_Init. Under a launcher its value stands. And as the wheel's mpirun belongs to this
# environment, a horovodrun that was called without activating it must find that one. The wheel is
# for machines without an MPI, where ranks share cores and may not wait by spinning: three ranks
# on two cores ran a test suite in 126 s spinning and in 17 s yielding.
PTH_LINE = (
    "import os, sys; e = os.environ; b = os.path.join(sys.prefix, 'bin'); "
    "p = e.get('PATH', os.defpath); "
    "e['OPAL_PREFIX'] = "
    "e.get('OPAL_PREFIX', sys.prefix) if 'OMPI_COMM_WORLD_SIZE' in e else sys.prefix; "
    "e['PATH'] = p if b in p.split(os.pathsep) else b + os.pathsep + p; "
    "e.setdefault('OMPI_MCA_mpi_yield_when_idle', '1')\n"
)

HELP_ENVIRONMENT = """
environment (an option given on the command line goes first):
  PYTHON            with make: the Python to use, e.g. PYTHON=python3.12 make test
  JOBS              compilers that run at the same time (default: cores, if memory allows)
  CXX, CC           the compilers; must know C++20
  AADL_HVD_MPI      auto, wheel or system, as --mpi
  AADL_HVD_GPU      auto, on or off, as --gpu
  CUDA_HOME         CUDA's toolkit, where nvcc is not on PATH
  HOROVOD_BUILD_CUDA_CC_LIST
                    compute capabilities to build for, e.g. 80,90 (default: of this machine's GPUs)
  XDG_CACHE_HOME    built Horovod wheels are kept in aadl_hvd/ below it (default: ~/.cache)
pip's own configuration (index, proxy, certificates) is used as it is.
"""


class SetupError(Exception):
    """Something is missing: what it is, and the one line that mends it."""

    def __init__(self, problem, mend):
        super().__init__(problem)
        self.problem = problem
        self.mend = mend


class CommandError(Exception):
    """A command failed; its output is in the log."""

    def __init__(self, command, status, tail):
        super().__init__(" ".join(map(str, command)))
        self.status = status
        self.tail = tail


# ------------------------------------------------------------------------------------------------
# small things


def digest(*parts):
    """Hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def file_sha256(path):
    result = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            result.update(block)
    return result.hexdigest()


def read_text(path):
    with open(path, encoding="utf-8") as stream:
        return stream.read()


def write_atomically(path, text):
    temporary = "%s.%d.tmp" % (path, os.getpid())
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text):
    """{normalised name: version} of the lines "name==version"."""
    pins = {}
    for line in text.splitlines():
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)", line)
        if match:
            pins[normalised(match.group(1))] = match.group(2)
    return pins


def output_of(command, timeout=60, env=None):
    """(status, stdout and stderr); status None where the command cannot be run at all."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return done.returncode, done.stdout.decode(errors="replace")


def existing_parent(path):
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def tree_bytes(path):
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def package_line(apt, dnf):
    """How this machine's package manager installs something; apt's spelling where none is known."""
    if not shutil.which("apt-get"):
        for manager in ("dnf", "yum", "zypper"):
            if shutil.which(manager):
                return "sudo %s install -y %s" % (manager, dnf)
    return "sudo apt-get install -y " + apt


# ------------------------------------------------------------------------------------------------
# Python


QUERY = """
import json, os, sys, sysconfig
def there(name):
    try:
        __import__(name)
        return True
    except Exception:
        return False
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "abi": sysconfig.get_config_var("SOABI") or "",
    "base": getattr(sys, "_base_executable", sys.executable) or sys.executable,
    "headers": os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")),
    "venv": there("venv") and there("ensurepip"),
    "implementation": sys.implementation.name,
}))
"""


def query_python(executable):
    """What a Python says of itself; None if it does not run."""
    status, text = output_of([executable, "-I", "-c", QUERY], env=clean_environment())
    if status != 0:
        return None
    try:
        found = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None
    found["executable"] = executable
    return found


def supported(found):
    return (
        found is not None
        and found["implementation"] == "cpython"
        and PYTHON_MIN <= tuple(found["version"][:2]) <= PYTHON_MAX
    )


def choose_python(explicit, running, query=query_python, which=shutil.which):
    """The Python to make .venv with: the one asked for, else the running one, else one on PATH."""
    found = query(explicit or running)
    if supported(found):
        return found
    if not explicit:
        for minor in range(PYTHON_MAX[1], PYTHON_MIN[1] - 1, -1):
            path = which("python3.%d" % minor)
            other = query(path) if path else None
            if supported(other):
                return other
    span = "%d.%d to %d.%d" % (PYTHON_MIN + PYTHON_MAX)
    if found is None:
        problem = "%s does not run; Python %s is needed" % (explicit or running, span)
    else:
        version = ".".join(map(str, found["version"]))
        problem = "Python %s is needed, this is %s" % (span, version)
        if found["implementation"] != "cpython":
            problem += " (%s)" % found["implementation"]
    raise SetupError(
        problem,
        package_line("python3.11 python3.11-venv python3.11-dev", "python3.11 python3.11-devel")
        + "   (and, where it is not on PATH: PYTHON=/path/to/python3.11 make setup)",
    )


# ------------------------------------------------------------------------------------------------
# what the machine has


def clean_environment(**more):
    """The environment for pip, compilers and checks: nothing of another Python or Horovod in it."""
    dropped = re.compile(
        r"^(PYTHON(HOME|PATH|STARTUP|NOUSERSITE)|VIRTUAL_ENV.*|CONDA_PREFIX|__PYVENV_LAUNCHER__"
        r"|PIP_(TARGET|PREFIX|ROOT|USER|REQUIRE_HASHES|NO_BINARY|ONLY_BINARY)"
        r"|MAKE(FLAGS|LEVEL|FILES)|MFLAGS|HOROVOD_.*|CMAKE_.*"
        r"|(OMPI|PMIX|PMI|ORTE)_.*)$"
    )
    env = {name: value for name, value in os.environ.items() if not dropped.match(name)}
    prefix = env.get("OPAL_PREFIX")
    if prefix and os.path.exists(os.path.join(prefix, "pyvenv.cfg")):
        del env["OPAL_PREFIX"]  # of a Python environment that runs this, not of the machine's MPI
    env["PIP_USER"] = "0"
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    env["PIP_NO_INPUT"] = "1"
    env["PIP_PROGRESS_BAR"] = "off"
    env.update(more)
    return env


CXX20_PROGRAM = """
#include <bit>
#include <compare>
#include <concepts>
#include <span>
#include <string>
#include <vector>
template <std::integral T> constexpr T twice(T x) { return x + x; }
struct Point { int x, y; auto operator<=>(const Point&) const = default; };
int main() {
  std::vector<int> v{1, 2};
  std::span<const int> s(v);
  return twice(s[0]) + int(std::bit_width(3u)) - 4 + !(Point{1, 2} == Point{1, 2});
}
"""


def compiles(command, source, suffix, folder):
    """Whether a compiler turns a source into a program."""
    path = os.path.join(folder, "probe" + suffix)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(source)
    status, _ = output_of([*command, path, "-o", os.path.join(folder, "probe")])
    return status == 0


def find_compilers(environ, folder, which=shutil.which):
    """{"cxx", "cc", "version"} of the first C++ compiler that knows C++20."""
    os.makedirs(folder, exist_ok=True)
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    mend = package_line("g++", "gcc-c++")
    present = [name for name in names if which(shlex.split(name)[0])]
    if not present:
        said = "CXX=%s is not there" % names[0] if environ.get("CXX") else "no C++ compiler"
        raise SetupError(said, mend + ("   (or unset CXX)" if environ.get("CXX") else ""))
    for name in present:
        command = shlex.split(name)
        if compiles([*command, "-std=c++20"], CXX20_PROGRAM, ".cc", folder):
            break
    else:
        _, said = output_of([shlex.split(present[0])[0], "--version"])
        raise SetupError(
            "%s does not know C++20, which torch's headers need (%s)"
            % (present[0], (said.splitlines() or ["?"])[0]),
            package_line("g++-12", "gcc-toolset-12-gcc-c++") + " && CXX=g++-12 make setup",
        )
    beside = re.sub(r"clang\+\+", "clang", re.sub(r"(?<!clan)g\+\+", "gcc", command[0]))
    candidates = [environ["CC"]] if environ.get("CC") else [beside, "cc", "gcc", "clang"]
    for cc in candidates:
        usable = which(shlex.split(cc)[0]) and not cc.endswith("+")
        if usable and compiles(shlex.split(cc), "int main(void) { return 0; }\n", ".c", folder):
            break
    else:
        raise SetupError("no C compiler that works (Gloo, inside Horovod, needs one)", mend)
    _, said = output_of([command[0], "--version"])
    return {"cxx": name, "cc": cc, "version": (said.splitlines() or ["?"])[0]}


def find_system_mpi(path, folder, run=output_of, probe=True):
    """The first usable MPI on PATH, or None: Open MPI 4 or MPICH with mpirun and mpicxx together.

    Open MPI 5 does not understand the options horovodrun gives it. An MPI inside somebody's Python
    environment is not the machine's.
    """
    for entry in path.split(os.pathsep):
        mpirun, mpicxx = os.path.join(entry, "mpirun"), os.path.join(entry, "mpicxx")
        if not entry or not (os.access(mpirun, os.X_OK) and os.access(mpicxx, os.X_OK)):
            continue
        if os.path.exists(os.path.join(entry, os.pardir, "pyvenv.cfg")):
            continue
        status, said = run([mpirun, "--version"])
        if status != 0:
            continue
        open_mpi = re.search(r"Open MPI\)?\s+v?(\d+)\.(\S+)", said)
        if open_mpi and open_mpi.group(1) == "4":
            name = "Open MPI 4." + open_mpi.group(2)
        elif "HYDRA" in said or "MPICH" in said:
            version = re.search(r"Version:\s*(\S+)", said)
            name = "MPICH " + (version.group(1) if version else "?")
        else:
            continue
        _, show = run([mpicxx, "-show"])
        if probe:
            program = "#include <mpi.h>\nint main() { return MPI_Init(nullptr, nullptr); }\n"
            os.makedirs(folder, exist_ok=True)
            if not compiles([mpicxx], program, ".cc", folder):
                continue
        return {"kind": "system", "name": name, "bin": entry, "show": show.strip()}
    return None


def choose_mpi(wanted, recorded, wheel_version, system):
    """Which MPI: the recorded choice stands, or else a shell with another PATH would rebuild."""
    wheel = {"kind": "wheel", "name": "Open MPI %s (PyPI wheel)" % wheel_version}
    if recorded and wanted in ("auto", recorded["kind"]):
        if recorded["kind"] == "wheel":
            return wheel
        if os.access(os.path.join(recorded["bin"], "mpirun"), os.X_OK):
            return recorded
    if wanted == "wheel":
        return wheel
    found = system()
    if found is None and wanted == "system":
        raise SetupError(
            "--mpi system: no Open MPI 4.x or MPICH with mpirun and mpicxx on PATH",
            package_line("libopenmpi-dev openmpi-bin", "openmpi-devel") + "   (or --mpi wheel)",
        )
    return found or wheel


def gpu_present():
    return bool(glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*"))


def find_cuda_home(environ, which=shutil.which, run=output_of):
    """CUDA's toolkit, looked up through wrappers of nvcc (CMake is misled by these); or None."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = environ.get(name)
        if home and os.access(os.path.join(home, "bin", "nvcc"), os.X_OK):
            return os.path.realpath(home)
    nvcc = which("nvcc")
    if nvcc:
        _, said = run([nvcc, "--dryrun", "-c", "x.cu"])
        here = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
        if here and os.access(os.path.join(here.group(1).strip(), "nvcc"), os.X_OK):
            return os.path.realpath(os.path.join(here.group(1).strip(), os.pardir))
    if os.access("/usr/local/cuda/bin/nvcc", os.X_OK):
        return os.path.realpath("/usr/local/cuda")
    return None


def choose_gpu(wanted, environ, present=gpu_present, find=find_cuda_home, run=output_of):
    """Where a GPU and CUDA's compiler are: {"home", "version", "archs"}; otherwise None."""
    if wanted == "off" or (wanted == "auto" and not present()):
        return None
    home = find(environ)
    if home is None:
        if wanted == "on":
            raise SetupError(
                "--gpu on: CUDA's compiler (nvcc) is not there",
                "export CUDA_HOME=/path/to/cuda   (or --gpu off)",
            )
        return None
    _, said = run([os.path.join(home, "bin", "nvcc"), "--version"])
    version = re.search(r"release (\d+\.\d+)", said)
    archs = environ.get("HOROVOD_BUILD_CUDA_CC_LIST", "")
    if not archs:
        status, said_gpu = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        if status == 0:
            archs = ",".join(
                sorted({c.replace(".", "") for c in re.findall(r"^\d+\.\d+$", said_gpu, re.M)})
            )
    return {"home": home, "version": version.group(1) if version else "?", "archs": archs}


def default_jobs():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return cores or 1
    # One file of Horovod's that includes torch's headers takes up to 1.5 GB.
    return max(1, min(cores or 1, memory // (2 * 10**9)))


def check_disk(root, missing_bytes, usage=shutil.disk_usage):
    """What is wrong with the space where .venv is going to be, or None."""
    place = existing_parent(os.path.join(root, ".venv"))
    free = usage(place).free
    if free >= missing_bytes:
        return None
    return SetupError(
        "%.1f GB are needed in %s, %.1f GB are free" % (missing_bytes / 1e9, place, free / 1e9),
        "free some space, or move the checkout to a larger disk",
    )


def room_for_pip_cache(root, cache, missing_bytes, usage=shutil.disk_usage, device=None):
    """Whether pip may keep what it downloads besides installing it."""
    device = device or (lambda path: os.stat(path).st_dev)
    place, other = existing_parent(os.path.join(root, ".venv")), existing_parent(cache)
    need = CACHE_BYTES + (missing_bytes if device(place) == device(other) else 0)
    return usage(other).free >= need


# ------------------------------------------------------------------------------------------------
# what .venv has


def site_packages(venv):
    found = sorted(glob.glob(os.path.join(venv, "lib", "python3.*", "site-packages")))
    return found[-1] if found else None


def installed(site):
    """{normalised name: (version, folder)} from the names of the metadata folders: fast."""
    found = {}
    for name in os.listdir(site) if site and os.path.isdir(site) else ():
        match = re.match(r"(.+?)-([^-]+)\.dist-info$", name)
        if match:
            found[normalised(match.group(1))] = (match.group(2), os.path.join(site, name))
    return found


def wrong_pins(found, direct, constraints):
    """Packages that are missing, or there in another version than was tested."""
    wrong = [name for name in direct if name not in found]
    for name, version in dict(constraints, **direct).items():
        if name in found and found[name][0].split("+")[0] != version.split("+")[0]:
            wrong.append(name)
    return sorted(set(wrong))


def damaged_packages(site):
    """Packages of which a killed pip left only a part, or of which files are gone since."""
    damaged = []
    for name, (_, folder) in installed(site).items():
        record = os.path.join(folder, "RECORD")
        try:
            lines = read_text(record).splitlines()
        except OSError:
            damaged.append(name)
            continue
        for line in lines:
            path, _, size = line.rsplit(",", 2) if line.count(",") >= 2 else (line, "", "")
            path = path.strip('"')
            if path.endswith(".pyc") or not path:
                continue
            try:
                actual = os.stat(os.path.join(site, path)).st_size
            except OSError:
                damaged.append(name)
                break
            # What is no library may have been changed on purpose.
            if size.isdigit() and ".so" in path and actual != int(size):
                damaged.append(name)
                break
    return sorted(damaged)


def torch_build(site):
    """(version, CUDA version or None) without importing torch."""
    try:
        text = read_text(os.path.join(site, "torch", "version.py"))
    except OSError:
        return "?", None
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return version.group(1) if version else "?", cuda.group(1) if cuda else None


def c_library():
    """Name and version of the C library; platform.libc_ver() depends on the Python that asks."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return "?"


def cpu_flags():
    try:
        words = set(re.findall(r"\w+", read_text("/proc/cpuinfo")))
    except OSError:
        return []
    return sorted(words & {"f16c", "avx", "fma"})


def cache_ingredients(python, torch, torch_cuda, mpi, gpu, nccl, compilers, environ):
    """All that the built Horovod depends on."""
    return {
        "horovod": HOROVOD,
        "recipe": BUILD_RECIPE,
        "python": python["abi"],
        "platform": [platform.system(), platform.machine(), c_library()],
        "cpu": cpu_flags(),
        "torch": torch,
        "torch_cuda": torch_cuda,
        "mpi": {name: mpi[name] for name in sorted(mpi)},
        "gpu": dict(gpu, nccl=nccl) if gpu else "cpu",
        "compiler": compilers["version"],
        "flags": [environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")],
    }


def cache_home(environ):
    base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "aadl_hvd")


def cached_wheel(folder):
    """The wheel in a folder of the cache, if it is whole."""
    try:
        about = json.loads(read_text(os.path.join(folder, "about.json")))
        wheel = os.path.join(folder, about["wheel"])
        if file_sha256(wheel) == about["sha256"]:
            return wheel
    except (OSError, ValueError, KeyError):
        pass
    return None


def store_wheel(wheel, folder, ingredients):
    """Put a built wheel into the cache, all or nothing."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = "%s.%d.tmp" % (folder, os.getpid())
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary)
    shutil.copy(wheel, temporary)
    about = {
        "wheel": os.path.basename(wheel),
        "sha256": file_sha256(wheel),
        "built_from": ingredients,
    }
    write_atomically(os.path.join(temporary, "about.json"), json.dumps(about, indent=2) + "\n")
    if os.path.exists(folder):
        old = temporary + ".old"
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, folder)
    return os.path.join(folder, os.path.basename(wheel))


# ------------------------------------------------------------------------------------------------
# running commands


class Runner:
    """Runs commands with their output going to the log, and shows that time passes."""

    def __init__(self, log, lock=None):
        self.log = log
        self.lock = lock
        self.terminal = sys.stdout.isatty()
        self.process = None

    def last_lines(self, start, count):
        with open(self.log, "rb") as stream:
            stream.seek(start)
            lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip()][-count:]

    def __call__(self, command, env=None, cwd=None, timeout=None):
        """Run a command; its output. CommandError if it fails."""
        command = [str(part) for part in command]
        with open(self.log, "ab") as log:
            log.write(("\n$ %s\n" % " ".join(map(shlex.quote, command))).encode())
            log.flush()
            start = log.tell()
            begun = shown = time.time()
            # A child that outlives a killed set-up keeps the lock, so that the next one waits.
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                cwd=cwd,
                pass_fds=() if self.lock is None else (self.lock,),
                start_new_session=True,
            )
            try:
                while True:
                    try:
                        status = self.process.wait(0.2 if self.terminal else 1)
                        break
                    except subprocess.TimeoutExpired:
                        pass
                    now = time.time()
                    if timeout and now - begun > timeout:
                        self.stop()
                        status = None
                        break
                    if now - shown > (1 if self.terminal else 60):
                        shown = now
                        self.show(now - begun, start)
            except BaseException:
                self.stop()
                raise
            finally:
                self.process = None
                if self.terminal:
                    sys.stdout.write("\r\033[K")
        if status != 0:
            raise CommandError(command, status, self.last_lines(start, 20))
        with open(self.log, "rb") as stream:
            stream.seek(start)
            return stream.read().decode(errors="replace")

    def show(self, seconds, start):
        line = (self.last_lines(start, 1) or [""])[0].strip()
        text = "      %4.0f s  %s" % (seconds, line)
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r\033[K" + text[:width])
        else:
            sys.stdout.write(text[:100] + "\n")
        sys.stdout.flush()

    def stop(self):
        """End the command and all that it started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
                return


HINTS = (
    (
        r"No space left on device",
        "the disk is full",
        "free some space, then call the same command again: it goes on from here",
    ),
    (
        r"NewConnectionError|Connection refused|ConnectionError|ReadTimeout"
        r"|Name or service not known|Temporary failure in name resolution|Network is unreachable"
        r"|ProxyError|SSLError"
        r"|CERTIFICATE_VERIFY_FAILED|Connection broken|Could not fetch URL|Max retries exceeded",
        "pip cannot reach its package index",
        'check the network and "pip config list" (index-url, proxy, cert), then call it again',
    ),
    (
        r"No matching distribution found for (\S+)",
        "pip's package index does not have a pinned version",
        'check "pip config list": the index must offer all of PyPI (extra-index-url)',
    ),
    (
        r"Killed signal|cc1plus.*(Killed|out of memory)|virtual memory exhausted",
        "the compiler ran out of memory",
        "JOBS=1 make setup",
    ),
)


def explain(tail):
    """A known cause behind the last lines of a log: (problem, mend) or None."""
    text = "\n".join(tail)
    for pattern, problem, mend in HINTS:
        if re.search(pattern, text):
            return problem, mend
    return None


# ------------------------------------------------------------------------------------------------
# the checks that run inside .venv


CHECK_TORCH = """
import torch, torchvision
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
import nvidia.dali
print("torch", torch.__version__, "CUDA", torch.version.cuda)
"""

CHECK_HOROVOD = """
import sys
import torch
import horovod.torch as hvd
assert hvd.mpi_built(), "Horovod was built without MPI"
assert hvd.gloo_built(), "Horovod was built without Gloo"
assert hvd.nccl_built() or sys.argv[1] != "nccl", "Horovod was built without NCCL"
assert bool(hvd.cuda_built()) == (sys.argv[1] == "nccl"), "Horovod was built for another machine"
hvd.init()
assert hvd.size() == 1
assert float(hvd.allreduce(torch.ones(1), op=hvd.Sum, name="check")) == 1.0
"""

# Two different MPI libraries in one process would not notice each other: mpi4py, loaded first, must
# find the one that Horovod is linked with.
CHECK_MPI = """
import os
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import torch
import horovod.torch as hvd
hvd.init()
assert hvd.size() == 2, hvd.size()
assert float(hvd.allreduce(torch.ones(1), op=hvd.Sum, name="check")) == 2.0
libraries = {
    os.path.realpath(line.split()[-1])
    for line in open("/proc/self/maps")
    if os.path.basename(line.split()[-1]).startswith(("libmpi.so", "libmpich.so"))
}
assert len(libraries) == 1, "two MPI libraries in one process: %s" % sorted(libraries)
assert MPI.COMM_WORLD.Get_size() == 2, MPI.COMM_WORLD.Get_size()
assert MPI.COMM_WORLD.allreduce(1) == 2
hvd.shutdown()
"""

CHECK_GLOO = """
import torch
import horovod.torch as hvd
hvd.init()
assert hvd.size() == 2, hvd.size()
assert float(hvd.allreduce(torch.ones(1), op=hvd.Sum, name="check")) == 2.0
hvd.shutdown()
"""


# ------------------------------------------------------------------------------------------------
# building Horovod


TOOLCHAIN = r"""
# CMake reads this file before Horovod's project and, through CMAKE_PROJECT_INCLUDE, after it.
set(CMAKE_PROJECT_INCLUDE ${CMAKE_CURRENT_LIST_FILE})
# Horovod asks for C++14; torch's headers need C++20.
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION -std=c++20)
# The wheel must work in any environment, not only in the one it was built in.
set(CMAKE_BUILD_RPATH "@RPATH@")
"""

NO_CUDA = """
# Built for the CPU: a CUDA toolkit that happens to be there is not to be tried.
set(CMAKE_CUDA_COMPILER "")
set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit TRUE)
"""

# Horovod builds its CUDA parts as soon as torch is a CUDA build and finds a toolkit, GPU or not,
# and leaves no switch to say otherwise.
PATCH_FILE = os.path.join("cmake", "Modules", "FindPytorch.cmake")
PATCH_FROM = "(torch.version.cuda is not None) and (CUDA_HOME is not None)"


def toolchain_text(mpi, gpu):
    # The module is site-packages/horovod/torch/*.so: $ORIGIN/../.. is site-packages.
    rpath = [r"\$ORIGIN/../../torch/lib"]
    if mpi["kind"] == "wheel":
        rpath.insert(0, r"\$ORIGIN/../../../..")
    if gpu:
        rpath.append(r"\$ORIGIN/../../nvidia/nccl/lib")
    return TOOLCHAIN.replace("@RPATH@", ";".join(rpath)) + ("" if gpu else NO_CUDA)


def patch_for_cpu(source):
    path = os.path.join(source, PATCH_FILE)
    text = read_text(path)
    if text.count(PATCH_FROM) != 1:
        raise SetupError(
            "Horovod's %s is not the one of %s" % (PATCH_FILE, HOROVOD),
            'check "pip config list": the index serves a changed Horovod',
        )
    write_atomically(path, text.replace(PATCH_FROM, "False"))


def nccl_home(site, folder):
    """pip's NCCL, laid out as FindNCCL.cmake expects it: with a libnccl.so."""
    pip_nccl = os.path.join(site, "nvidia", "nccl")
    library = os.path.join(pip_nccl, "lib", "libnccl.so.2")
    if not os.path.exists(library):
        raise SetupError(
            "torch came without NCCL (nvidia/nccl), which the GPU build needs",
            "pip must install the ordinary torch, not a +cpu build; or --gpu off",
        )
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(os.path.join(folder, "lib"))
    os.symlink(os.path.join(pip_nccl, "include"), os.path.join(folder, "include"))
    os.symlink(library, os.path.join(folder, "lib", "libnccl.so"))
    return folder


def build_environment(venv, site, work, mpi, gpu, compilers, jobs):
    path = [os.path.join(venv, "bin")]
    more = {}
    if mpi["kind"] == "wheel":
        more["OPAL_PREFIX"] = os.path.abspath(venv)
        more["MPI_HOME"] = os.path.abspath(venv)
    else:
        path.insert(0, mpi["bin"])
    if gpu:
        path.append(os.path.join(gpu["home"], "bin"))
        more.update(
            CUDA_HOME=gpu["home"],
            CUDACXX=os.path.join(gpu["home"], "bin", "nvcc"),
            CUDAToolkit_ROOT=gpu["home"],
            HOROVOD_CUDA_HOME=gpu["home"],
            HOROVOD_GPU_OPERATIONS="NCCL",
            HOROVOD_NCCL_HOME=nccl_home(site, os.path.join(work, "nccl")),
            HOROVOD_NCCL_LINK="SHARED",
        )
        if gpu["archs"]:
            more["HOROVOD_BUILD_CUDA_CC_LIST"] = gpu["archs"]
    else:
        more["HOROVOD_WITHOUT_NVTX"] = "1"
    more.update(
        CXX=compilers["cxx"],
        CC=compilers["cc"],
        MAKEFLAGS="-j%d" % jobs,
        CMAKE_TOOLCHAIN_FILE=os.path.join(work, "toolchain.cmake"),
        CMAKE_GENERATOR="Unix Makefiles",
        HOROVOD_CMAKE=os.path.join(venv, "bin", "cmake"),
        HOROVOD_WITH_PYTORCH="1",
        HOROVOD_WITHOUT_TENSORFLOW="1",
        HOROVOD_WITHOUT_MXNET="1",
        HOROVOD_WITH_MPI="1",
        HOROVOD_WITH_GLOO="1",
        PATH=os.pathsep.join([*path, os.environ.get("PATH", os.defpath)]),
    )
    return clean_environment(**more)


# ------------------------------------------------------------------------------------------------
# the set-up


class Setup:
    """One set-up of one checkout."""

    def __init__(self, root, options, environ=None):
        self.root = os.path.abspath(root)
        self.options = options
        self.environ = dict(os.environ if environ is None else environ)
        self.venv = os.path.join(self.root, ".venv")
        self.python = os.path.join(self.venv, "bin", "python")
        self.scratch = os.path.join(self.root, ".setup")
        self.log = os.path.join(self.scratch, "log")
        self.state_file = os.path.join(self.venv, "aadl_hvd_setup.json")
        launch = os.path.join(self.root, "launch")
        self.requirements = os.path.join(launch, "requirements.txt")
        self.constraints = os.path.join(launch, "constraints.txt")
        self.direct = read_pins(read_text(self.requirements))
        self.pinned = read_pins(read_text(self.constraints))
        self.cache = cache_home(self.environ)
        self.run = None
        self.state = self.read_state()

    # -- state

    def read_state(self):
        try:
            state = json.loads(read_text(self.state_file))
            return state if isinstance(state, dict) else {}
        except (OSError, ValueError):
            return {}

    def record(self, **more):
        self.state.update(more)
        write_atomically(self.state_file, json.dumps(self.state, indent=2, sort_keys=True) + "\n")

    def fingerprint(self):
        files = [self.requirements, self.constraints, os.path.abspath(__file__)]
        return digest([file_sha256(path) for path in files], self.project_key(), HOROVOD)

    def project_key(self):
        files = [os.path.join(self.root, name) for name in ("setup.cfg", "pyproject.toml")]
        package = os.path.exists(os.path.join(self.root, "aadl_hvd", "__init__.py"))
        return digest(
            self.root, package, [file_sha256(path) for path in files if os.path.exists(path)]
        )

    def required(self, mpi):
        direct = dict(self.direct)
        if mpi["kind"] == "wheel":
            direct["openmpi"] = self.pinned["openmpi"]
        return direct

    def reason(self):
        """Why there is something to do; None if there is nothing. Takes milliseconds."""
        state, options = self.state, self.options
        if not os.path.exists(self.python):
            return "no .venv yet"
        if state.get("fingerprint") != self.fingerprint():
            return "new or unfinished, or its requirements have changed"
        mpi = state["mpi"]
        if options.rebuild:
            return "--rebuild"
        if options.mpi not in ("auto", mpi["kind"]):
            return "another MPI is asked for"
        site = site_packages(self.venv)
        if mpi["kind"] == "wheel":
            if not os.path.exists(os.path.join(site or "", PTH_NAME)):
                return "%s is gone" % PTH_NAME
        elif not os.access(os.path.join(mpi["bin"], "mpirun"), os.X_OK):
            return "%s is gone" % mpi["name"]
        wrong = wrong_pins(installed(site), dict(self.required(mpi), horovod=HOROVOD), self.pinned)
        if wrong:
            return "changed since: %s" % ", ".join(wrong)
        if options.python and not self.same_python(options.python):
            return "another Python is asked for"
        if not state.get("gpu"):
            if options.gpu == "on" or (
                options.gpu == "auto"
                and gpu_present()
                and find_cuda_home(self.environ)
                and not state.get("gpu_unusable")
            ):
                return "there is a GPU now"
        elif options.gpu == "off":
            return "a build without GPU is asked for"
        return None

    def same_python(self, executable):
        mine, other = query_python(self.python), query_python(executable)
        return mine is not None and other is not None and mine["abi"] == other["abi"]

    # -- talking

    def say(self, text=""):
        print(text, flush=True)

    @contextlib.contextmanager
    def step(self, title):
        self.number += 1
        self.say("[%d/%d] %s" % (self.number, self.steps, title))
        begun = time.time()
        yield
        self.say("      done in %.0f s" % (time.time() - begun))

    # -- the whole

    def main(self):
        if self.reason() is None:
            if not self.options.quiet:
                self.say("set-up: .venv is ready")
            return
        if sys.platform != "linux":
            raise SetupError("Horovod, NCCL and DALI need Linux", "use a Linux machine, or WSL 2")
        if re.search(r"\s", self.root):
            raise SetupError(
                "the path of the checkout contains a blank: %r" % self.root,
                "move the checkout to a path without blanks (MPI's compiler wrappers need it)",
            )
        os.makedirs(self.scratch, exist_ok=True)
        with self.locked(os.path.join(self.scratch, "lock")) as lock:
            self.state = self.read_state()
            why = self.reason()
            if why is None:
                return
            open(self.log, "w").close()
            self.run = Runner(self.log, lock)
            self.say("set-up of .venv (%s)" % why)
            self.work()

    @contextlib.contextmanager
    def locked(self, path):
        with open(path, "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.say("waiting for another set-up, which holds %s ..." % path)
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream.fileno()

    def work(self):
        begun = time.time()
        self.number, self.steps = 0, 5
        self.preflight()
        if self.options.check:
            self.say("nothing is missing")
            return
        self.ensure_venv()
        self.ensure_packages()
        self.ensure_horovod()
        self.ensure_project()
        self.verify()
        shutil.rmtree(os.path.join(self.scratch, "tmp"), ignore_errors=True)
        self.record(fingerprint=self.fingerprint())
        self.say("set-up done in %.0f s" % (time.time() - begun))

    def preflight(self):
        """Find out what is there; stop before anything is downloaded if something is missing."""
        problems = []
        probe = os.path.join(self.scratch, "probe")

        def look(function, *arguments):
            try:
                return function(*arguments)
            except SetupError as error:
                problems.append(error)
                return None

        explicit = self.options.python
        mine = query_python(self.python) if os.path.exists(self.python) else None
        self.keep_venv = (
            supported(mine)
            and output_of([self.python, "-m", "pip", "--version"], env=clean_environment())[0] == 0
        )
        if self.keep_venv and explicit and not self.same_python(explicit):
            self.keep_venv = False
        self.base = mine if self.keep_venv else look(choose_python, explicit, sys.executable)
        if self.base:
            self.check_python(problems)
        foreign = not os.path.exists(os.path.join(self.venv, "pyvenv.cfg"))
        if os.path.isdir(self.venv) and os.listdir(self.venv) and foreign:
            problems.append(
                SetupError(".venv is there and is no Python environment", "mv .venv venv.old")
            )
        self.compilers = look(find_compilers, self.environ, probe)
        if not (shutil.which("make") or shutil.which("gmake")):
            problems.append(SetupError("make is missing", package_line("make", "make")))
        self.mpi = look(
            choose_mpi,
            self.options.mpi,
            self.state.get("mpi"),
            self.pinned["openmpi"],
            lambda: find_system_mpi(self.environ.get("PATH", ""), probe),
        )
        self.gpu = look(choose_gpu, self.options.gpu, self.environ)
        if not self.gpu and self.options.gpu == "auto" and self.state.get("gpu"):
            self.gpu = self.state["gpu"]  # built here for a GPU that this node does not show
        missing = VENV_BYTES
        if self.keep_venv:
            missing = max(0, missing - tree_bytes(self.venv))
        problems.extend(filter(None, [check_disk(self.root, missing)]))
        self.pip_cache = room_for_pip_cache(self.root, os.path.dirname(self.cache), missing)
        shutil.rmtree(probe, ignore_errors=True)
        if problems:
            raise Problems(problems)
        self.say(
            "  Python %s, %s, %s, %s"
            % (
                ".".join(map(str, self.base["version"])),
                self.compilers["version"],
                self.mpi["name"],
                "CUDA %(version)s at %(home)s" % self.gpu if self.gpu else "no GPU build",
            )
        )
        if gpu_present() and not self.gpu and self.options.gpu == "auto":
            self.say(
                "  note: this machine has a GPU but no nvcc, so Horovod is built without\n"
                "        NCCL; mend: install CUDA's toolkit or load its module, then make setup"
            )
        self.say(
            "  a first set-up takes about %d minutes and %.0f GB, 1 to 3 minutes where Horovod is\n"
            "  cached; all output goes to %s"
            % (2 + self.build_minutes(self.gpu), VENV_BYTES / 1e9, self.log)
        )

    def check_python(self, problems):
        version = "%d.%d" % tuple(self.base["version"][:2])
        if not self.keep_venv and not self.base["venv"]:
            problems.append(
                SetupError(
                    "Python %s has no venv or ensurepip module" % version,
                    package_line("python%s-venv" % version, "python3-pip"),
                )
            )
        if not self.base["headers"]:
            problems.append(
                SetupError(
                    "Python %s has no headers (Python.h), Horovod needs them" % version,
                    package_line("python%s-dev" % version, "python%s-devel" % version),
                )
            )

    def build_minutes(self, gpu):
        """Measured: 5 minutes of processor time without CUDA, 6 with it for two kinds of GPU."""
        return max(2, round((8.0 if gpu else 6.0) / min(self.jobs(), 4)))

    def jobs(self):
        return self.options.jobs or default_jobs()

    def environment(self):
        """For pip: its temporary files lie beside .venv, /tmp may be small."""
        temporary = os.path.join(self.scratch, "tmp")
        os.makedirs(temporary, exist_ok=True)
        path = os.path.join(self.venv, "bin") + os.pathsep + self.environ.get("PATH", os.defpath)
        return clean_environment(TMPDIR=temporary, PATH=path)

    def pip(self, *arguments):
        return self.run(
            [self.python, "-m", "pip", *arguments], env=self.environment(), cwd=self.root
        )

    # -- the steps

    def ensure_venv(self):
        with self.step("Python environment .venv"):
            if self.keep_venv:
                return
            self.run(
                [self.base["base"], "-m", "venv", "--clear", self.venv], env=clean_environment()
            )
            self.state = {}

    def ensure_packages(self):
        key = digest(self.required(self.mpi), self.pinned, self.mpi)
        title = "packages: torch %s, torchvision %s, DALI %s, mpi4py %s and others (1 to 3 minutes)"
        names = ("torch", "torchvision", "nvidia-dali-cuda130", "mpi4py")
        with self.step(title % tuple(self.direct[name] for name in names)):
            site = site_packages(self.venv)
            again = dict.fromkeys(damaged_packages(site), "is damaged")
            if self.state.get("mpi", self.mpi) != self.mpi and "mpi4py" in installed(site):
                again["mpi4py"] = "belongs to another MPI"
            if self.mpi["kind"] == "system" and "openmpi" in installed(site):
                self.pip("uninstall", "-y", "openmpi")
            for name in sorted(again):
                # Without its metadata pip takes a package for absent and puts it there again.
                self.say("      %s %s, installing it again" % (name, again[name]))
                shutil.rmtree(installed(site)[name][1])
            if wrong_pins(installed(site), self.required(self.mpi), self.pinned) or (
                self.state.get("packages") != key and not self.consistent()
            ):
                self.install_packages()
            self.write_pth(site)
            try:
                self.check(CHECK_TORCH)
            except CommandError as error:
                if "torchvision::nms" in "\n".join(error.tail):
                    raise SetupError(
                        "torch and torchvision are different builds (CPU-only and CUDA)",
                        'check "pip config list" for an index or find-links of CPU builds, then'
                        " .venv/bin/pip uninstall -y torch torchvision && make setup",
                    ) from None
                raise
            if self.gpu and torch_build(site)[1] is None:
                raise SetupError(
                    "pip found a CPU-only torch, but this machine has a GPU",
                    'check "pip config list" for an index of CPU builds; or --gpu off',
                )
            self.record(packages=key, mpi=self.mpi)

    def consistent(self):
        try:
            self.pip("check")
            return True
        except CommandError:
            return False

    def install_packages(self):
        # A small one first: an index that cannot be reached shows within seconds.
        probe = os.path.join(self.scratch, "tmp", "probe")
        self.pip(
            "download", "-q", "--no-deps", "--retries", "1", "--timeout", "20", "-d", probe,
            "wheel==" + self.direct["wheel"],
        )  # fmt: skip
        packages = ["openmpi==" + self.pinned["openmpi"]] if self.mpi["kind"] == "wheel" else []
        options = ["-c", self.constraints] + ([] if self.pip_cache else ["--no-cache-dir"])
        # pip keeps all that it downloads until the end of a call: with the large ones on their own
        # the peak is 8 GB and not 11. Which ones are needed the last call alone decides.
        large = [name for name in self.pinned if name.startswith("nvidia-") and "dali" not in name]
        for group in (large, ["torch", "triton", "nvidia-dali-cuda130"]):
            try:
                self.pip("install", "--no-deps", *options, *group)
            except CommandError as error:
                if explain(error.tail):
                    raise
                self.say("      installing %s failed, trying without" % group[0])
        self.pip("install", "-r", self.requirements, *options, *packages)

    def write_pth(self, site):
        path = os.path.join(site, PTH_NAME)
        if self.mpi["kind"] == "wheel":
            write_atomically(path, PTH_LINE)
        elif os.path.exists(path):
            os.remove(path)

    def check(self, program, *arguments):
        """Run a check with .venv's Python, as a user would: no launcher, not activated."""
        env = clean_environment(CUDA_CACHE_DISABLE="1")
        return self.run([self.python, "-c", program, *arguments], env=env, timeout=300)

    def ensure_horovod(self):
        site = site_packages(self.venv)
        torch, torch_cuda = torch_build(site)
        gpu, unusable = self.gpu, False
        if gpu and torch_cuda and torch_cuda.split(".")[0] != gpu["version"].split(".")[0]:
            self.say(
                "  note: torch is built for CUDA %s, nvcc is %s: Horovod is built without NCCL;\n"
                "        mend: export CUDA_HOME=/path/to/cuda-%s && make setup"
                % (torch_cuda, gpu["version"], torch_cuda.split(".")[0])
            )
            gpu, unusable = None, True
        nccl = installed(site).get("nvidia-nccl-cu13", ("?",))[0] if gpu else None
        ingredients = cache_ingredients(
            self.base, torch, torch_cuda, self.mpi, gpu, nccl, self.compilers, self.environ
        )
        key = digest(ingredients)
        mode = "nccl" if gpu else "cpu"
        title = "Horovod %s with MPI, Gloo%s" % (HOROVOD, " and NCCL" if gpu else "")
        if self.state.get("horovod") == key and not self.options.rebuild:
            try:
                with self.step(title + ": there already"):
                    self.check(CHECK_HOROVOD, mode)
                return
            except CommandError:
                self.say("      it does not work; installing it again")
                self.number -= 1
        folder = os.path.join(self.cache, "horovod", key)
        try:
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            open(folder + ".lock", "a").close()
        except OSError:
            folder = os.path.join(self.scratch, "horovod", key)
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            self.say("  note: %s cannot be written to, the built Horovod stays here" % self.cache)
        with self.locked(folder + ".lock"):
            wheel = None if self.options.rebuild else cached_wheel(folder)
            if wheel:
                try:
                    with self.step(title + ": from the cache, " + folder):
                        self.install_wheel(wheel, mode)
                except CommandError:
                    self.say("      the cached wheel does not work; building it again")
                    self.number -= 1
                    wheel = None
            if not wheel:
                minutes = self.build_minutes(gpu)
                with self.step(title + ": building, about %d minutes" % minutes):
                    built = self.build_horovod(site, gpu)
                    self.install_wheel(built, mode)
                    store_wheel(built, folder, ingredients)
        shutil.rmtree(os.path.join(self.scratch, "build"), ignore_errors=True)
        self.record(horovod=key, gpu=gpu, gpu_unusable=unusable)

    def install_wheel(self, wheel, mode):
        self.pip("install", "--no-deps", "--no-index", "--force-reinstall", wheel)
        self.check(CHECK_HOROVOD, mode)

    def build_horovod(self, site, gpu):
        work = os.path.join(self.scratch, "build")
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        env = build_environment(self.venv, site, work, self.mpi, gpu, self.compilers, self.jobs())
        env["TMPDIR"] = self.environment()["TMPDIR"]
        pip = [self.python, "-m", "pip"]
        self.run(
            [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", "horovod",
             "-d", work, "horovod==" + HOROVOD],
            env=env,
        )  # fmt: skip
        archive = os.path.join(work, "horovod-%s.tar.gz" % HOROVOD)
        if file_sha256(archive) != HOROVOD_SHA256:
            raise SetupError(
                "the source of Horovod %s is not the published one" % HOROVOD,
                'check "pip config list": the index serves a changed Horovod',
            )
        with tarfile.open(archive) as stream:
            if hasattr(tarfile, "data_filter"):
                stream.extractall(work, filter="data")
            else:
                stream.extractall(work)
        source = os.path.join(work, "horovod-" + HOROVOD)
        if not gpu:
            patch_for_cpu(source)
        with open(os.path.join(work, "toolchain.cmake"), "w", encoding="utf-8") as stream:
            stream.write(toolchain_text(self.mpi, gpu))
        wheels = os.path.join(work, "wheel")
        self.run(
            [*pip, "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir",
             "-w", wheels, source],
            env=env,
        )  # fmt: skip
        return glob.glob(os.path.join(wheels, "horovod-*.whl"))[0]

    def ensure_project(self):
        key = self.project_key()
        with self.step("the project itself (pip install -e .)"):
            site = site_packages(self.venv)
            if self.state.get("project") == key and "aadl-hvd" in installed(site):
                return
            self.pip("install", "--no-deps", "--no-build-isolation", "-e", self.root)
            self.record(project=key)

    def verify(self):
        with self.step("trying it: two ranks under horovodrun, on MPI and on Gloo"):
            try:
                self.ranks("--mpi", CHECK_MPI)
            except CommandError as error:
                if self.mpi["kind"] != "system":
                    raise
                # The wheel of mpi4py looks for MPI where the system's loader does.
                self.say("      mpi4py's wheel does not match %s: building it" % self.mpi["name"])
                del error
                env = dict(self.environment(), MPICC=os.path.join(self.mpi["bin"], "mpicc"))
                self.run(
                    [self.python, "-m", "pip", "install", "--no-deps", "--force-reinstall",
                     "--no-cache-dir", "--no-binary", "mpi4py", "mpi4py==" + self.direct["mpi4py"]],
                    env=env,
                )  # fmt: skip
                self.ranks("--mpi", CHECK_MPI)
            self.ranks("--gloo", CHECK_GLOO)

    def ranks(self, controller, program):
        path = os.path.join(self.scratch, "check_ranks.py")
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(program)
        env = clean_environment()
        if self.mpi["kind"] == "system":
            env["PATH"] = self.mpi["bin"] + os.pathsep + env["PATH"]
        horovodrun = os.path.join(self.venv, "bin", "horovodrun")
        command = [horovodrun, "-np", "2", "-H", "localhost:2", controller, self.python, path]
        self.run(command, env=env, timeout=180)


class Problems(Exception):
    """Everything that is missing, so that it can be mended in one go."""

    def __init__(self, problems):
        super().__init__(len(problems))
        self.problems = problems


def parse(arguments, environ):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=HELP_ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", help="the Python to make .venv with (default: the running one)")
    parser.add_argument("--jobs", type=int, help="compilers that run at the same time")
    parser.add_argument(
        "--mpi",
        choices=("auto", "wheel", "system"),
        default=environ.get("AADL_HVD_MPI") or "auto",
        help="auto: Open MPI 4.x or MPICH on PATH (mpirun with mpicxx), otherwise the PyPI wheel of"
        " Open MPI; the choice stays once made",
    )
    parser.add_argument(
        "--gpu",
        choices=("auto", "on", "off"),
        default=environ.get("AADL_HVD_GPU") or "auto",
        help="auto: build Horovod with NCCL where there is a GPU and nvcc; on: where there is nvcc"
        " (login nodes)",
    )
    parser.add_argument("--rebuild", action="store_true", help="build Horovod even if it is cached")
    parser.add_argument("--check", action="store_true", help="only look what is missing")
    parser.add_argument("--quiet", action="store_true", help="say nothing if nothing is to be done")
    options = parser.parse_args(arguments)
    if options.jobs is None and environ.get("JOBS"):
        try:
            options.jobs = int(environ["JOBS"])
        except ValueError:
            parser.error("JOBS=%r is not a number" % environ["JOBS"])
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs must be at least 1")
    for name, allowed in (("mpi", ("auto", "wheel", "system")), ("gpu", ("auto", "on", "off"))):
        if getattr(options, name) not in allowed:
            variable = "AADL_HVD_" + name.upper()
            parser.error("%s must be one of %s" % (variable, ", ".join(allowed)))
    return options


def complain(problem, mend):
    sys.stdout.flush()
    print("set-up stopped: %s\n          mend: %s" % (problem, mend), file=sys.stderr, flush=True)


def main(arguments=None, root=None):
    """The exit status."""
    options = parse(arguments, os.environ)
    root = root or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    setup = Setup(root, options)
    try:
        setup.main()
    except SetupError as error:
        complain(error.problem, error.mend)
    except Problems as error:
        for problem in error.problems:
            complain(problem.problem, problem.mend)
    except CommandError as error:
        sys.stdout.flush()
        for line in error.tail:
            print("  | " + line, file=sys.stderr)
        what = "ran too long" if error.status is None else "failed (%s)" % error.status
        print("%s: %s" % (what, error), file=sys.stderr)
        known = explain(error.tail)
        if known:
            complain(*known)
        else:
            complain("a command failed; all of its output is in %s" % setup.log, "see there")
    except KeyboardInterrupt:
        print("\nset-up interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
