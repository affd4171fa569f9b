"""What Anderson acceleration costs on real ranks: one measurement, three sweeps.

python -m benchmarks.cost overhead     # settings, by part, against the floor
python -m benchmarks.cost scaling      # an acceleration step against ranks
python -m benchmarks.cost step-time    # a whole training step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from benchmarks import command, report
from benchmarks.cost import overhead, scaling, step_time

MODULE = "benchmarks.cost"
SWEEPS: dict[str, ModuleType] = {
    "overhead": overhead,
    "scaling": scaling,
    "step-time": step_time,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweeps = parser.add_subparsers(dest="sweep", required=True, metavar="SWEEP")
    for name, sweep in SWEEPS.items():
        about = str(sweep.__doc__)
        one = sweeps.add_parser(name, help=about.splitlines()[0], description=about)
        out = report.RESULTS / f"{name.replace('-', '_')}.json"
        command.add_options(one, out)
        default = " ".join(map(str, sweep.RANKS))
        one.add_argument(
            "--ranks", type=int, nargs="+", default=list(sweep.RANKS), help=f"default: {default}"
        )
        sweep.add_options(one)
    options = parser.parse_args(arguments)
    return command.run(options, _launch, SWEEPS[options.sweep].measure_on_ranks)


def _launch(options: argparse.Namespace) -> None:
    sweep = SWEEPS[options.sweep]
    command.at_least(1, options, "ranks")
    sweep.check(options)
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        words = sweep.words(options, ranks)
        runs += command.collect(MODULE, options.sweep, *words, ranks=ranks)
    measured = {"sweep": options.sweep, "m": runs[0]["m"], "runs": runs}
    results = report.write(options.out, measured)
    print(f"\n{sweep.table(results)}\n\n{sweep.notes(results)}\n")
    sweep.plot(results, options.out)


if __name__ == "__main__":
    sys.exit(main())
