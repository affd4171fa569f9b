"""``python -m benchmarks.minibatch --help``."""

from __future__ import annotations

import argparse
import ast
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aadl_hvd import AndersonConfig, ConfigError
from benchmarks.command import at_least
from benchmarks.minibatch.bases import CASES, SCHEDULES, chosen
from benchmarks.minibatch.results import BASE, Runs
from benchmarks.minibatch.table import LEGEND, Plan, markdown, measure
from benchmarks.report import RESULTS
from models.errors import UserError

QUICK_STEPS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        Exit code: 0, 2 for wrong input, 130 where it was interrupted.
    """
    options = parser().parse_args(arguments)
    if options.list:
        lines = [f"{case.name}  ({case.group}, {case.seeds} seeds)" for case in CASES.values()]
        try:
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # the reader has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 0
    try:
        run(options)
    except (UserError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --reuse keeps the base's runs of finished cases", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.minibatch",
        description="Trains small problems in mini-batches, in this process, and compares base "
        "optimizers, untuned and tuned, with and without acceleration.",
        epilog=LEGEND,
    )
    add = made.add_argument
    add("names", nargs="*", help="cases, groups or families, see --list; default: all")
    add("--list", action="store_true", help="say what there is, run nothing")
    add("--configs", nargs="*", default=["default"], metavar="SETTINGS",
        help="settings of AndersonConfig, such as frequency=5,mixing=1; default: default; none for "
        "the base alone")  # fmt: skip
    add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1; default: each case's own")
    add("--steps", type=int, metavar="N", help="number of steps, instead of each problem's own")
    add("--grid", choices=tuple(SCHEDULES), help="schedules of the tuning, 16 runs each (20 for "
        "plain SGD) and seed: both is constant and cosine, all has Schedule-Free besides, 16 runs; "
        "default: constant")  # fmt: skip
    add("--screen", type=int, default=0, metavar="N", help="the grid with seed 0 alone, then the N "
        "best of each kind with all seeds; default: all")  # fmt: skip
    add("--observe", action=argparse.BooleanOptionalAction, default=True,
        help="tell the accelerated optimizer the losses")  # fmt: skip
    add("--optimum", type=int, default=0, metavar="N",
        help="look for the least f with N iterations of L-BFGS; default: do not")  # fmt: skip
    add("--quick", action="store_true",
        help=f"one seed, {QUICK_STEPS} steps, no grid: does it run at all?")  # fmt: skip
    add("--reuse", action="store_true", help="take the base's runs from the results of a call "
        "before: right while problems, torch and machine are the same")  # fmt: skip
    add("--output", type=Path, default=RESULTS / "minibatch", metavar="DIR",
        help="folder to write results.json and table.md to; default: %(default)s")  # fmt: skip
    return made


def run(options: argparse.Namespace) -> None:
    """Measures the chosen cases; results are written after every case."""
    cases = chosen(options.names)
    for name, low in (("seeds", 1), ("steps", 1), ("optimum", 0), ("screen", 0)):
        if getattr(options, name) is not None:
            at_least(low, options, name)
    quick = options.quick
    steps = QUICK_STEPS if quick and options.steps is None else options.steps
    plan = Plan(
        seeds=1 if quick and options.seeds is None else options.seeds,
        schedules=options.grid or ("none" if quick else "constant"),
        screen=options.screen,
        optimum=options.optimum,
    )
    configs = {text: parse_config(text) for text in options.configs}
    path = options.output / "results.json"
    runs = Runs(configs, observe=options.observe, steps=steps)
    if options.reuse:
        runs.take_bases(path)
    torch.set_num_threads(1)
    tables: dict[str, Any] = {}
    document = [f"# Mini-batches\n\n{LEGEND}"]
    for case in cases:
        started, before = time.monotonic(), runs.made
        tables[case.name] = measure(case, runs, plan)
        runs.write(path, tables)
        spent, made = time.monotonic() - started, runs.made - before
        text = f"{case.name}, {plan.seeds_of(case)} seeds\n\n{markdown(tables[case.name])}"
        document.append(f"## {text}")
        path.with_name("table.md").write_text("\n\n".join(document) + "\n")
        print(f"\n{text}\n\n{made} runs, {spent:.1f} s", flush=True)
    print(f"\n{LEGEND}\nresults.json and table.md in {path.parent}")


def parse_config(text: str) -> AndersonConfig:
    """Reads settings from "name=value,name=value"; "default" for none.

    Raises:
        UserError: the text has another form, or a name is not known.
        ConfigError: a value is not allowed.
    """
    settings: dict[str, Any] = {}
    if text == BASE:
        raise UserError(f"--configs {BASE}: the base optimizer is always there")
    for piece in [] if text == "default" else text.split(","):
        name, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"--configs {text!r}: must be like frequency=5,mixing=1")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    try:
        return AndersonConfig(**settings)
    except TypeError as error:
        raise UserError(f"--configs {text!r}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
