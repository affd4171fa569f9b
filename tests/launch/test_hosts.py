"""Hosts without a scheduler: what --hosts and hostfiles may say, and what is refused."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rendering import arguments, launched, script  # noqa: E402

from launch.__main__ import main  # noqa: E402


def hosts_of(path, content, **options):
    """Number of ranks, and -H of the rendered script, for a hostfile of these bytes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = launched(script("mpirun", hostfile=str(path), **options), "mpirun")
    assert words[1] == "-np" and words[3] == "-H"
    return words[2], words[4]


def test_hosts():
    words = launched(script("mpirun", hosts="a:2,b:4"), "mpirun")
    assert words[:5] == ["mpirun", "-np", "6", "-H", "a:2,b:4"]
    assert words[5:9] == ["--map-by", "slot", "--bind-to", "none"]
    words = launched(script("mpirun", hosts="a,b", ranks_per_node=2, cores_per_node=8), "mpirun")
    assert words[5:9] == ["--map-by", "ppr:2:node:PE=4", "--bind-to", "core"]
    words = launched(script("horovodrun", hosts="a:2", controller="gloo"), "horovodrun")
    assert words == ["horovodrun", "-np", "2", "-H", "a:2", "--gloo", "python", "train.py"]
    words = launched(script("mpirun", hosts="a,a,b"), "mpirun")
    assert words[1:5] == ["-np", "3", "-H", "a:2,b:1"]


HOSTFILES = {
    "comments, blank lines": ("# two\na slots=2\n\nb slots = 4  # more\n", "a:2,b:4"),
    "as --hosts": ("a:2\nb slots=4\nc:1 # one\n", "a:2,b:4,c:1"),
    "max_slots": ("a slots=2 max_slots=4\nb  max-slots = 8   slots=3\n", "a:2,b:3"),
    "byte-order mark": (b"\xef\xbb\xbfa slots=2\nb slots=1\n", "a:2,b:1"),
    "byte-order mark, comment": (b"\xef\xbb\xbf# ours\na slots=2\n", "a:2"),
    "CRLF": (b"a slots=2\r\n\r\nb:1\r\n", "a:2,b:1"),
    "no newline at the end": ("a slots=2\nb slots=1", "a:2,b:1"),
    "tabs": ("\ta\tslots=2\t\n", "a:2"),
    "one line per slot": ("a\na\nb\nb\n", "a:2,b:2"),
    "one line per slot, by turns": ("a\nb\na\nb\nb\nc\n", "a:2,b:3,c:1"),
    "slots add up": ("a slots=4\nb slots=1\na:2\na\n", "a:7,b:1"),
}


@pytest.mark.parametrize("kind", HOSTFILES)
def test_hostfile(kind, tmp_path):
    content, expected = HOSTFILES[kind]
    ranks = sum(int(host.split(":")[1]) for host in expected.split(","))
    assert hosts_of(tmp_path / "hosts", content) == (str(ranks), expected)


def test_hostfile_without_numbers_takes_the_option(tmp_path):
    path = tmp_path / "hosts"
    assert hosts_of(path, "a:2\nb\n", ranks_per_node=2) == ("4", "a:2,b:2")
    assert hosts_of(path, "a max_slots=2\nb\n", ranks_per_node=2) == ("4", "a:2,b:2")
    assert hosts_of(path, "a\na\nb\nb\n", ranks_per_node=2) == ("4", "a:2,b:2")


WRONG_HOSTFILES = {
    "a:4 slots=2": "line 1 is 'a:4 slots=2', must be HOST, HOST:RANKS, HOST slots=RANKS or",
    "a:4 slots=4": "line 1 is 'a:4 slots=4', must be",
    "\n#\na slots=1 slots=1": "line 3 is 'a slots=1 slots=1', must be",
    "a max_slots=1 max-slots=2": "line 1 is 'a max_slots=1 max-slots=2', must be",
    "a cpus=4": "line 1 is 'a cpus=4', must be",
    "a slots=4,": "line 1 is 'a slots=4,', must be",
    "a slots=four": "line 1 is 'a slots=four', must be",
    "a slots=-1": "line 1 is 'a slots=-1', must be",
    "a b": "line 1 is 'a b', must be",
    "slots=4": "line 1 is 'slots=4', must be",
    "a:": "line 1 is 'a:', must be",
    "me@a:1": "line 1 is 'me@a:1', must be",
    "a:1\nb\ufeff:2": "line 2 is 'b\\ufeff:2', must be",
    "b:1\na:0": "line 2: the number of ranks on a is 0, must be at least 1",
    f"b:1\na slots={'9' * 5000}": "line 2: the number of ranks on a is 999",
    "b:1\na slots=4 max_slots=2": "line 2: the number of ranks on a is 4, must be at most 2",
    "a slots=2\na slots=2 max_slots=3": "line 2: the number of ranks on a is 4, must be at most 3",
    "a slots=1\nb": "line 2: how many ranks on b? Say b:RANKS, or --ranks-per-node",
    "[::1]:4": "line 1 is '[::1]:4', must be",
    "fe80::1 slots=2": "launchers take no IPv6 address here: use the host's name",
    "# none": "names no host",
    "": "names no host",
}


