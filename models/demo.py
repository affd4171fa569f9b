"""Trains on real images with and without acceleration, without a download: ``make demo``.

Writes scikit-learn's handwritten digits as a folder of JPEGs. Then trains the same small ResNet on
two ranks twice, from the same weights on the same batches: with Horovod's own optimizer, and with
this package's. Prints a table and draws a plot of the measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.data import write_digits
from models.data.digits import TRAIN_IMAGES, VAL_IMAGES
from models.errors import UserError
from models.metrics import read_csv
from models.plots import draw, on_log_scale, panels

RUNS = {"off": "Horovod's own", "default": "Anderson"}
TAG = re.compile(r"\[\d+(?:,\d+)?\]<std(?:out|err)>:")

# One batch is the whole training set, always the same. So the residual-norm method is at work, the
# paper's. With small batches it would be the subspace method.
OPTIONS = {
    "loader": "dali",
    "model": "resnet8",
    "width": 8,
    "channels": 1,
    "image-size": 16,
    "resize": 16,
    "augment": "none",
    "shuffle": "once",
    "workers": 1,
    # The best of 0.1, 0.3 and 0.6 for the baseline: as accurate as 0.1, with a lower loss. With
    # 0.6 the accuracy is 1 % lower.
    "optimizer": "nesterov",
    "momentum": 0.9,
    "lr": 0.3,
    "weight-decay": 1e-4,
    "warmup-epochs": 0,
    "decay": "none",
    "validate-every": 10,
    # In both runs, so that both are validated alike.
    "recalibrate": "always",
    "log-every": 1,
    "checkpoint-every": 50,
}
# The demo owns its folders: a second demo begins anew.
FLAGS = ("--channels-last", "--no-tensorboard", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of one training, read from its folder."""

    steps: list[dict[str, float]]
    epochs: list[dict[str, float]]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads the files of a finished training."""
        return cls(
            steps=read_csv(folder / "steps.csv"),
            epochs=[row for row in read_csv(folder / "epochs.csv") if "val_loss" in row],
            summary=json.loads((folder / "summary.json").read_text()),
        )

    @property
    def seconds(self) -> list[float]:
        """Wall-clock time of the training at the end of each step."""
        total, times = 0.0, []
        for row in self.steps:
            total += row["seconds"]
            times.append(total)
        return times

    @property
    def ms_per_step(self) -> float:
        """Mean wall-clock time, without the first step, which sets everything up."""
        times = self.seconds
        return 1000 * (times[-1] - times[0]) / (len(times) - 1)

    def where_grows(self, counter: str) -> list[dict[str, float]]:
        """The rows of the steps in which a counter of the acceleration increased."""
        before = [0.0, *(row[counter] for row in self.steps)]
        return [row for row, was in zip(self.steps, before, strict=False) if row[counter] > was]

    def first_below(self, loss: float) -> int | None:
        """Index of the first step with a training loss of at most `loss`; None if there is none."""
        return next((i for i, row in enumerate(self.steps) if row["loss"] <= loss), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; see the module's text.

    Returns:
        Exit code: 0, 2 for wrong input, or that of a training that failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.demo", description=__doc__.split("\n\n", 1)[1]
    )
    parser.add_argument("--out", default="runs/demo", help="folder to write (default: runs/demo)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default: 2)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    out = Path(options.out)
    try:
        if options.ranks < 1 or TRAIN_IMAGES % options.ranks:
            raise UserError(f"--ranks is {options.ranks}, must divide {TRAIN_IMAGES} images")
        if options.steps < 2:
            raise UserError(f"--steps is {options.steps}, must be at least 2")
        launch, launcher = _launcher(options.ranks)
        digits = write_digits(out / "digits")
    except (UserError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device, where = _device(options.ranks)
    print(
        f"1,797 handwritten digits as JPEGs in {digits}; {options.ranks} ranks, {launcher}, "
        f"{where}\n"
        f"Two trainings of {options.steps} steps each; a step sees all {TRAIN_IMAGES:,} training "
        "images."
    )
    runs = {}
    for anderson, title in RUNS.items():
        print(f"\n== {title} optimizer", flush=True)
        folder = out / anderson
        settings = OPTIONS | {
            "data": digits,
            "out": folder,
            "anderson": anderson,
            "device": device,
            "epochs": options.steps,
            "batch-size": TRAIN_IMAGES // options.ranks,
        }
        command = [*launch, sys.executable, "-m", "models.train", *FLAGS]
        command += [f"--{name}={value}" for name, value in settings.items()]
        code = _follow(command)
        if code:
            print(f"error: the training ended with exit code {code}", file=sys.stderr)
            return code
        runs[anderson] = Run.read(folder)
    table = _table(runs["off"], runs["default"])
    (out / "comparison.txt").write_text(table + "\n")
    plot = _plot(runs, out / "comparison.png")
    print(f"\n{table}\n\nplot: {plot}\ntotal: {time.perf_counter() - started:.0f} s")
    return 0


def _device(ranks: int) -> tuple[str, str]:
    """Returns the device, one GPU per rank or the CPU, and a description for the user."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus >= ranks:
        return "cuda", "a GPU each"
    few = f", since there {'is one GPU' if gpus == 1 else f'are {gpus} GPUs'} for them"
    return "cpu", f"on the processor{few if gpus else ''}"


