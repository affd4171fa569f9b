"""What is started by hand says in one line how to get Horovod, where there is none."""

import json
import os
import subprocess
import sys

from launching import ROOT

# One process for all, which imports torch once. By program: what it gives to `sys.exit`.
PROGRAM = """
import json, runpy, sys
sys.modules["horovod"] = None
found = {}
for words in json.loads(sys.argv[1]):
    sys.argv = words
    run = runpy.run_path if words[0].endswith(".py") else runpy.run_module
    try:
        run(words[0], run_name="__main__")
    except SystemExit as error:
        found[" ".join(words)] = error.code
print(json.dumps(found))
"""


def test_one_line_and_an_exit_code():
    found = sorted((ROOT / "examples").glob("*.py"))
    examples = [f"examples/{path.name}" for path in found if "horovod" in path.read_text()]
    assert len(examples) >= 6
    commands = [["models.train", "--help"], ["models.train"], *([name] for name in examples)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *help_text, found = done.stdout.splitlines()
    assert "--anderson-history-depth" in "".join(help_text), "it needs no Horovod"
    found = json.loads(found)
    assert found.pop("models.train --help") == 0
    assert found.pop("models.train") == 2
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("error: "))
    assert found.keys() == set(examples)
    for text in (line, *found.values()):  # text that is given to sys.exit ends with code 1
        assert text.startswith("error: ") and "\n" not in text
        assert "make setup" in text and "horovod" in text
    assert "Traceback" not in done.stderr
