"""Job scripts for tests, and what they say."""

import re
import shlex

from launch.job import Options, plan
from launch.machines import load_machine
from launch.render import render

SUMMIT = {"nodes": 2, "walltime": "2:00", "account": "ABC123"}


def script(machine, *, command=("python", "train.py"), **options):
    return render(plan(load_machine(machine), Options(command=command, **options)))


def launched(text, launcher):
    """The words of the training's launch, as bash reads them: the last of its kind."""
    *_, line = (line for line in text.splitlines() if re.match(rf" *(exec )?{launcher} ", line))
    return shlex.split(line.removesuffix(" &").strip().removeprefix("exec "))


def head(text, word):
    return [line.removeprefix(f"#{word} ") for line in text.splitlines()
            if line.startswith(f"#{word} ")]  # fmt: skip


def arguments(**changes):
    """The words of a command line that asks for a job on Summit, but for the changes.

    None leaves an option out, and "" gives it no value.
    """
    words = {"machine": "summit", "nodes": "2", "walltime": "2:00", "account": "ABC"} | changes
    return [
        word for name, value in words.items() if value is not None
        for word in ([f"--{name.replace('_', '-')}={value}"] if value else [f"--{name}"])
    ]  # fmt: skip
