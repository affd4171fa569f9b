"""Figures from runs: means over seeds with 95 % bands, ratios to the base, steps to its loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.convergence.plan import CONTENDERS
from benchmarks.convergence.results import Key, Run
from models.problems import PROBLEMS

AVERAGED = "default, averaged weights"
"""The default, evaluated at its averaged weights. It has no runs of its own."""
CONTENDER_ORDER = (*CONTENDERS, AVERAGED)


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over seeds and half the width of its 95 % band (Student's t); inf where one diverged."""

    value: float
    band: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of one value per seed."""
        mean, band = mean_and_band(np.array([values], dtype=float))
        return cls(float(mean[0]), float(band[0]))


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender on one problem.

    Attributes:
        problem: its name.
        contender: its name, or `AVERAGED`.
        seeds: number of runs.
        diverged: how many of them ended with a loss that is not finite.
        final: metric -> mean over seeds at the end.
        mean_of_ratios: final training loss over the base's with the same seed, mean over seeds;
            None without runs of the base.
        ratio_of_means: mean of the final training losses over the mean of the base's.
        worst_ratio: largest ratio of a seed.
        objective_ratio: final f over the base's with the same seed, geometric mean over seeds. f is
            the objective that is minimised, training loss and the share of weight decay.
        worst_objective_ratio: largest of them.
        steps_to_base: steps to the base's final training loss, mean over the seeds that reached it;
            None if none did.
        reached: number of these seeds.
        seconds_per_step: mean, without the time for measuring.
        counters: summed over seeds: stored, accelerated, rejected, averaged, as far as kept.
    """

    problem: str
    contender: str
    seeds: int
    diverged: int
    final: dict[str, Mean]
    mean_of_ratios: float | None
    ratio_of_means: float | None
    worst_ratio: float | None
    objective_ratio: float | None
    worst_objective_ratio: float | None
    steps_to_base: float | None
    reached: int
    seconds_per_step: float
    counters: dict[str, int]


def mean_and_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds of curves, and half the width of its 95 % band.

    Args:
        values: [points, seeds]; a value that is not finite makes the mean inf and the band nan.

    Returns:
        Means [points] and bands [points]; bands are nan for a single seed.
    """
    count = values.shape[1]
    finite = np.isfinite(values).all(axis=1)
    mean = np.full(len(values), np.inf)
    band = np.full(len(values), np.nan)
    mean[finite] = values[finite].mean(axis=1)
    if count > 1:
        width = stats.t.ppf(0.975, count - 1) / math.sqrt(count)
        band[finite] = width * values[finite].std(axis=1, ddof=1)
    return mean, band


def steps_to(run: Run, loss: float) -> int | None:
    """Steps after which a run's training loss is at or below `loss`; None if it never is.

    With a full batch it is the loss that each step saw, as far as stored. Else it is the loss over
    the whole training set, measured at the marks.
    """
    if run["full_batch"]:
        stride = run["loss"]["stride"]
        points = [(i * stride, value) for i, value in enumerate(run["loss"]["values"])]
        points.append((run["marks"][-1], run["final"]["training_loss"]))
    else:
        values = [*run["metrics"]["training_loss"][:-1], run["final"]["training_loss"]]
        points = list(zip(run["marks"], values, strict=True))
    return next((step for step, value in points if value is not None and value <= loss), None)


def with_averaged(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs, and for each with averaged weights another one, measured at those."""
    every = []
    for run in runs:
        every.append(run)
        if run["averaged_final"] is not None:
            every.append(
                run
                | {
                    "contender": AVERAGED,
                    "final": run["averaged_final"],
                    "metrics": run["averaged_metrics"],
                    "full_batch": False,  # steps saw the other weights' loss
                }
            )
    return every


def summarise(runs: dict[Key, Run]) -> list[Row]:
    """One row per problem and contender, in the order of `PROBLEMS` and `CONTENDER_ORDER`."""
    base = {
        (problem, seed): run
        for (problem, contender, seed), run in runs.items()
        if contender == "base"
    }
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in with_averaged(runs.values()):
        groups.setdefault((run["problem"], run["contender"]), []).append(run)
    return [
        _row(problem, contender, groups[problem, contender], base)
        for problem in PROBLEMS
        for contender in CONTENDER_ORDER
        if (problem, contender) in groups
    ]


