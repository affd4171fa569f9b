"""Image folders whose pictures tell which file they came from, and a way to start the programs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from models.data import list_images, write_digits  # noqa: E402

GREY_STEP = 4
"""Image number i is evenly 4 i bright: JPEG keeps that to less than 1."""


def numbered_images(root, count, classes=3):
    """Writes images 0..count-1, i in class i mod classes, and lists them."""
    assert count * GREY_STEP <= 256
    for number in range(count):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 16), number * GREY_STEP, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=95)
    return list_images(root)


def numbers(images, options):
    """Reads the numbers back from a batch."""
    grey = images.mean(dim=(1, 2, 3)) * options.std[0] * 255 + options.mean[0] * 255
    return (grey / GREY_STEP).round().int().tolist()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=16)


def start(module_or_file, *arguments, ranks=1, controller="gloo", limit=150):
    """Runs a program, under horovodrun unless on one rank; its exit code and all its output.

    A run that does not end within `limit` seconds fails the test.
    """
    binaries = Path(sys.executable).parent
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    program = [module_or_file] if module_or_file.endswith(".py") else ["-m", module_or_file]
    command = [sys.executable, *program, *map(str, arguments)]
    if ranks > 1:
        command = ["horovodrun", "-np", str(ranks), f"--{controller}", *command]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {limit} s: {' '.join(command)}\n{output[-4000:]}")
    return process.returncode, output
