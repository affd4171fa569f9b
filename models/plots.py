"""Plots measurements as PNG files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models.metrics import read_csv
from models.output import PLOT
from models.settings import Settings

Rows = Sequence[dict[str, float]]

_FONT = "DejaVu Sans"  # comes with matplotlib
_FEW = 10  # a line of at most so many points has markers


@contextlib.contextmanager
def panels(path: Path, title: str, width: float) -> Iterator[Any]:
    """Yields three axes side by side to draw in, and saves the figure at the end.

    Args:
        path: The PNG file to write.
        title: Title of the figure.
        width: Width of the figure in inches.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    # A font or TeX that a user has set for other plots may lack characters or programs.
    with matplotlib.style.context("default"), matplotlib.rc_context({"font.family": _FONT}):
        figure = Figure(figsize=(width, 3.8), layout="constrained")
        axes = figure.subplots(1, 3)
        yield axes
        for one in axes:
            one.grid(alpha=0.3)
            if one.get_xlabel() == "step":
                one.xaxis.get_major_locator().set_params(integer=True)
            if one.get_legend_handles_labels()[0]:
                one.legend(fontsize="small")
        figure.suptitle(title, fontsize="medium", parse_math=False)
        figure.savefig(path, dpi=150)


def draw(axes: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draws a line, with markers if its points are few. Without points it draws nothing."""
    if len(y):
        marked = {"marker": "o", "markersize": 3} if len(y) <= _FEW else {}
        axes.plot(x, y, **marked | style)


def on_log_scale(axes: Any) -> None:
    """Makes the y axis logarithmic if the positive values span a factor of 10 or more."""
    values = [float(y) for line in axes.get_lines() for y in line.get_ydata()]
    positive = [y for y in values if y > 0 and math.isfinite(y)]
    if positive and max(positive) >= 10 * min(positive):
        axes.set_yscale("log", nonpositive="mask")


def plot_training(folder: Path, title: str) -> Path:
    """Draws loss, accuracy and learning rate from the CSV files of `folder`.

    Args:
        folder: Folder of a training with ``steps.csv`` and ``epochs.csv``.
        title: See `training_title`.

    Returns:
        The PNG's path.
    """
    steps, epochs = read_csv(folder / "steps.csv"), read_csv(folder / "epochs.csv")
    path = folder / PLOT
    with panels(path, title, 11) as (loss, accuracy, rate):
        marks: Any = {"marker": "o", "markersize": 3}
        draw(loss, *_columns(steps, "loss"), label="training")
        draw(loss, *_columns(epochs, "val_loss"), label="validation", **marks)
        loss.set(xlabel="step", ylabel="loss")
        on_log_scale(loss)
        draw(accuracy, *_columns(steps, "top1", 100), label="training")
        for name in ("top1", "top5"):
            label = f"validation, {name}"
            draw(accuracy, *_columns(epochs, f"val_{name}", 100), label=label, **marks)
        accuracy.set(xlabel="step", ylabel="accuracy / %")
        draw(rate, *_columns(steps, "lr"))
        rate.set(xlabel="step", ylabel="learning rate")
    return path


def training_title(settings: Settings, ranks: int) -> str:
    """Returns model, data, ranks and acceleration as a one-line title."""
    data = Path(settings.data).resolve().name or settings.data
    many = "1 rank" if ranks == 1 else f"{ranks:,} ranks"
    acceleration = "no acceleration" if settings.anderson == "off" else "Anderson acceleration"
    if settings.anderson == "paper":
        acceleration += " as in the paper"
    return _drawable(f"{settings.model} on {_short(data)}, {many}, {acceleration}")


def _columns(rows: Rows, name: str, factor: float = 1) -> tuple[list[float], list[float]]:
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [factor * row[name] for row in having]


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _drawable(text: str) -> str:
    """Replaces characters that the font lacks; matplotlib would warn about them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in text)
