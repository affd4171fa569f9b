"""The commands in the docstrings of examples/: their programs take them.

Which of them are run as they stand: tests/elastic, tests/parallel/test_examples.py.
"""

import runpy
import sys

import pytest
from launching import ROOT, documented

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
COMMANDS = [(name, words) for name in EXAMPLES for words in documented(name)]


def test_every_example_has_a_command():
    assert {name for name, _ in COMMANDS} == set(EXAMPLES)
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[" ".join(w) for _, w in COMMANDS])
def test_command_is_taken(name, words, monkeypatch):
    from horovod.runner.launch import parse_args

    monkeypatch.setattr(sys, "argv", words)
    assert words[0] == "horovodrun"
    options = parse_args()
    python, script, *arguments = options.command
    assert (python, script) == ("python", f"examples/{name}.py")
    assert options.num_proc == 2
    program = runpy.run_path(str(ROOT / script), run_name="example")
    program["parse"](arguments)


def test_elastic_on_one_machine_names_an_interface():
    """Without, horovodrun waits for a second host, in silence."""
    (words,) = documented("digits_elastic")
    assert words[words.index("--network-interfaces") + 1] == "lo"
    hosts = words[words.index("--host-discovery-script") + 1]
    assert hosts == "echo localhost:2"
