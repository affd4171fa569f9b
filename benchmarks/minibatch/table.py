"""The measurements of one case, and their table."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.minibatch import problems
from benchmarks.minibatch.bases import Base, Case, grid
from benchmarks.minibatch.results import APART, Runs
from benchmarks.minibatch.run import Run, least, steps_to, train

Row = dict[str, Any]
COLUMNS = {
    "f": "f",
    "f_ratio": "f / base",
    "f_worst": "worst seed",
    "f_of_means": "of means",
    "f_over_best": "f / best",
    "gap_ratio": "gap / base",
    "loss_ratio": "loss / base",
    "validation_ratio": "val. / base",
    "accuracy_points": "points",
    "steps": "steps",
    "seconds": "seconds",
}
LEGEND = """f: mean of the seeds' results. / base: geometric mean of the seeds' ratios to the base
of the same group of rows (untuned or best). of means: ratio of the means of f. / best: to the best
of the grid. gap: f less the least f that L-BFGS finds. points: validation accuracy, in percentage
points above the base. steps: median of the steps until f was at most the base's result. seconds:
of one training, without evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of every case.

    Attributes:
        seeds: number of seeds; None: the case's own number.
        schedules: schedules of the grid, see `bases.grid`.
        optimum: iterations of L-BFGS; 0: do not run it.
    """

    seeds: int | None = None
    schedules: str = "constant"
    optimum: int = 0

    def seeds_of(self, case: Case) -> int:
        """The number of seeds of a case."""
        return case.seeds if self.seeds is None else self.seeds


def measure(case: Case, runs: Runs, plan: Plan) -> list[Row]:
    """Makes the runs of a case.

    Returns:
        One row each for the untuned base, the same started `APART` apart, and every setting on
        it. Then the same for the best base of the grid.
    """
    seeds = plan.seeds_of(case)
    tried = grid(case.base, plan.schedules)
    best = None
    if tried:
        best = best_of(tried, [runs.of(case.problem, base, seeds) for base in tried])
    floors = _floors(case, seeds, plan.optimum, runs.steps) if plan.optimum else None
    rows = []
    for base, label in ((case.base, "untuned"), (best, f"best of {len(tried)}")):
        if base is None:
            continue
        own = runs.of(case.problem, base, seeds)
        top = None if best is None else runs.of(case.problem, best, seeds)
        near = runs.of(case.problem, base, seeds, apart=APART)
        named = [(f"{label}: {base.name}", own), (f"{label}, {APART:g} apart", near)]
        for name in runs.configs:
            named.append((f"{label}, {name}", runs.of(case.problem, base, seeds, name)))
        rows += [{"row": name, **summarise(some, own, top, floors)} for name, some in named]
    return rows


def best_of(bases: Sequence[Base], runs: Sequence[Sequence[Run]]) -> Base:
    """The base with the lowest mean over seeds of f."""
    means = [statistics.fmean(_results(some, "f")) for some in runs]
    return bases[min(range(len(bases)), key=means.__getitem__)]


def summarise(
    runs: Sequence[Run],
    base: Sequence[Run],
    best: Sequence[Run] | None = None,
    floors: Sequence[float] | None = None,
) -> dict[str, float | None]:
    """The numbers of a row, see `COLUMNS` and `LEGEND`.

    Args:
        runs: one for each seed.
        base: runs of the base optimizer, in the same order of seeds.
        best: runs of the best base of the grid; None: there is no grid.
        floors: the least f of each seed; None: not known.

    Returns:
        By name, None where something is not known.
    """
    f, base_f = _results(runs, "f"), _results(base, "f")
    f_ratios = ratios(f, base_f)
    gaps = None
    if floors is not None:
        gaps = ratios(
            [one - floor for one, floor in zip(f, floors, strict=True)],
            [one - floor for one, floor in zip(base_f, floors, strict=True)],
        )
    accuracy, base_accuracy = (_results(some, "validation_accuracy") for some in (runs, base))
    steps = [steps_to(run, level) for run, level in zip(runs, base_f, strict=True)]
    return {
        "f": statistics.fmean(f),
        "f_ratio": geometric_mean(f_ratios),
        "f_worst": max(f_ratios),
        "f_of_means": ratios([statistics.fmean(f)], [statistics.fmean(base_f)])[0],
        "f_over_best": None if best is None else geometric_mean(ratios(f, _results(best, "f"))),
        "gap_ratio": None if gaps is None else geometric_mean(gaps),
        "loss_ratio": geometric_mean(ratios(_results(runs, "loss"), _results(base, "loss"))),
        "validation_ratio": geometric_mean(
            ratios(_results(runs, "validation_loss"), _results(base, "validation_loss"))
        ),
        "accuracy_points": 100 * (statistics.fmean(accuracy) - statistics.fmean(base_accuracy)),
        "steps": statistics.median(steps),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ratios seed by seed; infinite where only `values` is infinite, 1 where both are."""
    return [
        1.0 if math.isinf(value) and math.isinf(one) else value / one
        for value, one in zip(values, base, strict=True)
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean; infinite if a value is infinite, else 0 if a value is 0 or less."""
    if any(math.isinf(value) for value in values):
        return math.inf
    if any(value <= 0.0 for value in values):
        return 0.0
    return math.exp(statistics.fmean(math.log(value) for value in values))


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, without columns that no row knows."""
    names = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    return report.table(
        ["", *(COLUMNS[name] for name in names)],
        [[row["row"], *(_cell(name, row[name]) for name in names)] for row in rows],
    )


def overview(tables: Mapping[str, Sequence[Row]]) -> str:
    """One row for each case: default settings over the untuned base, and the control."""
    rows = []
    for name, case in tables.items():
        ours, control = _row(case, "untuned, default"), _row(case, f"untuned, {APART:g} apart")
        rows.append([
            name, *(f"{ours[column]:.2f}" for column in ("f_ratio", "f_worst", "loss_ratio")),
            f"{ours['validation_ratio']:.2f}", f"{ours['accuracy_points']:+.1f}",
            f"{control['f_ratio']:.2f}", f"{control['f_worst']:.2f}",
        ])  # fmt: skip
    head = ["problem, batch, base", "f", "worst seed", "training loss", "validation loss"]
    return report.table([*head, "points", "control: f", "worst"], rows)


def tuned(tables: Mapping[str, Sequence[Row]]) -> str:
    """One row for each case: the best of the grid, ours on the untuned base, ours on the best."""
    rows = []
    for name, case in tables.items():
        best = next(row for row in case if row["row"].startswith("best of") and ":" in row["row"])
        label, base = best["row"].split(": ")
        ours, on_best = _row(case, "untuned, default"), _row(case, f"{label}, default")
        control = _row(case, f"{label}, {APART:g} apart")
        rows.append([
            name, base, f"{1.0 / _row(case, 'untuned: ')['f_over_best']:.2f}",
            f"{ours['f_over_best']:.2f}", f"{on_best['f_ratio']:.2f}",
            f"{on_best['f_worst']:.2f}", f"{control['f_ratio']:.2f}",
        ])  # fmt: skip
    head = ["problem, batch, untuned base", "best of the grid", "its f over the untuned base's"]
    head += ["untuned with ours over it", "ours on it, f", "worst seed", "control: f"]
    return report.table(head, rows)


def _row(rows: Sequence[Row], name: str) -> Row:
    """The row whose name begins so."""
    return next(row for row in rows if row["row"].startswith(name))


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if math.isinf(value):
        return "never" if name == "steps" else "∞"
    if name == "steps":
        return f"{value:.0f}"
    if name == "seconds":
        return f"{value:.2f}"
    if name == "accuracy_points":
        return f"{value:+.2f}"
    return f"{value:.4g}" if name == "f" else f"{value:.3f}"


def _results(runs: Sequence[Run], name: str) -> list[float]:
    return [run["result"][name] for run in runs]


def _floors(case: Case, seeds: int, iterations: int, steps: int | None) -> list[float] | None:
    """The least f of each seed, from the first weights and from the base's last ones."""
    if not case.base.coupled:
        return None  # without the decay f has no minimum on separable data
    floors = []
    for seed in range(seeds):
        problem = problems.make(case.problem, seed, steps)
        starts = problem.make_model(), train(problem, case.base)[1]
        floors.append(least(problem, True, starts, iterations))
    return floors
