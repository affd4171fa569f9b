"""The measurements of one case, and their table."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.minibatch.averages import NAMES
from benchmarks.minibatch.bases import Base, Case, grid
from benchmarks.minibatch.results import APART, BASE, Runs
from benchmarks.minibatch.run import Run, steps_to

Row = dict[str, Any]
COLUMNS = {
    "f": "f",
    "f_ratio": "f / base",
    "f_worst": "worst seed",
    "f_of_means": "of means",
    "f_over_best": "f / best",
    "gap_ratio": "gap / base",
    "gap_over_best": "gap / best",
    "optimum": "f*",
    "lbfgs": "L-BFGS",
    "loss_ratio": "loss / base",
    "validation_ratio": "val. / base",
    "accuracy_points": "points",
    "steps": "steps",
    "seconds": "seconds",
}
KINDS = ("last weights", "average", "Schedule-Free")
LEGEND = """f: mean of the seeds' results. / base: geometric mean of the seeds' ratios to the base
of the same group of rows. of means: ratio of the means of f. / best: to the best of the grid. at: a
running average of the weights. gap: f less f*, the least f: what L-BFGS finds, from the last
weights of the best base, or a training's f if that is below it. points: validation accuracy, in
percentage points above the base. steps: median of the steps until f was at most the base's result.
seconds: of one training, without evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of every case.

    Attributes:
        seeds: number of seeds; None: the case's own number.
        schedules: schedules of the grid, see `bases.grid`.
        screen: the whole grid has seed 0 alone, and so many recipes of each kind (last weights,
            averages, Schedule-Free), the best by that, have all seeds; 0: all recipes have them.
        optimum: iterations of L-BFGS; 0: do not run it.
    """

    seeds: int | None = None
    schedules: str = "constant"
    screen: int = 0
    optimum: int = 0

    def seeds_of(self, case: Case) -> int:
        """The number of seeds of a case."""
        return case.seeds if self.seeds is None else self.seeds


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A base, and the weights that are evaluated.

    Attributes:
        base: the base optimizer.
        average: one of `averages.NAMES`; "": the last weights, or x of Schedule-Free.
    """

    base: Base
    average: str = ""

    @property
    def name(self) -> str:
        """A name such as nesterov0.1m0.9, nesterov0.1m0.9 at ema0.99."""
        return self.base.name + (f" at {self.average}" if self.average else "")

    def of(self, runs: Sequence[Run]) -> list[Run]:
        """The runs, with the results at these weights. An average has no curve."""
        if not self.average:
            return list(runs)
        return [run | {"result": run["averages"][self.average], "curve": None} for run in runs]


def measure(case: Case, runs: Runs, plan: Plan) -> list[Row]:
    """Makes the runs of a case.

    Returns:
        One row each for the untuned base, the same started `APART` apart, and every setting on it:
        at the last weights, and at their best average. Then the same for the best recipe of the
        grid, with settings at its weights alone, and without settings if it is Schedule-Free:
        acceleration does nothing there. Then the best recipe at last weights with every setting on
        it, and the best at an average and of Schedule-Free.
    """
    seeds = plan.seeds_of(case)

    def made(recipe: Recipe, config: str = BASE, apart: float = 0.0, few: int = seeds) -> list[Run]:
        at = recipe.average
        return recipe.of(runs.of(case.problem, recipe.base, few, config, apart, averaged=bool(at)))

    def best_of(recipes: Sequence[Recipe], config: str = BASE) -> Recipe:
        if plan.screen:
            recipes = ordered(recipes, [made(one, config, few=1) for one in recipes])[: plan.screen]
        return ordered(recipes, [made(one, config) for one in recipes])[0]

    untuned = Recipe(case.base)
    tried = grid(case.base, plan.schedules)
    best_label = f"best of {len(tried)}"
    winners = {label: best_of(recipes) for label, recipes in kinds(tried).items()}
    kept = list(winners.values())
    best = ordered(kept, [made(recipe) for recipe in kept])[0] if kept else None
    groups = {"untuned": untuned} | ({} if best is None else {best_label: best}) | winners
    named = []
    for label, recipe in groups.items():
        own = made(recipe)
        named.append((f"{label}: {recipe.name}", own, own))
        if label in ("untuned", best_label):
            named.append((f"{label}, {APART:g} apart", made(recipe, apart=APART), own))
        accelerated = label in ("untuned", best_label, KINDS[0]) and not recipe.base.free
        for name in runs.configs if accelerated else ():
            named.append((f"{label}, {name}", made(recipe, name), own))
            if label == "untuned" and case.base.averaged:
                at = best_of([Recipe(case.base, average) for average in NAMES], name)
                named.append((f"{label}, {name} at {at.average}", made(at, name), own))
    top = None if best is None else made(best)
    start = case.base if best is None else best.base
    found = runs.floors(case.problem, start, seeds, plan.optimum)
    floors = None
    if found is not None:
        floors = least_of_all(found, [some for _, some, _ in named])
    rows = [{"row": name, **summarise(some, own, top, floors)} for name, some, own in named]
    return [row | {"lbfgs": _known(statistics.fmean, found)} for row in rows]


