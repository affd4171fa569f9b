"""The common frame of the benchmarks' programs: one module, run by its user and on the ranks.

The user's process launches the same module on real ranks, with `--on-rank FILE`. There rank 0
writes its measurements into FILE. The user's process prints, keeps and plots them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from models.errors import UserError


class RanksFailed(Exception):
    """The ranks ended with an exit code other than 0; their output has been shown."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the ranks ended with exit code {code}")
        self.code = code


def parser(module: str, description: str | None, out: Path) -> argparse.ArgumentParser:
    """Makes a command line with the options of `run`; `out`: default of `--out`, a file."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    add_options(made, out)
    return made


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """Adds `--out`, a file, and the other options of `run`."""
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)


def run(
    options: argparse.Namespace,
    launch: Callable[[argparse.Namespace], None],
    measure: Callable[[argparse.Namespace], Any],
) -> int:
    """Launches or, on a rank, measures.

    Args:
        options: options of a `parser`.
        launch: called in the user's process.
        measure: called on every rank, between Horovod's start and end; returns plain types.

    Returns:
        Exit code: 0, 2 for wrong input, or that of the ranks.
    """
    if options.on_rank:
        on_rank(options.on_rank, lambda: measure(options))
        return 0
    try:
        report.prepare(options.out.parent)
        launch(options)
    except RanksFailed as failed:
        return failed.code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def at_least(low: int, options: argparse.Namespace, *names: str) -> None:
    """Checks options that are a number or a list of them.

    Raises:
        UserError: one is too small.
    """
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            if number < low:
                raise UserError(f"--{name} is {number}, must be at least {low}")


def collect(module: str, *words: str, ranks: int) -> Any:
    """Runs a module on ranks, passes its output on, and returns what rank 0 measured.

    Args:
        module: a module that calls `run`.
        words: its command line.
        ranks: number of ranks, all on this machine.

    Raises:
        RanksFailed: see there.
        UserError: there is no horovodrun.
    """
    from benchmarks.launch import run_on_ranks

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        words = *words, f"--on-rank={found}"
        code = run_on_ranks(module, *words, ranks=ranks, cycle_time=None, output=sys.stdout)
        if code != 0:
            raise RanksFailed(code)
        return json.loads(found.read_text())


def on_rank(path: Path, measure: Callable[[], Any]) -> None:
    """Runs `measure` on every rank; rank 0 writes what it returned."""
    import horovod.torch as hvd

    from models import dist

    dist.start()
    found = measure()
    if hvd.rank() == 0:
        path.write_text(json.dumps(found))
    hvd.barrier()
    hvd.shutdown()
