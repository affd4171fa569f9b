"""The launch tool without a cluster: machine files, what scripts say, errors, quoting."""

import dataclasses
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rendering import SUMMIT, arguments, head, launched, script  # noqa: E402

from launch.__main__ import main  # noqa: E402
from launch.job import Options, plan  # noqa: E402
from launch.machines import (  # noqa: E402
    FOLDER,
    LaunchError,
    Performance,
    load_machine,
    machine_names,
)
from launch.render import PREEMPTED  # noqa: E402
from models.preemption import EXIT_CODE  # noqa: E402

# -- machine files --------------------------------------------------------------------------------


def test_machines_are_those_promised():
    assert machine_names() == [
        "frontier", "h100_pod", "horovodrun", "mpirun", "perlmutter", "slurm", "summit"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["summit", "frontier", "perlmutter", "h100_pod"])
def test_performance_has_the_keys_that_others_read(name):
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text())["performance"]
    assert list(table) == [
        "gpu", "gpu_memory_bytes", "memory_bandwidth", "intranode_bandwidth", "intranode_latency",
        "injection_bandwidth", "network_latency",
    ]  # fmt: skip
    assert isinstance(table.pop("gpu"), str)
    assert all(type(value) is float and value > 0 for value in table.values())
    assert dataclasses.asdict(load_machine(name).performance).items() >= table.items()
    assert set(table) < {field.name for field in dataclasses.fields(Performance)}


@pytest.mark.parametrize("name", ["summit", "frontier", "perlmutter", "h100_pod"])
def test_cores_divide_among_the_default_ranks(name):
    node = load_machine(name).node
    assert node.cores % node.gpus == 0


