"""What Horovod's build needs of a machine, its variables, toolchain file and cache key."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import build_horovod

WHEEL = {"kind": "wheel", "name": "Open MPI 4.1.8 (PyPI wheel)"}
CUDA = {"home": "/cuda", "version": "13.0", "archs": "90"}
TOOLCHAIN = Path(build_horovod.__file__).with_name("horovod.cmake")


def program(folder, name, text):
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + text + "\n")
    (folder / name).chmod(0o755)
    return folder / name


def test_compiler_must_know_cxx20(tmp_path):
    old = program(tmp_path, "old++", 'case "$*" in *--version*) echo "c++ 7.5";; *) exit 1; esac')
    assert build_horovod.find_compiler([str(old), str(tmp_path / "absent")]) is None
    if shutil.which("c++"):
        found = build_horovod.find_compiler([str(old), "c++"])
        assert found["cxx"] == "c++" and found["version"]


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
    def mpi(folder, wrapper):
        program(tmp_path / folder / "bin", "mpirun", f'echo "{version}"')
        if wrapper:
            program(tmp_path / folder / "bin", "mpicxx", wrapper)
        return str(tmp_path / folder / "bin")

    path = [mpi("venv", "exit 0"), mpi("no_wrapper", ""), mpi("no_headers", "exit 1")]
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    assert build_horovod.find_system_mpi(os.pathsep.join(path)) is None
    path.append(mpi("good", "echo g++ -lmpi"))
    found = build_horovod.find_system_mpi(os.pathsep.join(path))
    good = {"kind": "system", "name": name, "bin": path[-1], "show": "g++ -lmpi"}
    assert found == (good if name else None)


def test_cuda_is_found_through_a_wrapper(tmp_path, monkeypatch):
    here = tmp_path / "cuda-13.0" / "bin"
    says = f"*dryrun*) echo '#$ _HERE_={here}';; *) echo 'release 13.0, V13'"
    program(here, "nvcc", f'case "$*" in {says}; esac')
    program(tmp_path / "bin", "nvcc", f'exec {here}/nvcc "$@"')
    program(tmp_path / "bin", "nvidia-smi", "printf '9.0\\n8.0\\n9.0\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    expected = {"home": str(here.parent), "version": "13.0", "archs": "80,90"}
    assert build_horovod.find_gpu({}) == expected
    assert build_horovod.find_gpu({"CUDA_HOME": str(here.parent)}) == expected
    assert build_horovod.find_gpu({"HOROVOD_BUILD_CUDA_CC_LIST": "70"})["archs"] == "70"


def test_build_environment(tmp_path, monkeypatch):
    for name in ("MAKEFLAGS", "HOROVOD_WITHOUT_MPI", "PYTHONPATH", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "of the caller")
    monkeypatch.setenv("OPAL_PREFIX", str(tmp_path))  # of a module: it stays
    site = tmp_path / "venv/lib/python3.11/site-packages"
    (site / "nvidia/nccl/lib").mkdir(parents=True)
    (site / "nvidia/nccl/lib/libnccl.so.2").write_text("nccl")
    compiler = {"cxx": "g++-12", "version": ""}
    cpu = build_horovod.build_environment(site, tmp_path / "a", WHEEL, None, compiler, "3")
    assert (cpu["MAKEFLAGS"], cpu["CXX"]) == ("-j3", "g++-12")
    assert cpu["OPAL_PREFIX"] == str(tmp_path / "venv")
    assert "of the caller" not in cpu.values() and "HOROVOD_GPU_OPERATIONS" not in cpu
    mpi = {"kind": "system", "bin": "/mpi/bin"}
    gpu = build_horovod.build_environment(site, tmp_path / "b", mpi, CUDA, compiler, "3")
    assert (gpu["HOROVOD_GPU_OPERATIONS"], gpu["HOROVOD_CUDA_HOME"]) == ("NCCL", "/cuda")
    assert gpu["HOROVOD_BUILD_CUDA_CC_LIST"] == "90"
    assert gpu["PATH"].startswith(f"/mpi/bin:{tmp_path}/venv/bin:/cuda/bin:")
    assert Path(gpu["HOROVOD_NCCL_HOME"], "lib/libnccl.so").read_text() == "nccl"
    assert gpu["OPAL_PREFIX"] == str(tmp_path)
    (tmp_path / "pyvenv.cfg").write_text("")  # now it is that of a Python environment
    assert "OPAL_PREFIX" not in build_horovod.clean_environment()


@pytest.mark.parametrize("gpu", [False, True])
def test_toolchain_file(tmp_path, gpu):
    condition = "(torch.version.cuda is not None) and (CUDA_HOME is not None)"
    module = tmp_path / "cmake" / "Modules" / "FindPytorch.cmake"
    module.parent.mkdir(parents=True)
    line = f'execute_process(COMMAND x "import a; b;c; print(True if ({condition}) else False)")\n'
    module.write_text(line)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(x NONE)\n"
        'message("<${CMAKE_BUILD_RPATH}|${CMAKE_CXX14_STANDARD_COMPILE_OPTION}'
        '|${CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit}>")\n'
    )
    env = build_horovod.clean_environment(CMAKE_TOOLCHAIN_FILE=str(TOOLCHAIN))
    env |= {"HOROVOD_GPU_OPERATIONS": "NCCL"} if gpu else {}

    def configure(build):
        command = [Path(sys.executable).with_name("cmake"), "-S", tmp_path, "-B", tmp_path / build]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    paths, standard, no_cuda = re.search("<(.*)>", configure("build").stderr)[1].split("|")
    assert paths.replace("$ORIGIN/../../", "") == "../..;torch/lib;nvidia/nccl/lib"
    assert (standard, no_cuda) == ("-std=c++20", "" if gpu else "TRUE")
    assert module.read_text() == (line if gpu else line.replace(condition, "False"))
    module.write_text("another Horovod\n")
    assert configure("again").returncode == (0 if gpu else 1)


def test_key_is_that_of_existing_caches_and_changes_with_each_ingredient(monkeypatch):
    monkeypatch.setattr(build_horovod, "get_config_var", lambda _: "cpython-311-x86_64-linux-gnu")
    monkeypatch.setattr(build_horovod.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build_horovod.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36")
    monkeypatch.setattr(Path, "read_text", lambda _: "flags: fma sse avx f16c")
    usual = {"torch": "2.15.0+cu132", "torch_cuda": "13.2", "nccl": "2", "mpi": WHEEL, "gpu": None}
    usual["compiler"] = {"version": "c++ (Debian 12.2.0-14+deb12u1) 12.2.0"}

    def key_of(**changed):
        return build_horovod.digest(build_horovod.ingredients(**(usual | changed)))

    assert key_of() == key_of(nccl="of no importance without a GPU") == "23dbdd7254821effd9b8"
    mpi = {"kind": "system", "name": WHEEL["name"], "bin": "/mpi/bin", "show": ""}
    keys = [key_of(), key_of(torch="2.14.1"), key_of(torch_cuda="None"), key_of(mpi=mpi)]
    keys += [key_of(gpu=CUDA), key_of(gpu=CUDA, nccl="3"), key_of(gpu=CUDA | {"archs": "80"})]
    keys += [key_of(compiler={"version": "g++ 13.1.0"})]
    for name, value in (("get_config_var", lambda _: "cpython-312"), ("BUILD_RECIPE", 2)):
        monkeypatch.setattr(build_horovod, name, value)
        keys.append(key_of())
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.40")
    keys.append(key_of())
    monkeypatch.setenv("CXXFLAGS", "-O0")
    keys.append(key_of())
    assert len(set(keys)) == len(keys) == 12