@pytest.mark.parametrize("content", WRONG_HOSTFILES, ids=lambda content: content[:30])
def test_wrong_hostfile_is_named(content, tmp_path, capsys):
    path = tmp_path / "hosts"
    path.write_text(content)
    assert main(["--machine", "mpirun", "--hostfile", str(path), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert WRONG_HOSTFILES[content] in error and f"--hostfile: {path}" in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_hostfile_in_another_encoding(tmp_path, capsys):
    path = tmp_path / "hosts"
    path.write_bytes("a slots=2\n".encode("utf-16"))
    assert main(["--machine", "mpirun", "--hostfile", str(path), "--", "true"]) == 2
    assert f"--hostfile: cannot read {path}: 'utf-8' codec" in capsys.readouterr().err


HOST_ERRORS = [
    ({}, ["--hosts HOST:RANKS,... and --hostfile FILE"]),
    ({"hosts": "a:1", "hostfile": "f"}, ["one of --hosts"]),
    ({"hosts": "a"}, ["how many ranks on a?", "--ranks-per-node"]),
    ({"hosts": "a:0"}, ["the number of ranks on a is 0", "at least 1"]),
    ({"hosts": f"a:{'9' * 20}"}, [f"ranks on a is {'9' * 20}", "at most 1000000"]),
    ({"hosts": f"a:{'9' * 5000}"}, ["the number of ranks on a is 999", "at most 1000000"]),
    ({"hosts": "a", "ranks_per_node": "0"}, ["--ranks-per-node is 0", "at least 1"]),
    ({"hosts": "a", "ranks_per_node": "9" * 20}, ["--ranks-per-node is 9", "at most 1000000"]),
    ({"hosts": "a,b,"}, ["--hosts is 'a,b,'"]),
    ({"hosts": "a:1,[::1]:2"}, ["--hosts is 'a:1,[::1]:2'", "no IPv6 address"]),
    ({"hosts": f"a:{10**6},a"}, ["ranks on a is 1000001", "at most 1000000"]),
    ({"hosts": "a b"}, ["--hosts is 'a b'"]),
    ({"hosts": "a:2", "ranks_per_node": "3"}, ["--ranks-per-node is 3", "a is given 2"]),
    ({"hosts": "a:2", "nodes": "2"}, ["--nodes is 2", "the number of hosts, 1"]),
    ({"hosts": "a:2", "gpus_per_node": "1"}, ["the number of ranks on a is 2", "at most 1"]),
    ({"hosts": "a:2,b:1", "cores_per_node": "4"}, ["equally many ranks"]),
    ({"hosts": "a:2", "cores_per_node": "3"}, ["divisor of the 3 cores"]),
    ({"hosts": "a:2", "walltime": "1:00"}, ["--walltime means nothing", "no scheduler"]),
    ({"hosts": "a:2", "requeue": ""}, ["--requeue means nothing"]),
    ({"hosts": "a:2", "no-requeue": ""}, ["--no-requeue means nothing"]),
    ({"hostfile": "/no/such"}, ["--hostfile: cannot read /no/such"]),
    ({"hosts": "a:2", "submit": ""}, ["--submit needs a scheduler", "bash FILE"]),
]


@pytest.mark.parametrize(("changes", "parts"), HOST_ERRORS, ids=lambda value: str(value)[:60])
def test_wrong_hosts_are_named(changes, parts, capsys):
    nothing = {"nodes": None, "walltime": None, "account": None}
    options = arguments(**(nothing | {"machine": "mpirun"} | changes))
    assert main([*options, "--", "python", "train.py"]) == 2
    captured = capsys.readouterr()
    assert all(part in captured.err for part in parts) and not captured.out, captured.err
