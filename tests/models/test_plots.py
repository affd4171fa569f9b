"""Plots are drawn of whatever there is, without a warning, and show what happened."""

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
from launching import ROOT

from models import demo, plots
from models.demo import Run
from models.metrics import MetricsLog
from models.plots import plot_training, training_title
from models.settings import Settings


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """The axes of each figure, as they are saved. Warnings are errors."""
    found = []
    panels = plots.panels

    @contextlib.contextmanager
    def watched(*arguments):
        with panels(*arguments) as axes:
            found.append(axes)
            yield axes

    for module in (plots, demo):
        monkeypatch.setattr(module, "panels", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def steps(losses):
    return [{"step": n, "loss": x, "top1": 0.5, "lr": 0.1} for n, x in enumerate(losses, 1)]


def epochs(losses):
    return [{"step": n, "val_loss": x, "val_top1": 0.5, "val_top5": 1.0}
            for n, x in enumerate(losses, 1)]  # fmt: skip


def plotted(folder, rows, validated, title="a title"):
    log = MetricsLog(folder, tensorboard=False, say=print)
    for kind, some in (("steps", rows), ("epochs", validated)):
        (folder / f"{kind}.csv").write_text("step\n")
        for row in some:
            log.write(kind, row)
    log.close()
    path = plot_training(folder, title)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("losses", "validation", "scale"),
    [
        ([2.0], [], "linear"),
        ([2.0], [3.0], "linear"),
        ([2.0] * 30, [2.0, 2.0], "linear"),
        ([2.0, 1.0, 0.2], [], "log"),
        ([0.0], [0.0], "linear"),
        ([1.0, 0.0, 0.1], [0.0], "log"),
        ([float("nan")], [float("inf")], "linear"),
        ([1.0, 1e-30], [1e30], "log"),
        ([], [], "linear"),
    ],
)
def test_whatever_was_measured_is_drawn(tmp_path, figures, losses, validation, scale):
    plotted(tmp_path, steps(losses), epochs(validation))
    loss, _, rate = figures[0]
    assert loss.get_yscale() == scale
    if losses:
        expected = ["training"] + ["validation"] * bool(validation)
        assert labels(loss) == expected, "only what is there"
        assert len(rate.get_lines()) == 1
        alone = len(losses) == 1
        assert not alone or loss.get_lines()[0].get_marker() == "o", "a line of one point is none"


@pytest.mark.parametrize(
    "name",
    ["digits", "a $x$ and $\\frac{", "数据 \U0001f642", "x" * 300, "a\nb\tc", "caf\udce9", "é_^"],
)
def test_the_title_says_what_was_trained(tmp_path, figures, name):
    settings = Settings(data=f"/data/{name}", model="resnet20", anderson="paper")
    title = training_title(settings, 4)
    assert "resnet20 on " in title and "4 ranks, Anderson acceleration as in the paper" in title
    assert len(title) < 120 and title.isprintable()
    plotted(tmp_path, steps([2.0, 1.0]), [], title)
    assert figures[0][0].figure.get_suptitle() == title
    assert "1 rank, no acceleration" in training_title(Settings(data="d", anderson="off"), 1)


def test_settings_of_the_user_for_other_plots_do_not_matter(tmp_path):
    """Fonts that are not there, and TeX that may not be."""
    (tmp_path / "matplotlibrc").write_text(
        "font.family: No Such Font\ntext.usetex: True\nfigure.autolayout: True\n"
    )
    program = (
        "import sys; from pathlib import Path; from models.plots import draw, panels\n"
        "with panels(Path(sys.argv[1]), 'a title', 11) as axes:\n"
        "    draw(axes[0], [1, 2], [1.0, 2.0], label='training')\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, tmp_path / "x.png"],
        cwd=ROOT, env=dict(os.environ, MATPLOTLIBRC=str(tmp_path)), text=True, capture_output=True,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "") and (tmp_path / "x.png").exists()


@pytest.mark.parametrize("validated", [[], epochs([0.5])])
def test_the_demo_marks_accepted_and_rejected_steps(tmp_path, figures, validated):
    counts = [(0, 0), (1, 0), (1, 1), (1, 1), (2, 1), (2, 2)]
    losses = [4.0, 3.0, 2.0, 1.5, 1.0, 0.5]
    base = [row | {"seconds": 0.5} for row in steps(losses)]
    rows = [
        row | {"aa_accelerated": a, "aa_rejected": r}
        for row, (a, r) in zip(base, counts, strict=True)
    ]
    runs = {"off": Run(steps=base, epochs=validated, summary={}),
            "default": Run(steps=rows, epochs=validated, summary={})}  # fmt: skip
    demo._plot(runs, tmp_path / "comparison.png")
    by_step = figures[0][0]
    marked = {line.get_label(): list(line.get_xdata()) for line in by_step.get_lines()}
    assert marked["acceleration accepted, 2 times"] == [2, 5]
    assert marked["acceleration rejected, 2 times"] == [3, 6]
    assert labels(by_step)[2:] == [name for name in marked if "acceleration" in name]
