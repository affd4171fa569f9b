"""The commands in the docstrings of examples/: their programs take them.

Which of them are run as they stand: tests/elastic, tests/parallel/test_examples.py, tests/torchrun.
"""

import runpy
import sys

import pytest
from launching import ROOT, documented

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
COMMANDS = [(name, words) for name in EXAMPLES for words in documented(name)]


def test_every_example_has_a_command():
    assert {name for name, _ in COMMANDS} == set(EXAMPLES)
    assert len(EXAMPLES) >= 7


def under_horovodrun():
    """The program and its arguments that a command of `sys.argv` starts on two ranks."""
    from horovod.runner.launch import parse_args

    options = parse_args()
    python, *command = options.command
    assert python == "python"
    assert options.num_proc == 2
    return command


def under_torchrun():
    from torch.distributed.run import parse_args

    options = parse_args(sys.argv[1:])
    assert options.nproc_per_node == "2"
    return [options.training_script, *options.training_script_args]


STARTS = {"horovodrun": under_horovodrun, "torchrun": under_torchrun}


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[" ".join(w) for _, w in COMMANDS])
def test_command_is_taken(name, words, monkeypatch):
    words = words["=" in words[0] :]  # after a variable of the environment
    monkeypatch.setattr(sys, "argv", words)
    script, *arguments = STARTS[words[0]]()
    assert script == f"examples/{name}.py"
    program = runpy.run_path(str(ROOT / script), run_name="example")
    program["parse"](arguments)


def test_elastic_on_one_machine_names_an_interface():
    """Without, horovodrun waits for a second host, in silence."""
    (words,) = documented("digits_elastic")
    assert words[words.index("--network-interfaces") + 1] == "lo"
    hosts = words[words.index("--host-discovery-script") + 1]
    assert hosts == "echo localhost:2"
