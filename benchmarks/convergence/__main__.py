"""``python -m benchmarks.convergence --help``."""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.convergence.plan import Plan, make_plan, parser
from benchmarks.convergence.results import Results
from models.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        Exit code: 0, 2 for wrong input, or that of the ranks.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    code = 0
    try:
        plan = make_plan(options)
        results = Results(plan.results)
        if not options.report:
            results.check(plan.conditions)
            if options.resume:
                plan.runs[:] = [run for run in plan.runs if run not in results.runs]
            code = _launch(plan, results, words)
        report(plan.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on, --report shows what there is", file=sys.stderr)
        return 130
    return code


def report(path: Path) -> None:
    """Writes table.md and plots beside results.json.

    Raises:
        UserError: there are no results.
    """
    from benchmarks.convergence.plots import plot_all
    from benchmarks.convergence.summary import markdown, summarise

    results = Results(path)
    if not results.runs:
        raise UserError(f"there are no results in {path}")
    table = markdown(summarise(results.runs), results.head)
    (path.parent / "table.md").write_text(table)
    plots = plot_all(results.runs, path.parent)
    print(f"{table}\n{len(plots)} plots and table.md in {path.parent}")


def _launch(plan: Plan, results: Results, words: list[str]) -> int:
    from benchmarks.launch import describe_machine, run_on_ranks

    if not plan.runs:
        print("nothing to run", file=sys.stderr)
        return 0
    results.head = {
        "conditions": plan.conditions,
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        "arguments": _without_paths(words),
    }
    results.write()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.write(path)
        print(f"{len(plan.runs)} runs on {plan.ranks} ranks", file=sys.stderr)
        code = run_on_ranks(
            "benchmarks.convergence.worker",
            str(path),
            ranks=plan.ranks,
            cycle_time=plan.cycle_time,
            output=sys.stderr,
        )
    if code:
        print(f"error: the ranks ended with exit code {code}", file=sys.stderr)
    return code


def _without_paths(words: list[str]) -> list[str]:
    """Hides paths of this machine, since results are published."""
    kept = []
    after = ""
    for word in words:
        name, _, value = word.partition("=")
        if after in ("--out", "--admissions-csv"):
            kept.append("...")
        else:
            kept.append(f"{name}=..." if value and name in ("--out", "--admissions-csv") else word)
        after = word
    return kept


if __name__ == "__main__":
    sys.exit(main())