def _launcher(ranks: int) -> tuple[list[str], str]:
    """The command that starts the ranks, and its name for the user."""
    import horovod.torch as hvd

    # horovodrun and mpirun lie beside this Python in a virtual environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    horovodrun = shutil.which("horovodrun")
    if horovodrun is None:
        raise UserError("horovodrun is not on PATH: is Horovod installed in this environment?")
    mpi = hvd.mpi_built() and shutil.which("mpirun") is not None
    kind = "mpi" if mpi else "gloo"
    why = "" if mpi else ", since there is no mpirun or Horovod was built without MPI"
    return [horovodrun, "-np", str(ranks), f"--{kind}"], f"horovodrun on {kind.upper()}{why}"


def _follow(command: list[str]) -> int:
    """Runs a command and passes its output on, without the launcher's tags around each line."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print("  " + TAG.sub("", line.rstrip()), flush=True)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _table(base: Run, anderson: Run) -> str:
    target = base.steps[-1]["loss"]
    reached = anderson.first_below(target)
    stats = anderson.summary["acceleration"]
    slower = 100 * (anderson.ms_per_step / base.ms_per_step - 1)
    never = f"not in {len(anderson.steps)}"
    rejected = sum(stats["rejected"].values())
    averaged = anderson.summary.get("averaged_validation_top1")

    def both(form: str, key: str) -> tuple[str, str]:
        return form.format(base.summary[key]), form.format(anderson.summary[key])

    rows = [
        ("", *RUNS.values()),
        ("validation accuracy", *both("{:.2%}", "validation_top1")),
        ("validation accuracy at averaged weights", "-", "none better" if averaged is None
         else f"{averaged:.2%}"),
        ("validation loss", *both("{:.4f}", "validation_loss")),
        ("training loss", *both("{:.3e}", "training_loss")),
        (
            "steps to the baseline's final training loss",
            str(len(base.steps)),
            never if reached is None else str(reached + 1),
        ),
        (
            "seconds to it",
            f"{base.seconds[-1]:.1f}",
            "-" if reached is None else f"{anderson.seconds[reached]:.1f}",
        ),
        ("training seconds", *both("{:.1f}", "training_seconds")),
        ("ms per step", f"{base.ms_per_step:.0f}", f"{anderson.ms_per_step:.0f}"),
        ("AA's own time, of training time", "-", f"{stats['percent_of_training_time']:.2f} %"),
        ("wall-clock per step, against the baseline's", "-", f"{slower:+.1f} %"),
        ("accelerated / rejected / averaged steps", "-",
         f"{stats['accelerated']} / {rejected} / {stats['averaged']}"),
        ("history on a rank", "-", f"{stats['history_bytes_on_rank_0'] / 1e6:.2f} MB"),
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}"
        for name, left, right in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        f"One of the {VAL_IMAGES} validation images is {1 / VAL_IMAGES:.2%}. AA's own time is "
        "measured inside its run;",
        "wall-clock compares two successive runs, so it includes other work on the machine.",
    ]
    return "\n".join(lines)


def _plot(runs: dict[str, Run], path: Path) -> Path:
    batch = f"full batch of {TRAIN_IMAGES:,} images"
    title = f"resnet8 on scikit-learn's digits, {batch}, Nesterov, lr {OPTIONS['lr']}"
    with panels(path, title, 12) as (by_step, by_time, accuracy):
        for (anderson, run), colour in zip(runs.items(), ("tab:gray", "tab:red"), strict=True):
            losses = [row["loss"] for row in run.steps]
            style = {"color": colour, "label": RUNS[anderson]}
            draw(by_step, [row["step"] for row in run.steps], losses, **style)
            draw(by_time, run.seconds, losses, **style)
            draw(accuracy, [row["step"] for row in run.epochs],
                 [100 * row["val_top1"] for row in run.epochs],
                 marker="o", markersize=3, **style)  # fmt: skip
        for counter, name, marks in (
            ("aa_accelerated", "accepted", {"marker": "^", "color": "tab:blue"}),
            ("aa_rejected", "rejected", {"marker": "x", "color": "black"}),
        ):
            rows = runs["default"].where_grows(counter)
            draw(by_step, [row["step"] for row in rows], [row["loss"] for row in rows],
                 linestyle="", markersize=4, label=f"acceleration {name}, {len(rows)} times",
                 **marks)  # fmt: skip
        target = runs["off"].steps[-1]["loss"]
        for axes in (by_step, by_time):
            axes.axhline(target, color="tab:gray", linestyle=":", linewidth=1)
            on_log_scale(axes)
        by_step.set(xlabel="step", ylabel="training loss")
        by_time.set(xlabel="training time / s", ylabel="training loss")
        accuracy.set(xlabel="step", ylabel="validation accuracy / %")
    return path


if __name__ == "__main__":
    sys.exit(main())