BROKEN = {
    "unknown key node.gpu, known are gpus": ("gpus = 6", "gpu = 6"),
    "did you mean 'gpus'": ("gpus = 6", "gpu = 6"),
    "node.gpus is '6', must be of type int": ("gpus = 6", 'gpus = "6"'),
    "node.gpus is True, must be of type int": ("gpus = 6", "gpus = true"),
    "node.gpus is -6, must not be negative": ("gpus = 6", "gpus = -6"),
    "node.cores is 0, must be at least 1": ("cores = 42", "cores = 0"),
    "the key scheduler.kind is missing": ('kind = "lsf"', ""),
    "scheduler.kind is 'pbs', must be one of": ('kind = "lsf"', 'kind = "pbs"'),
    "scheduler.launcher is 'srun', must be one of ('jsrun',)": ('"jsrun"', '"srun"'),
    "scheduler.storage_directives is '-x', must be a list": (
        'storage_directives = ["-alloc_flags nvme"]',
        'storage_directives = "-x"',
    ),
    "walltime is '2h', must be minutes, H:MM": ('"2:00"', '"2h"'),
    "scheduler.limits is [9000, 91, 921, 4608], must be ordered": ("nodes = 45", "nodes = 9000"),
    "scheduler.limits[0].nodes is '45', must be of type int": ("nodes = 45", 'nodes = "45"'),
    "node.local_storage is '/mnt/$(id)', must be an absolute path": (
        "/mnt/bb/$USER",
        "/mnt/$(id)",
    ),
    "the key environment.HOROVOD_CYCLE_TIME.reason is missing": (
        '{ value = "1", reason = "ms; small reductions wait for a cycle, so not longer" }',
        '{ value = "1" }',
    ),
    "environment.HOROVOD_CYCLE_TIME.value is 1, must be of type str": (
        'value = "1", reason = "ms;',
        'value = 1, reason = "ms;',
    ),
    "environment is 'A-B', must be a variable's name": ("HOROVOD_CYCLE_TIME", '"A-B"'),
    "must be one line that says why": ("ms; small", "ms;\\nsmall"),
    "performance.memory_bandwidth is '900e9', must be of type float": ("900e9", '"900e9"'),
    "scheduler.queue is 'ba\\ntch', must be letters, digits": ('"batch"', '"ba\\ntch"'),
    "scheduler.queue is 'a b', must be letters, digits": ('"batch"', '"a b"'),
    "scheduler.queue is '', must be letters, digits": ('"batch"', '""'),
    "scheduler.warning_seconds is 0, must be at least 1": (
        "storage_directives",
        "warning_seconds = 0\nstorage_directives",
    ),
    "scheduler.limits: nodes is 0, must be at least 1": ("nodes = 45", "nodes = 0"),
    "scheduler.directives is '-x\\ry', must be one line of printable": (
        "storage_directives",
        'directives = ["-x\\ry"]\nstorage_directives',
    ),
    "scheduler.directives is '', must be one line of printable": (
        "storage_directives",
        'directives = [""]\nstorage_directives',
    ),
    "scheduler.storage_directives is 'a\\nb', must be one line": ("-alloc_flags nvme", "a\\nb"),
    "scheduler.launcher_options[0] is 'a\\x00b', must hold no null character": (
        "storage_directives",
        'launcher_options = ["a\\u0000b"]\nstorage_directives',
    ),
    "environment.HOROVOD_CYCLE_TIME.value is '\\x00', must hold no null character": (
        'value = "1", reason = "ms;',
        'value = "\\u0000", reason = "ms;',
    ),
    "node.gpus is 99999999999999999999, must not be negative, and at most 1000000": (
        "gpus = 6",
        "gpus = 99999999999999999999",
    ),
    "is no TOML: Exceeds the limit": ("gpus = 6", f"gpus = {'9' * 5000}"),
    "performance.memory_bandwidth is inf": ("900e9", "inf"),
    "is no TOML": ("[node]", "[node"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_machine_file_is_refused_by_key(tmp_path, message, capsys):
    old, new = BROKEN[message]
    text = (FOLDER / "summit.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    assert main(["--machine", str(path), "--nodes", "1", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


# -- what scripts say -----------------------------------------------------------------------------


def test_summit():
    text = script("summit", **SUMMIT, name="run1", queue="debug")
    assert launched(text, "jsrun") == shlex.split(
        "jsrun -n 2 -r 1 -a 6 -c 42 -g 6 -b proportional-packed:7 -d packed python train.py"
    )
    assert {"-nnodes 2", "-W 2:00", "-P ABC123", "-J run1", "-q debug"} <= set(head(text, "BSUB"))
    assert {"-wa USR2 -wt 5", "-Q 75"} <= set(head(text, "BSUB"))
    assert "nvme" not in text, "the disk is not asked for unless it is used"
    assert "export OMP_NUM_THREADS=7  # one thread for each" in text


def test_summit_with_fewer_ranks_gives_each_more_cores():
    text = script("summit", **SUMMIT, ranks_per_node=3)
    assert launched(text, "jsrun") == shlex.split(
        "jsrun -n 2 -r 1 -a 3 -c 42 -g 6 -b proportional-packed:14 -d packed python train.py"
    )
    assert "export OMP_NUM_THREADS=14 " in text


def test_lsf_rounds_seconds_up():
    assert "-W 1:01" in head(script("summit", **dict(SUMMIT, walltime="1:00:01")), "BSUB")


def test_perlmutter_counts_hardware_threads():
    text = script("perlmutter", **SUMMIT)
    assert "--cpus-per-task=32" in launched(text, "srun")
    assert "export OMP_NUM_THREADS=16 " in text
    assert {"-C gpu", "--qos=regular"} <= set(head(text, "SBATCH"))


def test_generic_slurm_takes_its_geometry_from_the_options():
    options = {"nodes": 3, "walltime": "1:00", "cores_per_node": 8}
    text = script("slurm", **options, ranks_per_node=2)
    words = launched(text, "srun")
    assert {"--ntasks=6", "--cpus-per-task=4"} <= set(words)
    assert "gpu" not in text, "a cluster without GPUs is an ordinary one"
    assert text == script("slurm", **options, ranks_per_node=2, gpus_per_node=0)


def test_no_requeue():
    text = script("frontier", **SUMMIT, requeue=False)
    assert "--no-requeue" in head(text, "SBATCH") and "scontrol" not in text
    assert "-Q" not in script("summit", **SUMMIT, requeue=False)


@pytest.mark.parametrize("name", ["summit", "frontier", "perlmutter", "h100_pod"])
def test_each_export_says_why(name):
    machine = load_machine(name)
    text = script(name, **SUMMIT)
    assert len(machine.environment) >= 3
    for variable, setting in machine.environment.items():
        value = f'"{setting.value}"' if setting.folder else setting.value
        assert f"export {variable}={value}  # {setting.reason}\n" in text


def test_env_option_wins():
    text = script("summit", **SUMMIT, env=["OMP_NUM_THREADS=1", "NCCL_DEBUG=INFO", "EMPTY="])
    exports = [line for line in text.splitlines() if line.startswith("export ")]
    assert "export OMP_NUM_THREADS=1  # set by --env" in exports
    assert sum("OMP_NUM_THREADS" in line for line in exports) == 1
    assert any(line.startswith("export NCCL_DEBUG=INFO ") for line in exports)
    assert any(line.startswith("export EMPTY='' ") for line in exports)


def test_exit_code_of_the_training_is_the_one_scripts_wait_for():
    assert PREEMPTED == EXIT_CODE == 75


GEOMETRY = {
    "slurm": SUMMIT | {"gpus_per_node": 4, "cores_per_node": 16},
    "mpirun": {"hosts": "a:2,b:4"},
    "horovodrun": {"hosts": "a:2,b:4"},
}


@pytest.mark.parametrize("name", machine_names())
def test_scripts_are_bash(name):
    options = GEOMETRY.get(name, SUMMIT)
    staged = load_machine(name).node.local_storage is not None
    for more in [{}, *({"stage": path, "command": ("a", "{data}")} for path in ("d", "d.tar"))]:
        if staged or not more:
            text = script(name, **options, **more)
            run = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
            assert run.returncode == 0 and not run.stderr


@pytest.mark.parametrize("name", machine_names())
def test_every_script_says_how_many_threads(name):
    text = script(name, **GEOMETRY.get(name, SUMMIT))
    assert text.count("export OMP_NUM_THREADS=") == 1
    mine = script(name, **GEOMETRY.get(name, SUMMIT), env=["OMP_NUM_THREADS=3"])
    assert mine.count("OMP_NUM_THREADS=") == 1 and "export OMP_NUM_THREADS=3 " in mine


@pytest.mark.parametrize("name", ["mpirun", "horovodrun"])
@pytest.mark.parametrize(("cores", "own", "threads"), [(9, "", 2), (2, "", 1), (9, "5", 5)])
def test_threads_where_cores_are_not_known(name, cores, own, threads, tmp_path):
    for program, text in {"nproc": f"echo {cores}", name: 'echo "$OMP_NUM_THREADS $*"'}.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash"], input=script(name, hosts="a:2,b:4"), text=True, capture_output=True,
        env=dict(os.environ, PATH=path, OMP_NUM_THREADS=own),
    )  # fmt: skip
    assert run.stdout.split()[0] == str(threads), run.stderr
    assert name != "mpirun" or "-x OMP_NUM_THREADS" in run.stdout


# -- errors ---------------------------------------------------------------------------------------


ERRORS = [
    ({"machine": "summit2"}, ["--machine is 'summit2'", "frontier", "did you mean 'summit'?"]),
    ({"machine": "/no/such.toml"}, ["--machine: cannot read /no/such.toml: No such file"]),
    ({"machine": None}, ["--machine is missing"]),
    ({"nodes": None}, ["--nodes is missing"]),
    ({"nodes": "0"}, ["--nodes is 0", "at least 1 and at most 4608"]),
    ({"nodes": "4609"}, ["--nodes is 4609", "at most 4608"]),
    ({"nodes": "two"}, ["--nodes", "'two'"]),
    ({"ranks_per_node": "7"}, ["--ranks-per-node is 7", "at most 6, one for each GPU"]),
    ({"ranks_per_node": "0"}, ["--ranks-per-node is 0", "at least 1"]),
    ({"ranks_per_node": "4"}, ["--ranks-per-node is 4", "divisor of the 42 cores", "1, 2, 3, 6"]),
    ({"gpus_per_node": "8"}, ["--gpus-per-node is 8", "has 6", "copy the machine file"]),
    ({"walltime": None}, ["--walltime is missing", "H:MM"]),
    ({"walltime": "2h"}, ["--walltime is '2h'", "must be minutes, H:MM, H:MM:SS, D-H,"]),
    ({"walltime": "0:05"}, ["--walltime is 0:05", "longer than the 300 s"]),
    ({"walltime": "2:01"}, ["--walltime is 2:01", "at most 2:00 on up to 45 nodes", "--queue"]),
    ({"walltime": "2:01", "nodes": "45"}, ["at most 2:00 on up to 45 nodes"]),
    ({"walltime": "6:01", "nodes": "46"}, ["at most 6:00 on up to 91 nodes"]),
    ({"account": None}, ["--account is missing", "summit charges"]),
    ({"account": "A B"}, ["--account is 'A B'", "letters, digits"]),
    ({"name": "a\n#BSUB -x"}, ["--name is", "letters, digits"]),
    ({"name": "a/b"}, ["--name is 'a/b'", "without /"]),
    ({"queue": "$(id)"}, ["--queue is '$(id)'"]),
    ({"queue": "batch", "walltime": "2:01"}, ["--walltime is 2:01", "at most 2:00"]),
    ({"machine": "slurm", "nodes": "9" * 23}, [f"--nodes is {'9' * 23}", "at most 1000000"]),
    ({"machine": "slurm", "gpus_per_node": "9" * 23}, ["--gpus-per-node is 9", "at most 1000000"]),
    ({"machine": "slurm", "gpus_per_node": "0", "cores_per_node": "9" * 23},
     ["--cores-per-node is 9", "at most 1000000"]),
    ({"machine": "slurm", "gpus_per_node": "0", "cores_per_node": "4",
      "ranks_per_node": "9" * 23}, ["--ranks-per-node is 9", "at most 1000000"]),
    ({"env": "1A=2"}, ["--env is '1A=2'", "NAME=VALUE"]),
    ({"env": "A"}, ["--env is 'A'", "NAME=VALUE"]),
    ({"stage": "/data"}, ["--stage is '/data'", "no {data}", "--data {data}"]),
    ({"hosts": "a:1"}, ["--hosts means nothing with --machine summit", "leave it out"]),
    ({"controller": "gloo"}, ["--controller means nothing", "does not use horovodrun"]),
    ({"machine": "perlmutter", "stage": "/d"}, ["perlmutter names no disk", "local_storage"]),
    ({"machine": "slurm"}, ["--cores-per-node is missing", "slurm does not say"]),
    ({"machine": "slurm", "gpus_per_node": "4"}, ["--cores-per-node is missing"]),
    ({"machine": "slurm", "cores_per_node": "4"},
     ["--ranks-per-node is missing", "without GPUs (--gpus-per-node)"]),
    ({"launcher": "mpirun"}, ["--launcher means nothing", "summit, which has no SLURM"]),
    ({"machine": "frontier", "launcher": "jsrun"}, ["--launcher", "'jsrun'", "'srun', 'mpirun'"]),
    ({"nosuch": "1"}, ["unrecognized arguments: --nosuch", "--help"]),
    ({"dry-run": ""}, ["--submit and --dry-run exclude each other"]),
    ({"stage": "/no/such"}, ["--stage is '/no/such'"]),
]  # fmt: skip


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """sbatch and bsub that keep what they get."""
    folder = tmp_path / "queue"
    folder.mkdir()
    for name in ("sbatch", "bsub"):
        (folder / name).write_text(
            f'#!/bin/sh\ncat > "{folder}/submitted"\n'
            "echo 'Submitted batch job 17'; exit ${QUEUE_CODE:-0}\n"
        )
        (folder / name).chmod(0o755)
    for name in ("srun", "scontrol"):  # a Slurm that may be here is not asked
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "submitted"


@pytest.mark.parametrize(("changes", "parts"), ERRORS, ids=lambda value: str(value)[:60])
def test_wrong_input_is_named_and_nothing_submitted(changes, parts, queue, capsys):
    assert main([*arguments(**changes), "--submit", "--", "python", "train.py"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert all(part in captured.err for part in parts), captured.err
    assert not captured.out and not queue.exists()


def test_staged_data_must_exist_when_submitting(queue, capsys):
    options = [*arguments(stage="/no/such"), "--", "python", "train.py", "{data}"]
    assert main(["--submit", *options]) == 2
    assert "--stage is '/no/such', must exist" in capsys.readouterr().err and not queue.exists()
    assert main(options) == 0, "a script may be rendered elsewhere"


def test_placeholder_without_staged_data_is_refused_or_noted(queue, capsys):
    command = ["--", "python", "train.py", "--data={data}/train"]
    assert main([*arguments(), "--submit", *command]) == 2
    error = capsys.readouterr().err
    assert "--stage is missing: {data} in the training command" in error and not queue.exists()
    assert main([*arguments(machine="perlmutter"), *command]) == 0
    captured = capsys.readouterr()
    assert captured.err == "note: nothing is staged on perlmutter, {data} is passed on as it is\n"
    assert "'--data={data}/train'" in captured.out


@pytest.mark.parametrize("submit", [["--submit"], []])
def test_staged_data_must_be_of_a_known_kind(queue, tmp_path, submit, capsys):
    for name, known in {"im.tar.bz2": False, "im.zip": False, "im.tar.gz": True}.items():
        (tmp_path / name).touch()
        options = [*arguments(stage=str(tmp_path / name)), *submit, "--", "python", "{data}"]
        assert main(options) == (0 if known else 2)
        error = capsys.readouterr().err
        assert known or f"{name}', must be a folder, or an archive that ends in ('.tar'," in error
        assert queue.exists() == (known and bool(submit))
    folder = tmp_path / "images.tar"
    folder.mkdir()
    assert main([*arguments(stage=str(folder)), *submit, "--", "python", "{data}"]) == 2
    assert "must be a folder whose name does not end in ('.tar'," in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["--"], ["--", "--epochs=3"], ["--", ""]])
def test_missing_command(command, queue, capsys):
    assert main([*arguments(), "--submit", *command]) == 2
    assert "the training command" in capsys.readouterr().err and not queue.exists()


@pytest.mark.parametrize(("machine", "program"), [("summit", "bsub"), ("frontier", "sbatch")])
def test_missing_scheduler(machine, program, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*arguments(machine=machine), "--submit", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert f"cannot run {program}" in error and "login node" in error and "--output FILE" in error


def test_submit_hands_over_the_script_and_the_exit_code(queue, monkeypatch, capsys, tmp_path):
    options = [*arguments(machine="frontier"), "--", "python", "train.py"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert not queue.exists()
    path = tmp_path / "job.sh"
    assert main(["--submit", "--output", str(path), *options]) == 0
    assert capsys.readouterr().out == "job 17\n"
    assert queue.read_text() == path.read_text() == printed
    monkeypatch.setenv("QUEUE_CODE", "9")
    assert main(["--submit", *options]) == 9
    assert "sbatch ended with exit code 9" in capsys.readouterr().err


def test_command_may_hold_two_dashes_and_options_of_the_tool(capsys):
    assert main([*arguments(), "--", "python", "a.py", "--", "--nodes", "9", "--submit"]) == 0
    words = launched(capsys.readouterr().out, "jsrun")
    assert words[-6:] == ["python", "a.py", "--", "--nodes", "9", "--submit"]


def test_limits_are_those_of_the_default_queue():
    assert "-W 6:00" in head(
        script("summit", **(SUMMIT | {"nodes": 46, "walltime": "6:00"})), "BSUB"
    )
    text = script("summit", **(SUMMIT | {"walltime": "24:00"}), queue="killable")
    assert {"-W 24:00", "-q killable"} <= set(head(text, "BSUB"))


def test_output_that_cannot_be_written(capsys):
    assert main([*arguments(output="/no/such/job.sh"), "--", "true"]) == 2
    assert "--output: cannot write /no/such/job.sh: No such file" in capsys.readouterr().err


def test_errors_can_be_caught():
    with pytest.raises(LaunchError):
        plan(load_machine("summit"), Options(command=()))


# -- quoting --------------------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
NASTY = st.sampled_from(
    ["", " ", "it's", '"', "$HOME", "$(id)", "`id`", "a\nb", "\\", "*", "~", "!", ";", "&", "#",
     "{data}", "--", "é", "\t", "-x"]
)  # fmt: skip
WORDS = st.lists(TEXT | NASTY, max_size=5)
LAUNCHERS = {
    "summit": ("jsrun", SUMMIT),
    "frontier": ("srun", SUMMIT),
    "mpirun": ("mpirun", {"hosts": "a:2"}),
    "horovodrun": ("horovodrun", {"hosts": "a:2"}),
}


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """Runs a script with launchers that write down the words they get; the last call's."""
    folder = tmp_path_factory.mktemp("launchers")
    for name in ("jsrun", "srun", "mpirun", "horovodrun", "sbcast", "module"):
        (folder / name).write_text(
            f'#!/bin/bash\nprintf "%s\\0" "$@" > {folder}/words\n'
            f'printf "%s" "$GREETING" > {folder}/greeting\n'
        )
        (folder / name).chmod(0o755)
    environment = dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", USER="me")

    def dump(text):
        run = subprocess.run(
            ["bash"], input=text.encode(), env=environment, cwd=folder, capture_output=True
        )
        assert run.returncode == 0, run.stderr
        words = (folder / "words").read_bytes().decode().split("\0")[:-1]
        return words, (folder / "greeting").read_bytes().decode()

    return dump


@pytest.mark.parametrize("name", LAUNCHERS)
@given(words=WORDS, value=TEXT | NASTY)
def test_any_argument_arrives_unchanged(dump, name, words, value):
    options = LAUNCHERS[name][1]
    if name in ("summit", "frontier"):  # which take it for data to be staged
        words = [word.replace("{data}", "{dat}") for word in words]
    text = script(name, **options, command=("python", *words), env=[f"GREETING={value}"])
    got, greeting = dump(text)
    assert got[len(got) - len(words) - 1 :] == ["python", *words]
    assert greeting == value


@given(
    words=st.lists(NASTY | st.tuples(TEXT | NASTY, TEXT | NASTY).map("{data}".join), max_size=5),
    folder=(TEXT | NASTY).map(lambda text: text.replace("/", "") + "x"),
)
def test_placeholder_alone_is_replaced(dump, words, folder):
    command = ("python", "--data={data}/train", *words)
    got, _ = dump(script("summit", **SUMMIT, command=command, stage=f"/gpfs/{folder}"))
    local = f"/mnt/bb/me/{folder}"
    expected = [word.replace("{data}", local) for word in command]
    assert got[len(got) - len(command) :] == expected
