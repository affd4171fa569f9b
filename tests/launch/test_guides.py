"""What the centres' guides ask of a job, and what a machine file leaves to the command line."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rendering import SUMMIT, arguments, head, launched, script  # noqa: E402

from launch.__main__ import main  # noqa: E402
from launch.machines import FOLDER, load_machine, machine_names, parse_walltime  # noqa: E402

SLURM = SUMMIT | {"gpus_per_node": 4, "cores_per_node": 16}


# -- machines -------------------------------------------------------------------------------------


def test_machines_are_listed_with_the_retired_one_last(capsys):
    assert main(["--machines"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == machine_names()
    assert lines[-1].startswith("summit ") and "the paper's machine" in lines[-1]
    assert "left service in November 2024" in lines[-1]
    assert not any("left service" in line for line in lines[:-1])


def test_notes(capsys):
    train = ["python", "-m", "models.train"]
    for extra, noted in ([], True), (["--resume=auto"], False):
        assert main([*arguments(), "--", *train, *extra]) == 0
        error = capsys.readouterr().err
        assert ("--resume auto" in error) == noted
        assert "note: summit left service in November 2024: nothing can run this script\n" in error
    assert main([*arguments(machine="frontier"), "--", "true"]) == 0
    assert not capsys.readouterr().err


def test_a_job_that_is_queued_again_does_not_overwrite_itself(capsys):
    train = ["python", "-m", "models.train", "--overwrite"]
    assert main([*arguments(), "--", *train]) == 2
    assert "--overwrite is given in a job that is queued again" in capsys.readouterr().err
    assert main([*arguments(), "--no-requeue", "--", *train]) == 0


def test_frontier():
    text = script("frontier", **SUMMIT, stage="/data set", command=("python", "{data}"))
    words = launched(text, "srun")
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=7",
            "--gpus-per-node=8", "--gpu-bind=closest"} <= set(words)  # fmt: skip
    directives = head(text, "SBATCH")
    assert {"--time=2:00:00", "--account=ABC123", "--signal=B:USR1@300", "--requeue", "-C nvme",
            "--open-mode=append", "--network=disable_rdzv_get", "--partition=batch"
            } <= set(directives)  # fmt: skip
    assert "-C nvme" not in head(script("frontier", **SUMMIT), "SBATCH")


def test_frontier_loads_the_network_plugin_and_sets_what_goes_with_it():
    lines = script("frontier", **SUMMIT, env=["NCCL_NET_PLUGIN=/mine.so"]).splitlines()
    load = lines.index("module load rccl-net-plugin || exit 1")
    exports = dict(re.findall(r"(?m)^export (\w+)=(\S+)", "\n".join(lines[load:])))
    assert (
        exports.items()
        >= {
            "NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3",
            "NCCL_CROSS_NIC": "1",
            "NCCL_NET_GDR_LEVEL": "PHB",
            "NCCL_NET_PLUGIN": "/mine.so",  # a plugin of one's own wins over the module's
            "FI_MR_CACHE_MONITOR": "kdreg2",
            "FI_CXI_RDZV_PROTO": "alt_read",
        }.items()
    )
    assert "NCCL_NET" not in exports, "on one node Slurm sets up no network, and RCCL would end"
    reason = load_machine("frontier").environment["FI_MR_CACHE_MONITOR"].reason
    assert "default there since" in reason


def test_miopen_writes_to_a_folder_of_every_node():
    text = script("frontier", **SUMMIT)
    names = ["MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR"]
    for name in names:
        assert f'\nexport {name}="/tmp/$USER-miopen-$SLURM_JOB_ID"  #' in text
    make = f'mkdir -p -- "${names[0]}" "${names[1]}" || exit 1'
    assert f"\nsrun --nodes=2 --ntasks=2 --ntasks-per-node=1 {make}" in text
    assert text.index(make) < text.index("--cpu-bind=cores"), "before the ranks start"
    mine = script("frontier", **SUMMIT, env=["MIOPEN_USER_DB_PATH=$HOME/x"])
    assert f'mkdir -p -- "${names[1]}" ||' in mine
    assert "export MIOPEN_USER_DB_PATH='$HOME/x'  # set by --env" in mine


def test_folder_of_a_node_must_be_a_path(tmp_path, capsys):
    text = (FOLDER / "frontier.toml").read_text()
    path = tmp_path / "mine.toml"
    for wrong in ("cache", "/tmp/$(id)", '/tmp/\\"x'):
        path.write_text(text.replace("/tmp/$USER-miopen-$SLURM_JOB_ID", wrong, 1))
        assert main(["--machine", str(path), "--nodes", "1", "--", "true"]) == 2
        assert "MIOPEN_USER_DB_PATH.value is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("machine", "options", "directives"),
    [
        ("frontier", {"queue": "debug"}, {"--partition=batch", "--qos=debug"}),
        ("frontier", {"qos": "debug"}, {"--partition=batch", "--qos=debug"}),
        ("frontier", {"queue": "extended"}, {"--partition=extended"}),
        ("frontier", {"queue": "extended", "qos": "x"}, {"--partition=extended", "--qos=x"}),
        ("perlmutter", {}, {"--qos=regular"}),
        ("perlmutter", {"queue": "debug"}, {"--qos=debug"}),
        ("perlmutter", {"qos": "debug"}, {"--qos=debug"}),
        ("slurm", {"qos": "long"}, {"--qos=long"}),
        ("slurm", {"queue": "gpu"}, {"--partition=gpu"}),
        ("slurm", {}, set()),
    ],
)
def test_queues_are_partitions_or_qos(machine, options, directives):
    geometry = SLURM if machine == "slurm" else SUMMIT
    lines = head(script(machine, **geometry, **options), "SBATCH")
    assert {line for line in lines if line.startswith(("--partition", "--qos"))} == directives


def test_limits_of_the_default_queue_hold_for_no_other(capsys):
    for option in ("queue", "qos"):
        assert main([*arguments(machine="frontier", walltime="3:00", **{option: "debug"}), "--",
                     "true"]) == 0  # fmt: skip
    assert main([*arguments(machine="frontier", walltime="3:00"), "--", "true"]) == 2
    assert "at most 2:00 on up to 91 nodes of frontier" in capsys.readouterr().err


def test_commands_of_the_readme_are_taken(tmp_path, capsys):
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if "    python -m launch " in line]
    assert len(commands) >= 4
    for words in commands:
        words = words[: words.index("&&")] if "&&" in words else words
        words = [str(tmp_path / "job.sh") if word == "job.sh" else word for word in words]
        assert main([word for word in words[3:] if word != "--submit"]) == 0, words
        assert "error" not in capsys.readouterr().err


# -- --directive ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "given", "line", "gone"),
    [
        ("frontier", "--reservation=x", "#SBATCH --reservation=x", None),
        ("frontier", "#SBATCH  --reservation=x ", "#SBATCH --reservation=x", None),
        ("frontier", '--comment="two words"', '#SBATCH --comment="two words"', None),
        ("frontier", "--time-min=1:00:00", "#SBATCH --time-min=1:00:00", None),
        ("frontier", "--network=job_vni", "#SBATCH --network=job_vni",
         "--network=disable_rdzv_get"),
        ("frontier", "-o run.out", "#SBATCH -o run.out", "--output=%x-%j.out"),
        ("perlmutter", "-C gpu&hbm80g", "#SBATCH -C gpu&hbm80g", "-C gpu"),
        ("perlmutter", "--constraint=gpu&hbm80g", "#SBATCH --constraint=gpu&hbm80g", "-C gpu"),
        ("slurm", "--exclusive=user", "#SBATCH --exclusive=user", "--exclusive"),
        ("summit", '-alloc_flags "smt1"', '#BSUB -alloc_flags "smt1"', None),
        ("summit", "-o run.out", "#BSUB -o run.out", "-o aadl_hvd-%J.out"),
    ],
)  # fmt: skip
def test_directive_is_added_or_takes_the_place_of_another(machine, given, line, gone, capsys):
    geometry = {"gpus_per_node": "4", "cores_per_node": "16"} if machine == "slurm" else {}
    options = arguments(machine=machine, directive=given, **geometry)
    assert main([*options, "--", "true"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert line in lines
    notes = [note for note in captured.err.splitlines() if "--directive" in note]
    if gone is None:
        assert not notes
    else:
        assert notes == [f"note: --directive takes the place of {gone!r}"]
        assert f"{line.split()[0]} {gone}" not in lines
    run = subprocess.run(["bash", "-n"], input=captured.out, text=True, capture_output=True)
    assert run.returncode == 0 and not run.stderr


def test_directive_may_be_repeated(capsys):
    words = ["--directive=--reservation=x", "--directive=--exclude=n1"]
    assert main([*arguments(machine="frontier"), *words, "--", "true"]) == 0
    assert head(capsys.readouterr().out, "SBATCH")[-2:] == ["--reservation=x", "--exclude=n1"]


def test_directive_wins_over_the_disk_of_staged_data_with_a_note(capsys):
    options = arguments(machine="frontier", stage="/d", directive="-C other")
    assert main([*options, "--", "true", "{data}"]) == 0
    captured = capsys.readouterr()
    assert "-C nvme" not in captured.out and "-C other" in captured.out
    assert captured.err == "note: --directive takes the place of '-C nvme'\n"


@pytest.mark.parametrize(
    ("machine", "given", "instead"),
    [
        ("frontier", "--time=1:00", "--walltime"),
        ("frontier", "-t30", "--walltime"),
        ("frontier", "--tim=30", "--walltime"),
        ("frontier", "--reservation=x --nodes=4", "--nodes"),
        ("frontier", "-N 4", "--nodes"),
        ("frontier", "-n 4", "--nodes and --ranks-per-node"),
        ("frontier", "--cpus-per-task=2", "--ranks-per-node"),
        ("frontier", "--gpus-per-node=2", "--gpus-per-node"),
        ("frontier", "-G 4", "--gpus-per-node"),
        ("frontier", "-A x", "--account"),
        ("frontier", "-q debug", "--qos"),
        ("frontier", "-pextended", "--queue"),
        ("frontier", "-J x", "--name"),
        ("frontier", "--no-requeue", "--no-requeue"),
        ("frontier", "--signal=USR2@60", "warning_seconds in a machine file"),
        ("summit", "-W 10", "--walltime"),
        ("summit", "-nnodes 4", "--nodes"),
        ("summit", "-q debug", "--queue"),
        ("summit", "-wt 10", "warning_seconds in a machine file"),
    ],
)
def test_directive_that_another_option_sets_is_refused(machine, given, instead, capsys):
    assert main([*arguments(machine=machine, directive=given), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert f"--directive is {given!r}, but the script sets that itself: use {instead}" in error


@pytest.mark.parametrize(
    "given",
    [
        "",
        "-",
        "reservation=x",
        "-x\n#SBATCH -y",
        "-x\rrm",
        "-x\0",
        "--comment='x",
        "-x\u2028",
    ],
)
def test_directive_that_is_no_option_is_refused(given, capsys):
    options = [*arguments(machine="frontier"), f"--directive={given}"]
    assert main([*options, "--", "true"]) == 2
    captured = capsys.readouterr()
    assert f"--directive is {given!r}, must be one line of printable" in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("words", [["--directive", "--reservation=x"], ["--directive=--"]])
def test_directive_without_its_value(words, capsys):
    assert main([*arguments(machine="frontier"), *words, "--", "true"]) == 2
    error = capsys.readouterr().err
    assert "--directive" in error and "Error" not in error and error.count("\n") == 1
    assert words[-1] == "--directive=--" or "follows a =, as --directive=--reservation" in error


def test_directive_of_a_machine_file_must_close_its_quotes(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    text = (FOLDER / "frontier.toml").read_text()
    path.write_text(text.replace("--network=disable_rdzv_get", "--comment='x"))
    assert main([*arguments(machine=str(path)), "--", "true"]) == 2
    assert 'scheduler.directives is "--comment=\'x", must be without' in capsys.readouterr().err


# -- walltimes ------------------------------------------------------------------------------------

WALLTIMES = {
    "30": 1_800,  # minutes, for SLURM and LSF alike
    "90": 5_400,
    "2:00": 7_200,  # hours and minutes, also where SLURM alone would read minutes and seconds
    "1:30": 5_400,
    "100:00": 360_000,
    "0:05:30": 330,
    "1:00:01": 3_601,
    "1-0": 86_400,
    "1-12": 129_600,
    "0-12:30": 45_000,
    "1-12:00:00": 129_600,
    "2-01:02:03": 176_523,
}


@pytest.mark.parametrize("text", WALLTIMES)
def test_walltime(text):
    seconds = WALLTIMES[text]
    assert parse_walltime(text) == seconds
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    if seconds > 300:
        lines = head(script("slurm", **(SLURM | {"walltime": text})), "SBATCH")
        assert f"--time={hours}:{minutes:02}:{rest:02}" in lines
        up = -(-seconds // 60)
        lines = head(script("summit", **(SUMMIT | {"walltime": text}), queue="x"), "BSUB")
        assert f"-W {up // 60}:{up % 60:02}" in lines


@pytest.mark.parametrize(
    "text",
    ["2h", "1:60", "1:0", "-1:00", "1:00:00:00", "", "1:00 ", "\u0661:00", "1-24", "1-",
     "1-12:60", "1-1:0", "-5", "1.5", "UNLIMITED", "1e3", "9" * 7, "1-1-1", "1:00:60", "1 12"],
)  # fmt: skip
def test_walltime_that_is_none(text, capsys):
    assert parse_walltime(text) is None
    assert main([*arguments(walltime=None), f"--walltime={text}", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert f"error: --walltime is {text!r}, must be minutes, H:MM, H:MM:SS, D-H" in error
    assert error.count("\n") == 1


def test_walltime_of_nothing_is_too_short(capsys):
    assert main([*arguments(walltime="0"), "--", "true"]) == 2  # SLURM would take it for no limit
    assert "--walltime is 0, must be longer than the 300 s" in capsys.readouterr().err


def test_help_says_what_a_walltime_means(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "minutes, H:MM, H:MM:SS, D-H, D-H:MM or D-H:MM:SS; 1:30 is an hour and a half" in text


def test_limits_of_a_machine_file_take_the_same_forms(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    text = (FOLDER / "frontier.toml").read_text()
    path.write_text(text.replace('walltime = "2:00"', 'walltime = "0-01"'))
    assert main([*arguments(machine=str(path), walltime="60"), "--", "true"]) == 0
    assert main([*arguments(machine=str(path), walltime="61"), "--", "true"]) == 2
    assert "--walltime is 61, must be at most 0-01 on up to 91 nodes" in capsys.readouterr().err
