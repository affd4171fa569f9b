"""Reports of a training: at the start, row by row, and at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.data import ImageList
from models.engine import Averaged, Interval, Trainer, Validation
from models.metrics import read_csv
from models.options import dashed, shown
from models.output import SETTINGS, SUMMARY, SUMMARY_TEXT
from models.settings import Settings

IN_THE_OPENING = {"data", "model", "loader", "batch_size", "epochs", "optimizer", "anderson"}
"""Settings that the main lines of `opening` show, whether they are defaults or not."""


def opening(
    settings: Settings,
    trainer: Trainer,
    train: ImageList,
    val: ImageList,
    *,
    ranks: int,
    steps_per_epoch: int,
) -> str:
    """Describes the training, with a line for each setting that is not the default."""
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    batches = ranks * settings.accumulate
    what = {
        "model": f"{settings.model}, {count:,} parameters",
        "data": f"{settings.data}: {len(train):,} training and {len(val):,} validation images of "
        f"{_count(len(train.classes), 'class', 'classes')}, read by {settings.loader}",
        "ranks": f"{_count(ranks, 'rank')} on {trainer.device.type}, batch {settings.batch_size} x "
        f"{batches} = {settings.batch_size * batches:,}",
        "steps": f"{_count(settings.epochs, 'epoch')} of {_count(steps_per_epoch, 'step')}",
        "optimizer": settings.optimizer,
        "acceleration": settings.anderson
        + (": Horovod's own optimizer" if settings.anderson == "off" else ""),
    }
    width = max(map(len, what))
    lines = [f"{name:<{width}}  {text}" for name, text in what.items()]
    changed = {
        dashed(name): (shown(value), shown(default))
        for name, (value, default) in settings.changed().items()
        if name not in IN_THE_OPENING
    }
    if changed:
        where = Path(settings.out) / SETTINGS
        lines.append(f"settings that are not the defaults (all are in {where}):")
    names = max(map(len, changed), default=0)
    values = max((len(value) for value, _ in changed.values()), default=0)
    for name, (value, default) in changed.items():
        lines.append(f"  {name:<{names}}  {value:<{values}}  (default: {default})")
    return "\n".join(lines)


def step_row(interval: Interval, epoch: int, stats: Any) -> dict[str, Any]:
    """Returns a row of steps.csv.

    Args:
        interval: The measurements.
        epoch: Their epoch, counted from 1.
        stats: The optimizer's ``anderson.stats``; None without acceleration.
    """
    row = {
        "step": interval.step,
        "epoch": epoch,
        "lr": interval.lr,
        "loss": interval.loss,
        "top1": interval.top1,
        "images_per_s": interval.images / interval.seconds,
        "seconds": interval.seconds,
        "data_seconds": interval.data_seconds,
    }
    if stats is not None:
        row |= {
            "aa_stored": stats.stored,
            "aa_accelerated": stats.accelerated,
            "aa_rejected": sum(stats.rejected.values()),
            "aa_averaged": stats.averaged,
            "aa_promised_reduction": stats.promised_reduction,
            "aa_condition": stats.condition,
            "aa_seconds": sum(stats.seconds.values()),
        }
    return row


def epoch_row(
    interval: Interval,
    epoch: int,
    validation: Validation,
    averaged: Averaged | None,
    *,
    averages: bool,
) -> dict[str, Any]:
    """Returns a row of epochs.csv.

    Args:
        interval: The epoch's last interval.
        epoch: The finished epoch, counted from 1.
        validation: Validation at the weights themselves.
        averaged: Validation at an average of the weights; None if none is better.
        averages: Whether averages are measured.
    """
    row: dict[str, Any] = {"step": interval.step, "epoch": epoch, "train_loss": interval.loss}
    row |= {f"val_{name}": value for name, value in asdict(validation).items()}
    if averages:
        kind, found = averaged if averaged is not None else (None, None)
        row |= {
            "averaged_weights": kind,
            "averaged_val_loss": found and found.loss,
            "averaged_val_top1": found and found.top1,
        }
    return row


def epoch_text(
    settings: Settings,
    interval: Interval,
    epoch: int,
    validation: Validation,
    averaged: Averaged | None,
    *,
    measured_anew: bool,
) -> str:
    """Returns the text on an epoch that was validated; see `epoch_row`."""
    text = (
        f"epoch {epoch}/{settings.epochs}: training loss {interval.loss:.4g}, "
        f"validation loss {validation.loss:.4g}, top-1 {validation.top1:.2%}, "
        f"top-5 {validation.top5:.2%}"
    )
    if measured_anew:
        text += " (batch-norm statistics measured anew)"
    if averaged is not None:
        text += (
            f"\n    at averaged weights ({average_name(averaged[0])}): validation loss "
            f"{averaged[1].loss:.4g}, top-1 {averaged[1].top1:.2%}"
        )
    return text


def average_name(kind: float) -> str:
    """Returns the name of an average, given its entry in `AndersonConfig.averages`."""
    return f"running average, decay factor {kind:g}"


def summarize(
    settings: Settings,
    trainer: Trainer,
    totals: Mapping[str, float],
    training_loss: float | None,
    validation: Validation,
    averaged: Averaged | None,
    best: float,
    *,
    ranks: int,
    averages: bool,
    measured_anew: bool,
) -> dict[str, Any]:
    """Returns the numbers of a finished training.

    Args:
        settings: Settings of the training.
        trainer: The trainer at the end.
        totals: Sums over the intervals: "seconds", "data_seconds", "steps" and "images". Zeros
            where nothing is known.
        training_loss: Loss of the last interval; None if it is not known.
        validation: Validation at the weights themselves.
        averaged: Validation at an average of the weights; None if none is better, or if it was not
            measured.
        best: Largest top-1 accuracy of all validations, 0 to 1.
        ranks: Number of ranks.
        averages: Whether averages of the weights were measured.
        measured_anew: Whether the batch-norm statistics were measured anew.
    """
    summary: dict[str, Any] = {
        "model": settings.model,
        "optimizer": settings.optimizer,
        "anderson": settings.anderson,
        "loader": settings.loader,
        "ranks": ranks,
        "device": trainer.device.type,
        "epochs": settings.epochs,
        "steps": trainer.step,
        "training_loss": training_loss,
        "batch_norm_statistics": "measured anew" if measured_anew else "running averages",
        "validation_loss": validation.loss,
        "validation_top1": validation.top1,
        "validation_top5": validation.top5,
        "best_validation_top1": best,
        "training_seconds": totals["seconds"],
        "waiting_for_data_seconds": totals["data_seconds"],
    }
    if totals["steps"]:
        summary |= {
            "ms_per_step": 1000 * totals["seconds"] / totals["steps"],
            "images_per_second": totals["images"] / totals["seconds"],
        }
    if averaged is not None:
        summary |= {
            "averaged_weights": average_name(averaged[0]),
            "averaged_validation_loss": averaged[1].loss,
            "averaged_validation_top1": averaged[1].top1,
        }
    elif averages:
        summary["averaged_weights"] = "none is better on the training images"
    stats = trainer.stats
    if stats is not None:
        seconds = sum(stats.seconds.values())
        summary["acceleration"] = {
            "stored": stats.stored,
            "accelerated": stats.accelerated,
            "averaged": stats.averaged,
            "rejected": dict(stats.rejected),
            "resets": dict(stats.resets),
            "history_bytes_on_rank_0": trainer.optimizer.anderson.history_bytes,
        }
        if seconds:  # timers are not in a checkpoint
            summary["acceleration"] |= {
                "seconds": seconds,
                "seconds_of": dict(stats.seconds),
                "percent_of_training_time": 100 * seconds / totals["seconds"],
            }
    return summary


def totals_of(folder: Path) -> tuple[float | None, dict[str, float]]:
    """Reads steps.csv: the last training loss, and the sums for `summarize`."""
    path = folder / "steps.csv"
    rows = read_csv(path) if path.exists() else []
    totals = {"seconds": 0.0, "data_seconds": 0.0, "steps": 0.0, "images": 0.0}
    for row in rows:
        totals["seconds"] += row["seconds"]
        totals["data_seconds"] += row["data_seconds"]
        totals["steps"] = row["step"]
        totals["images"] += row["images_per_s"] * row["seconds"]
    return (rows[-1]["loss"] if rows else None), totals


def summary_text(summary: dict[str, Any]) -> str:
    """Returns one "name  value" line per entry; counts of 0 are left out.

    Args:
        summary: Numbers, strings, and dicts of them.
    """
    lines = list(_lines(summary))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes ``summary.json`` and ``summary.txt`` into `folder`."""
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    (folder / SUMMARY_TEXT).write_text(summary_text(summary) + "\n")


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


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
