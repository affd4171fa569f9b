"""A bar where a user watches, lines where nobody does, under launchers and without."""

import os
import pty
import re
import subprocess
import sys
import threading

import horovod.torch as hvd
import pytest
from launching import HOROVODRUN, ROOT

from models.progress import Progress

PROGRAM = str(ROOT / "tests" / "models" / "progress_on_rank.py")
BAR = re.compile(r"\r *\d+%\|")
TAG = re.compile(r"\[\d[^\]]*\]<std(out|err)>:")


def on_terminal(command, **streams):
    """Runs a command on a terminal, but for the streams given; what the terminal received."""
    controller, terminal = pty.openpty()
    received = []

    def receive():
        try:
            while data := os.read(controller, 4096):
                received.append(data)
        except OSError:  # the end of a terminal
            pass

    reader = threading.Thread(target=receive)
    reader.start()
    fds = {"stdin": terminal, "stdout": terminal, "stderr": terminal} | streams
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    try:
        code = subprocess.run(
            list(map(str, command)), cwd=ROOT, timeout=120, start_new_session=True,
            env=dict(os.environ, PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), **fds,
        ).returncode  # fmt: skip
    finally:
        os.close(terminal)
        reader.join()
        os.close(controller)
    text = b"".join(received).decode()
    assert code == 0, text
    return text


@pytest.fixture
def mpirun(tmp_path):
    """Stands for mpirun: passes its rank's output on through pipes, with a tag on each line."""
    script = tmp_path / "mpirun"
    script.write_text(
        "#!/bin/bash\n"
        "{ \"$@\" 2>&1 >&3 | sed -u 's/^/[0]<stderr>:/' >&2; } 3>&1 | sed -u 's/^/[0]<stdout>:/'\n"
    )
    script.chmod(0o755)
    return script


def rank(kind="auto"):
    return [sys.executable, PROGRAM, kind]


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_a_bar_on_the_terminal_of_horovodrun(controller):
    if not (hvd.mpi_built() if controller == "mpi" else hvd.gloo_built()):
        pytest.skip(f"this Horovod was built without {controller}")
    seen = on_terminal([*HOROVODRUN, "-np", 2, f"--{controller}", *rank()])
    bars = [line for line in seen.split("\n") if BAR.search(line)]
    assert bars and "100%" in seen and "images/s=8" in seen, seen
    assert not any(TAG.search(line) for line in bars), "the bar went through the launcher"
    for line in ("the first line", "the last line"):
        assert f"\r{line}\r\n" in seen, f"{line!r} ran into the bar: {seen!r}"
    assert seen.rstrip().endswith("<stdout>:after the bar"), "the bar's line was not ended"


def test_a_bar_without_a_launcher():
    seen = on_terminal(rank())
    assert BAR.search(seen) and "100%" in seen and "step 4/4" not in seen


def test_a_job_with_a_log_file_writes_lines(mpirun, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        seen = on_terminal([mpirun, *rank()], stdout=log, stderr=log)
    assert seen == ""
    text = (tmp_path / "log").read_text()
    assert "\r" not in text and "[0]<stdout>:step 4/4" in text and "the last line" in text


def test_a_pipe_behind_the_launcher_gets_lines(mpirun):
    """As in `mpirun ... 2>&1 | tee log`."""
    command = " ".join(map(str, [mpirun, *rank(), "2>&1", "| cat"]))
    seen = on_terminal(["bash", "-c", command])
    assert not BAR.search(seen) and "<stdout>:step 4/4" in seen


def test_lines_go_to_the_log_and_the_bar_to_the_terminal(mpirun, tmp_path):
    """As in `mpirun ... > log`."""
    with open(tmp_path / "log", "wb") as log:
        seen = on_terminal([mpirun, *rank()], stdout=log)
    assert BAR.search(seen) and "line" not in seen
    text = (tmp_path / "log").read_text()
    assert "the first line" in text and "the last line" in text and "%|" not in text


@pytest.mark.parametrize(("kind", "bar"), [("bar", True), ("lines", False)])
def test_a_bar_can_be_asked_for_and_refused(mpirun, tmp_path, kind, bar):
    with open(tmp_path / "log", "wb") as log:
        seen = on_terminal([mpirun, *rank(kind)], stdout=log, stderr=log)
    text = (tmp_path / "log").read_text()
    assert ("%|" in text) == bar and seen == ""
    assert bool(BAR.search(on_terminal([mpirun, *rank(kind)]))) == bar


def test_warnings_are_said_whatever_is_shown(capsys):
    for chief in (True, False):
        progress = Progress("off", total=1, done=0, chief=chief)
        progress.say("going on")
        progress.warn("warning: no checkpoint was written")
        progress.close()
    assert capsys.readouterr().out == "warning: no checkpoint was written\n"
