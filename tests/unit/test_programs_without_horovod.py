"""What is started by hand says in one line how to get Horovod, where there is none."""

import os
import subprocess
import sys

import pytest
from launching import ROOT

PROGRAM = """
import runpy, sys
sys.modules["horovod"] = None
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__")
"""
EXAMPLES = sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("program", ["models.train", *EXAMPLES])
def test_one_line_and_an_exit_code(program):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, program],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == (2 if program == "models.train" else 1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "make setup" in line and "horovod" in line.lower()
    assert done.stdout == ""


def test_help_needs_no_horovod():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "models.train", "--help"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--anderson-history-depth" in done.stdout
