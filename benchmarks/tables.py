"""Makes the tables of README and docs from the files in benchmarks/results.

python -m benchmarks.tables            # writes them anew
python -m benchmarks.tables --check    # says which are not what the results say; exit code 1

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import host
from benchmarks.cost import overhead, step_time
from benchmarks.gpu import parts as gpu_parts
from benchmarks.minibatch import table as minibatch
from benchmarks.report import table
from benchmarks.simulate import words

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("cost", "when-does-it-pay")))
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
H100 = "gpu-nvidia-h100-80gb-hbm3"
DIVERGED = "∞"

# Rows of the tables of convergence: their names, and the problem in its file.
PROBLEMS = {
    "quadratic, condition 1e4; SGD": "quadratic",
    "logistic regression, breast cancer; SGD": "logistic_cancer-sgd",
    "the same; Nesterov 0.9": "logistic_cancer-nesterov",
    "softmax regression, digits; Nesterov 0.9": "logistic_digits",
    "digits MLP, full batch; SGD": "digits_mlp-full-sgd",
    "full batch; Nesterov 0.9": "digits_mlp-full-nesterov",
    "full batch; Adam": "digits_mlp-full-adam",
    "full batch; Neumann": "digits_mlp-full-neumann",
    "batch 500; SGD": "digits_mlp-500-sgd",
    "batch 500; Nesterov 0.9": "digits_mlp-500-nesterov",
    "batch 500; Adam": "digits_mlp-500-adam",
    "batch 500; Neumann": "digits_mlp-500-neumann",
    "batch 100; SGD": "digits_mlp-100-sgd",
    "batch 100; Nesterov 0.9": "digits_mlp-100-nesterov",
    "batch 100; Adam": "digits_mlp-100-adam",
    "batch 100; Neumann": "digits_mlp-100-neumann",
    "batch 32, 800 steps; Nesterov 0.9, lr 0.2": "digits_mlp-32-nesterov",
    "digits ResNet8, batch 32; as configured": "digits_resnet-32",
    "the same, full batch": "digits_resnet-full",
    "graduate admissions, batch 40; Adam": "admissions",
    "Burgers PINN, 2d, tanh; Adam": "burgers2d",
    "Burgers PINN, 2d, ReLU; Adam": "burgers2d-relu",
    "Burgers PINN, 100d, 200 steps; Adam": "burgers100d",
}
BASES = {"SGD, lr 0.5": "sgd", "SGD, lr 0.1, Nesterov 0.9": "nesterov", "Adam, lr 2e-3": "adam"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = [name for name in DOCUMENTS if not _written(ROOT / name, options.check)]
    for name in stale:
        print(f"{name}: {'not what the results say' if options.check else 'written anew'}")
    return 1 if stale and options.check else 0


def _written(path: Path, check: bool) -> bool:
    text = path.read_text(encoding="utf-8")
    wanted = renewed(text)
    if wanted != text and not check:
        path.write_text(wanted, encoding="utf-8")
    return wanted == text


def renewed(text: str) -> str:
    """A document with its tables as the results have them.

    Raises:
        KeyError: a table has a name that is not known.
    """
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def names_in(text: str) -> list[str]:
    """Names of the tables in a document."""
    return [found[2] for found in BLOCK.finditer(text)]


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _latency() -> str:
    runs = _results("latency")["runs"]
    cells: dict[str, dict[int, str]] = {}
    for run in runs:
        shared = ", sharing cores" if run["ranks_share_cores"] else ""
        row = cells.setdefault(f"{run['ranks']}{shared}; {run['through']}", {})
        median, low, high = (
            f"{run['microseconds'][key]:.0f}"
            for key in ("median", "first_quartile", "third_quartile")
        )
        row[run["numbers"]] = f"{median} ({low} to {high})"
    sizes = sorted({run["numbers"] for run in runs})
    rows = [[name, *(row[size] for size in sizes)] for name, row in cells.items()]
    return table(["ranks; through", *(f"{size} float64" for size in sizes)], rows)


def _memory() -> str:
    runs = _results("memory")["runs"]
    ranks = sorted({run["ranks"] for run in runs})
    cells = {
        (run["variant"], run["ranks"]): f"{run['extra_bytes']['median'] / run['formula']:.2f}"
        for run in runs
    }
    names = dict.fromkeys(run["variant"] for run in runs)
    rows = [[name, *(cells.get((name, P), "") for P in ranks)] for name in names]
    return table(["", *(f"{P} rank{'s' * (P > 1)}" for P in ranks)], rows)


def _scaling() -> str:
    results = _results("scaling")
    runs = {(run["kind"], run["layout"], run["ranks"]): run for run in results["runs"]}
    rows = []
    for ranks in sorted({key[2] for key in runs}):
        steps = [
            f"{1000 * runs[kind, layout, ranks]['acceleration_step_s']['median']:.0f}"
            for kind in ("strong", "weak")
            for layout in ("rows", "columns")
        ]
        gather = runs["strong", "rows", ranks]["parts_s"]["gather"]["median"]
        shared = ", sharing cores" if ranks > results["machine"]["cores"] else ""
        rows.append([f"{ranks}{shared}", steps[0], f"{1000 * gather:.0f}", *steps[1:]])
    n, share = (runs[kind, "rows", 1]["n"] / 1e6 for kind in ("strong", "weak"))
    head = ["ranks", f"strong, rows, n = {n:g}e6", "of it gathering", "strong, columns"]
    return table([*head, f"weak, rows, n/P = {share:g}e6", "weak, columns"], rows)


def _gpu_parts() -> str:
    rows = []
    floors = ("store", "gram", "update", "write", "averages")
    for run in _results(H100)["parts"]:
        seconds, floor = gpu_parts.seconds_of(run), run["floor_s"]
        rows.append(
            [
                f"{run['ranks']}, {run['history_dtype']}",
                *(
                    f"{1000 * value:.2f}"
                    + (f", {1000 * floor[name]:.2f}" if name in floors else "")
                    for name, value in seconds.items()
                ),
                f"{1000 * sum(seconds.values()):.1f}",
                str(sum(run["launches"].values())),
                str(sum(run["synchronizations"].values())),
            ]
        )
    head = [f"{name}, floor" if name in floors else name for name in gpu_parts.PARTS]
    return table(["P, history", *head, "all", "kernels", "synchronizations"], rows)


def _gpu_steps() -> str:
    dali = next(name for name in _results(f"{H100}-dali")["steps"] if "DALI" in name)
    runs = _results(H100)["steps"] | {dali: _results(f"{H100}-dali")["steps"][dali]}
    rows = []
    for name, run in runs.items():
        ratio = run["step_over_own"]
        rows.append(
            [
                f"{name}{' (another run)' if name == dali else ''}",
                f"{1000 * run['own_step_s']['median']:.1f}",
                f"{1000 * run['step_s']['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['first_quartile']:.2f} to "
                f"{ratio['third_quartile']:.2f})",
                f"{1000 * run['acceleration_step_s']['median']:.1f}",
                " ".join(map(str, run["synchronizations"])),
            ]
        )
    head = ["", "base", "accelerated", "ratio (quartiles)", "acceleration step beyond a step"]
    return table([*head, "synchronizations by step"], rows)


def convergence(name: str) -> dict[str, dict[str, dict[str, str]]]:
    """Reads benchmarks/results/`name`/table.md: problem, contender, column."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    head: list[str] = []
    for line in (RESULTS / name / "table.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line.removeprefix("## "), {})
            head = []
        elif line.startswith("|") and not line.startswith("|---"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            if head:
                rows[first] = dict(zip(head, cells, strict=True))
            else:
                head = cells
    return found


def _ratio(row: Mapping[str, str], column: str = "over base: mean") -> str:
    return "diverged" if row[column] == DIVERGED else row[column]


def _f_ratio(row: Mapping[str, str]) -> str:
    return _ratio(row, "f over base")


def _steps(row: Mapping[str, str]) -> str:
    return row["steps to base's loss"].split(" ")[0]


def _convergence() -> str:
    found = convergence("convergence")
    rows = []
    for name, problem in PROBLEMS.items():
        runs = found[problem]
        default, averaged = runs["default"], runs["default, averaged weights"]
        rows.append(
            [
                name,
                *(_ratio(runs[contender]) for contender in ("aadl", "paper", "paper+average")),
                # Rows that were measured before f was reported lack it.
                *(
                    _ratio(default, x) if x in default else ""
                    for x in ("f over base", "f over base: worst")
                ),
                *(_ratio(default, x) for x in ("over base: mean", "of means", "worst")),
                *(_ratio(averaged, x) for x in ("over base: mean", "of means")),
                *(runs[x]["seeds"].split(",")[0] for x in ("default", "aadl", "paper")),
            ]
        )
    head = ["problem; base", "AADL", "paper", "with moving average", "default: f", "worst"]
    head += ["training loss", "of means", "worst", "at averaged weights", "of means"]
    head += ["seeds", "AADL", "paper"]
    return table(head, rows)


def _history_dtype() -> str:
    found = convergence("history_dtype")
    names = {problem: name for name, problem in PROBLEMS.items()}
    rows = []
    for problem, runs in found.items():
        cells = [
            f"{_steps(runs[x])}; {_ratio(runs[x])}, {_ratio(runs[x], 'worst')}"
            for x in ("default", "bfloat16")
        ]
        rows.append([names[problem], *cells])
    return table(["problem; base", "float32", "bfloat16"], rows)


def _digits() -> str:
    found = convergence("convergence")
    rows = []
    for name, batch, cell in (
        ("all: steps to the base optimizer's loss at step 400", "full", _steps),
        ("all: final training loss over the base optimizer's", "full", _ratio),
        ("500: the same", "500", _ratio),
        ("100: the same", "100", _ratio),
        ("all: final f over the base optimizer's", "full", _f_ratio),
        ("500: the same", "500", _f_ratio),
        ("100: the same", "100", _f_ratio),
    ):
        chosen = (found[f"digits_mlp-{batch}-{base}"]["default"] for base in BASES.values())
        rows.append([name, *(cell(row) for row in chosen)])
    return table(["batch", *BASES], rows)


TABLES: dict[str, Callable[[], str]] = {
    "host": lambda: host.markdown(_results("host")["runs"]),
    "latency": _latency,
    "minibatch": lambda: minibatch.overview(_results("minibatch/results")["tables"]),
    "minibatch-tuned": lambda: minibatch.tuned(_results("minibatch/tuned")["tables"]),
    "memory": _memory,
    "overhead": lambda: overhead.table(_results("overhead")),
    "overhead-notes": lambda: _listed(overhead.notes(_results("overhead")).splitlines()),
    "scaling": _scaling,
    "step-time": lambda: step_time.table(_results("step_time")),
    "simulate-measured": lambda: words.measured_table(_results("simulate")),
    "simulate-summary": lambda: words.summary_table(_results("simulate")),
    "simulate-parts": lambda: words.parts_table(_results("simulate"), "summit"),
    "simulate-shares": lambda: words.shares_table(_results("simulate"), "summit"),
    "simulate-answers": lambda: _listed(_results("simulate")["machines"]["summit"]["answers"]),
    "simulate-methods": lambda: str(_results("simulate")["methods_table"]),
    "simulate-verdicts": lambda: _listed(_results("simulate")["verdicts"]),
    "simulate-validation": lambda: words.validation_table(_results("simulate")),
    "gpu-parts": _gpu_parts,
    "gpu-steps": _gpu_steps,
    "convergence": _convergence,
    "history-dtype": _history_dtype,
    "digits": _digits,
}


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