def markdown(rows: Sequence[Row], head: dict[str, Any]) -> str:
    """A table per problem."""
    lines = ["# Convergence", "", *_about(head), ""]
    for problem in dict.fromkeys(row.problem for row in rows):
        chosen = [row for row in rows if row.problem == problem]
        extra = [n for n in chosen[0].final if n not in ("training_loss", "objective")]
        columns = [
            "", "seeds", "training loss", "over base: mean", "of means", "worst",
            "f", "f over base", "f over base: worst", "steps to base's loss",
            *(name.replace("_", " ") for name in extra),
            "ms a step", "accelerated / rejected",
        ]  # fmt: skip
        lines += [f"## {problem}", "", "| " + " | ".join(columns) + " |"]
        lines += ["|" + "---|" * len(columns)]
        for row in chosen:
            cells = [
                row.contender,
                f"{row.seeds}" + (f", {row.diverged} diverged" if row.diverged else ""),
                _number(row.final["training_loss"]),
                *(_ratio(r) for r in (row.mean_of_ratios, row.ratio_of_means, row.worst_ratio)),
                _number(row.final["objective"]),
                *(_ratio(r) for r in (row.objective_ratio, row.worst_objective_ratio)),
                _steps(row),
                *(_number(row.final[name], name.endswith("accuracy")) for name in extra),
                f"{1000 * row.seconds_per_step:.2f}",
                _counters(row.counters),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _row(problem: str, contender: str, runs: list[Run], base: dict[Any, Run]) -> Row:
    finals: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run["final"].items():
            finals.setdefault(name, []).append(math.inf if value is None else value)
    paired = [(run, base[problem, run["seed"]]) for run in runs if (problem, run["seed"]) in base]
    fs = [_over(_final(run, "objective"), _final(other, "objective")) for run, other in paired]
    ours = [_loss(run) for run, _ in paired]
    theirs = [_loss(other) for _, other in paired]
    ratios = [_over(a, b) for a, b in zip(ours, theirs, strict=True)]
    reached = [steps_to(run, _loss(other)) for run, other in paired]
    steps = [step for step in reached if step is not None]
    return Row(
        problem=problem,
        contender=contender,
        seeds=len(runs),
        diverged=sum(run["diverged"] is not None for run in runs),
        final={name: Mean.of(values) for name, values in finals.items()},
        mean_of_ratios=float(np.mean(ratios)) if ratios else None,
        ratio_of_means=_over(sum(ours), sum(theirs)) if ratios else None,
        worst_ratio=max(ratios) if ratios else None,
        objective_ratio=float(stats.gmean(fs)) if fs else None,
        worst_objective_ratio=max(fs) if fs else None,
        steps_to_base=float(np.mean(steps)) if steps else None,
        reached=len(steps),
        seconds_per_step=float(np.mean([run["seconds_per_step"] for run in runs])),
        counters=_sum_counters(runs),
    )


def _loss(run: Run) -> float:
    return _final(run, "training_loss")


def _final(run: Run, metric: str) -> float:
    value = run["final"][metric]
    return math.inf if value is None else value


def _over(ours: float, theirs: float) -> float:
    if math.isinf(ours):
        return math.inf
    return ours / theirs if theirs > 0 else (1.0 if ours == theirs else math.inf)


def _sum_counters(runs: list[Run]) -> dict[str, int]:
    kept = [run["anderson"] for run in runs if run["anderson"] is not None]
    if not kept:
        return {}
    counters = {name: sum(one[name] for one in kept) for name in ("accelerated", "averaged")}
    return counters | {"rejected": sum(sum(one["rejected"].values()) for one in kept)}


def _about(head: dict[str, Any]) -> list[str]:
    if not head:
        return []
    machine = head["machine"]
    ranks = head["conditions"]["ranks"]
    return [
        f"{ranks} ranks on {machine['cores']} cores ({machine['processor']}, "
        f"{machine['memory_gib']} GiB), Horovod {machine['horovod']} on {machine['controller']}, "
        f"torch {machine['torch']}, Python {machine['python']}; last run {head['date']}.",
        "",
        "Means over seeds ± 95 % bands. \"Over base\" is the final training loss over the base "
        "optimizer's: mean of the seeds' ratios, ratio of the means, worst seed. f is the "
        "objective that is minimised: training loss + (weight decay/2) ||w||^2; \"f over base\" "
        "is the geometric mean of the seeds' ratios. Steps are means over the seeds that got "
        "there, with their number.",
    ]  # fmt: skip


def _number(mean: Mean, percent: bool = False) -> str:
    if math.isinf(mean.value):
        return "not finite"
    value, band, form = mean.value, mean.band, ".3g"
    if percent:
        value, band, form = 100 * value, 100 * band, ".2f"
    text = f"{value:{form}}" + (
        "" if math.isnan(band) else f" ± {band:{'.2f' if percent else '.1g'}}"
    )
    return text + (" %" if percent else "")


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _steps(row: Row) -> str:
    if row.mean_of_ratios is None:
        return "-"
    if row.steps_to_base is None:
        return f"never (0 of {row.seeds})"
    return f"{row.steps_to_base:.0f} ({row.reached} of {row.seeds})"


def _counters(counters: dict[str, int]) -> str:
    return f"{counters['accelerated']} / {counters['rejected']}" if counters else "-"
