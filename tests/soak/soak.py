"""Trains for many steps through random faults: python -m tests.soak.soak [--steps 10000].

Bad numbers, errors on one rank, killed ranks, ranks that leave, signals that ask to stop. After
each end the training is launched again and goes on from its last checkpoint. At the end weights
must be equal on all ranks, bit for bit, and memory and open files must not have grown.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.launching import start

WORKER = Path(__file__).with_name("worker.py")
SETTLED = 300  # steps after which a process has all the memory it needs
GROWTH = 24e6  # bytes that allocators may add after that


def train(steps, *, ranks, controller, seed, folder, faults=True, limit=600):
    """Trains to the end, through as many launches as it takes.

    Returns:
        launches: for each, seconds, exit code and the fault that ended it.
        end: what the worker recorded at its end.
        looks: what it recorded on its way.
    """
    marks = folder / "faults"
    marks.mkdir()
    state, record = folder / "state.pt", folder / "record.jsonl"
    launches = []
    arguments = [state, record, steps, seed, marks, int(faults)]
    while True:
        known = set(marks.iterdir())
        begun = time.time()
        code, output = start(
            str(WORKER), *map(str, arguments), ranks=ranks, controller=controller, limit=limit
        )
        ended = time.time()
        new = set(marks.iterdir()) - known
        fault = {"step": None, "fault": None, "seconds": None}
        for mark in new:
            took = ended - mark.stat().st_mtime
            fault = {"step": int(mark.name), "fault": mark.read_text(), "seconds": took}
        launches.append({"launch": len(launches), "lasted": ended - begun, "code": code, **fault})
        print(launches[-1], flush=True)
        lines = (
            [json.loads(line) for line in record.read_text().splitlines()]
            if record.exists()
            else []
        )
        if lines and "digests" in lines[-1]:
            assert code == 0, output[-4000:]
            return launches, lines[-1], lines[:-1]
        assert code != 0 or fault["fault"] == "leave", f"ended early, and well\n{output[-4000:]}"
        assert new, f"ended with {code} and no fault was due\n{output[-6000:]}"


def growth(looks):
    """Of each process that lived long enough: bytes and open files at its end over `SETTLED`."""
    found = []
    for pid in {look["pid"] for look in looks}:
        mine = [look for look in looks if look["pid"] == pid]
        later = [look for look in mine if look["step"] >= mine[0]["step"] + SETTLED]
        if len(later) > 1:
            grown = {key: later[-1][key] - later[0][key] for key in ("rss", "files")}
            found.append({"steps": later[-1]["step"] - later[0]["step"], **grown})
    return found


def check(end, looks):
    assert len(set(end["digests"])) == 1, "replicas differ at the end"
    assert end["finite"]
    assert end["accelerated"] > 0
    for found in growth(looks):
        assert found["rss"] < GROWTH, found
        assert found["files"] <= 2, found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--controller", choices=("mpi", "gloo"), default="mpi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launches, end, looks = train(
            options.steps,
            ranks=options.ranks,
            controller=options.controller,
            seed=options.seed,
            folder=Path(folder),
            limit=3600,
        )
    found = {"launches": launches, "end": end, "growth": growth(looks)}
    print(json.dumps({"end": end, "growth": found["growth"]}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    check(end, looks)


if __name__ == "__main__":
    main()
