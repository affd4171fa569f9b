"""The torch loader's processes end with their rank."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
from conftest import numbered_images
from launching import ROOT


def test_nothing_is_left_of_a_killed_rank(tmp_path):
    """A worker, its fork server and its resource tracker: torch ends none of them."""
    numbered_images(tmp_path, 60)
    program = Path(__file__).with_name("loader_family.py")
    rank = subprocess.Popen(
        [sys.executable, program, tmp_path],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    family = []
    try:
        assert rank.stdout.readline() == b"ready\n"
        family = psutil.Process(rank.pid).children(recursive=True)
        assert len(family) == 3, family
        rank.kill()
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left
    finally:
        rank.kill()
        for process in family:
            if process.is_running():
                process.kill()