def kinds(tried: Sequence[Base]) -> dict[str, list[Recipe]]:
    """The recipes of a grid by kind: at last weights, at averages, of Schedule-Free."""
    found = (
        [Recipe(base) for base in tried if not base.free],
        [Recipe(base, name) for base in tried if base.averaged for name in NAMES],
        [Recipe(base) for base in tried if base.free],
    )
    return {label: recipes for label, recipes in zip(KINDS, found, strict=True) if recipes}


def ordered(recipes: Sequence[Recipe], runs: Sequence[Sequence[Run]]) -> list[Recipe]:
    """Recipes by the mean over seeds of f; the lowest first."""
    means = [statistics.fmean(_results(some, "f")) for some in runs]
    return [recipes[index] for index in sorted(range(len(recipes)), key=means.__getitem__)]


def least_of_all(floors: Sequence[float], rows: Sequence[Sequence[Run]]) -> list[float]:
    """The least f of each seed: what L-BFGS found, or an evaluation or result below that."""
    return [
        min(floor, *(f for run in runs for f in (run["result"]["f"], *(run["curve"] or ()))
                     if math.isfinite(f)))
        for floor, *runs in zip(floors, *rows, strict=True)
    ]  # fmt: skip


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
    best_ratios = gaps = best_gaps = None
    if best is not None:
        best_ratios = ratios(f, _results(best, "f"))
    if floors is not None:
        gaps = ratios(_above(f, floors), _above(base_f, floors))
    if best is not None and floors is not None:
        best_gaps = ratios(_above(f, floors), _above(_results(best, "f"), floors))
    accuracy, base_accuracy = (_results(some, "validation_accuracy") for some in (runs, base))
    curves = all(run["curve"] is not None for run in runs)
    steps = (
        [steps_to(run, level) for run, level in zip(runs, base_f, strict=True)] if curves else []
    )
    return {
        "f": statistics.fmean(f),
        "f_ratio": geometric_mean(f_ratios),
        "f_worst": max(f_ratios),
        "f_of_means": ratios([statistics.fmean(f)], [statistics.fmean(base_f)])[0],
        "f_over_best": _known(geometric_mean, best_ratios),
        "f_over_best_worst": _known(max, best_ratios),
        "gap_ratio": _known(geometric_mean, gaps),
        "gap_worst": _known(max, gaps),
        "gap_over_best": _known(geometric_mean, best_gaps),
        "gap_over_best_worst": _known(max, best_gaps),
        "optimum": _known(statistics.fmean, floors),
        "loss_ratio": geometric_mean(ratios(_results(runs, "loss"), _results(base, "loss"))),
        "validation_ratio": geometric_mean(
            ratios(_results(runs, "validation_loss"), _results(base, "validation_loss"))
        ),
        "accuracy_points": 100 * (statistics.fmean(accuracy) - statistics.fmean(base_accuracy)),
        "steps": statistics.median(steps) if curves else None,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ratios seed by seed; 1 where both are infinite or 0, infinite where only the base is 0."""
    return [
        1.0 if value == one else value / one if one else math.inf
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
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    return report.table(
        ["", *(COLUMNS[name] for name in names)],
        [[row["row"], *(_cell(name, row.get(name)) for name in names)] for row in rows],
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
    """One row for each case, all over the best of the grid: its kinds, ours, and the control.

    Ours are on the untuned base, and on the best base at last weights.
    """
    rows = []
    for name, case in tables.items():
        best = next(row for row in case if row["row"].startswith("best of"))
        label, recipe = best["row"].split(": ")
        on_best = _row(case, f"{KINDS[0]}, default")
        over = [
            *(_row(case, row)["f_over_best"] for row in ("untuned", *KINDS, "untuned, default"))
        ]
        over += [on_best[column] for column in ("f_over_best", "f_over_best_worst")]
        gaps = [on_best[column] for column in ("gap_over_best", "gap_over_best_worst")]
        rows.append([
            name, recipe, label.removeprefix("best of "), *(f"{one:.2f}" for one in over),
            *("" if gap is None else f"{gap:.2f}" for gap in gaps),
            f"{_row(case, f'{label}, {APART:g} apart')['f_ratio']:.2f}",
        ])  # fmt: skip
    head = ["problem, batch, untuned base", "best of the grid", "of runs", "untuned"]
    head += ["last weights", "averages", "Schedule-Free", "untuned with ours", "tuned with ours"]
    return report.table([*head, "worst seed", "gap", "worst gap", "control: f"], rows)


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
    return f"{value:.4g}" if name in ("f", "optimum", "lbfgs") else f"{value:.3f}"


def _known(
    function: Callable[[Sequence[float]], float], values: Sequence[float] | None
) -> float | None:
    return None if values is None else function(values)


def _results(runs: Sequence[Run], name: str) -> list[float]:
    return [run["result"][name] for run in runs]


def _above(values: Sequence[float], floors: Sequence[float]) -> list[float]:
    return [value - floor for value, floor in zip(values, floors, strict=True)]
