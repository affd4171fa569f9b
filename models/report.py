"""What a finished training leaves for its user: a summary and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.metrics import read_csv


def summary_text(summary: dict[str, Any]) -> str:
    """One "name  value" line per entry; counts of what never happened are left out.

    Args:
        summary: Numbers, strings, and dicts of them.
    """
    lines = list(_lines(summary))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes ``summary.json`` and ``summary.txt`` into `folder`."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "summary.txt").write_text(summary_text(summary) + "\n")


def plot_training(folder: Path) -> Path:
    """Draws loss, accuracy and learning rate from the CSV files of `folder`.

    Returns:
        The PNG's path.
    """
    from matplotlib.figure import Figure

    steps, epochs = read_csv(folder / "steps.csv"), read_csv(folder / "epochs.csv")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    validated = [row for row in epochs if "val_loss" in row]

    loss.semilogy([r["step"] for r in steps], [r["loss"] for r in steps], label="training")
    loss.semilogy([r["step"] for r in validated], [r["val_loss"] for r in validated],
                  "o-", markersize=3, label="validation")  # fmt: skip
    loss.set(xlabel="step", ylabel="loss")
    loss.legend()
    accuracy.plot([r["step"] for r in steps], [100 * r["top1"] for r in steps], label="training")
    for name in ("top1", "top5"):
        accuracy.plot([r["step"] for r in validated], [100 * r[f"val_{name}"] for r in validated],
                      "o-", markersize=3, label=f"validation, {name}")  # fmt: skip
    accuracy.set(xlabel="step", ylabel="accuracy / %")
    accuracy.legend()
    rate.plot([r["step"] for r in steps], [r["lr"] for r in steps])
    rate.set(xlabel="step", ylabel="learning rate")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    path = folder / "training.png"
    figure.savefig(path, dpi=150)
    return path


def _lines(summary: dict[str, Any], prefix: str = "") -> Any:
    for name, value in summary.items():
        name = prefix + name.replace("_", " ")
        if isinstance(value, dict):
            yield from _lines(value, f"{name}: ")
        elif prefix and not value:
            continue
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        elif value is not None:
            yield name, str(value)
