"""Curves over steps: means over seeds with 95 % bands, like Figures 1 to 4 of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.convergence.plan import family
from benchmarks.convergence.results import Key, Run
from benchmarks.convergence.summary import CONTENDER_ORDER, mean_and_band, with_averaged
from models.problems import PROBLEMS

COLOURS = dict(
    zip(
        CONTENDER_ORDER,
        ("gray", "green", "olive", "orange", "red", "blue", "purple"),
        strict=True,
    )
)
IN_PAPER = ("admissions", "burgers2d", "burgers100d")
LABELS = {
    "loss": "training loss",
    "training_loss": "training loss",
    "objective": "f",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy / %",
    "error": "error of the solution",
}


def plot_all(runs: dict[Key, Run], folder: Path) -> list[Path]:
    """Writes PROBLEM.png for every problem that has runs, and returns their paths."""
    every = with_averaged(runs.values())
    written = []
    for problem in PROBLEMS:
        chosen = [run for run in every if run["problem"] == problem]
        if chosen:
            written.append(_plot(problem, chosen, folder / f"{problem}.png"))
    return written


def _plot(problem: str, runs: list[Run], path: Path) -> Path:
    from matplotlib.figure import Figure

    names = _panels(problem, runs[0])
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for contender in CONTENDER_ORDER:
            own = [run for run in runs if run["contender"] == contender]
            if own:
                _draw(axes, own, name, contender)
        if not name.endswith("accuracy"):
            axes.set_yscale("log")
        is_mse = problem in IN_PAPER and name == "validation_loss"
        axes.set(xlabel="step", ylabel="validation MSE" if is_mse else LABELS[name])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(problem)
    figure.savefig(path, dpi=120)
    return path


def _panels(problem: str, run: Run) -> list[str]:
    """The paper shows validation MSE for its PINNs and its MLP, and accuracy for its ResNet."""
    first = "loss" if run["full_batch"] else "training_loss"
    if family(problem) in IN_PAPER:
        return [first, "validation_loss"]
    wanted = "validation_accuracy" if family(problem) == "digits_resnet" else "validation_loss"
    return [first, wanted] if wanted in run["metrics"] else [first]


def _draw(axes: Any, runs: list[Run], name: str, contender: str) -> None:
    # A run that diverged has fewer points. The mean is over all runs, so the curve ends there.
    curves = [_curve(run, name) for run in runs]
    steps = max((curve[0] for curve in curves), key=len)
    values = np.full((len(steps), len(runs)), np.nan)
    for i, (_, curve) in enumerate(curves):
        values[: len(curve), i] = curve
    mean, band = mean_and_band(values)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    if name.endswith("accuracy"):
        mean, band = 100 * mean, 100 * band
    diverged = sum(run["diverged"] is not None for run in runs)
    label = contender + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")
    colour = f"tab:{COLOURS[contender]}"
    axes.plot(steps, mean, color=colour, label=label, linewidth=1.3)
    if np.isfinite(band).any():
        # On a logarithmic axis a band that reaches 0 would stretch the axis.
        low = np.maximum(mean - band, 0.1 * mean)
        axes.fill_between(
            steps, low, mean + band, color=f"tab:{COLOURS[contender]}", alpha=0.2, lw=0
        )


def _curve(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "loss" and run["full_batch"]:
        values = run["loss"]["values"]
        steps = run["loss"]["stride"] * np.arange(len(values))
    else:
        values = run["metrics"]["training_loss" if name == "loss" else name]
        steps = np.array(run["marks"])
    return steps, np.array([np.nan if value is None else value for value in values])
