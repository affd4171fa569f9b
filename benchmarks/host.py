"""Host time of a step, with next to no arithmetic: Python, and starting torch's operations.

The model has the parameter tensors of a network, with as many axes and a few numbers each. Base
optimizer and accelerated optimizer take turns, on the gradients of a quadratic, with or without
noise. Gradients are new tensors in each step, as after `zero_grad()`, or, with `--same-gradients`,
stay the same, as after `zero_grad(set_to_none=False)`. One rank of many is simulated: it does its
own work, and the others answer at once. No GPU is needed: a GPU would have to wait for what is
measured here. `--device=cuda --whole` has the tensors whole and on a GPU, which is waited for
before and after each step.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.base import Communicator
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.optim.local import LocalEngine
from benchmarks import command, report
from benchmarks.gpu.one_rank import OneOfMany
from benchmarks.workload import shapes_of
from models.errors import UserError

OUT = report.RESULTS / "host.json"
_NO_KERNEL = "empty", "new_empty", "detach", "unflatten_dense_tensors", "alias", "lift"
COUNTED = 60  # steps in which operations are counted: whole cycles of p steps, whole blocks
WARM = 320  # steps before anything is timed: histories are full, the subspace method sleeps
BASES: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.3),
    "Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.03, momentum=0.9, nesterov=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=1e-3),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        config: settings of `AndersonConfig`.
        noise: standard deviation of a gradient's entries.
        drift: how far the minimum moves in a step, so that there is always something to gain.
    """

    config: dict[str, Any]
    noise: float = 0.0
    drift: float = 0.0


SETTINGS = {
    "off": Setting({"enabled": False}),
    "residual-norm": Setting({"method": "residual"}, drift=1e-3),
    "residual-norm, p = q = 5": Setting(
        {"method": "residual", "frequency": 5, "store_every": 5}, drift=1e-3
    ),
    "subspace": Setting({"method": "subspace"}, noise=1e-3, drift=0.02),
    "subspace, cuda_graphs=True": Setting(
        {"method": "subspace", "cuda_graphs": True}, noise=1e-3, drift=0.02
    ),
    "subspace, much noise": Setting({"method": "subspace"}, noise=3.0),
}


class _Engine(LocalEngine):
    """As in a job of several ranks: own gradients are sampled."""

    reduces_gradients = True


class _OneOfMany(OneOfMany):
    """The other ranks' rows are those of the present weights."""

    def __init__(self, size: int, parameters: list[torch.nn.Parameter]) -> None:
        n = sum(p.numel() for p in parameters)
        self.block = -(-n // size)
        flat = torch.zeros(size * self.block, device=parameters[0].device)
        super().__init__(size, size // 2, flat)
        self._parameters = parameters

    def prepare(self) -> None:
        """To be called before a step, outside the time that counts."""
        flat = torch.cat([p.detach().view(-1) for p in self._parameters])
        self._weights[: len(flat)] = flat

    def _allgather(self, block: torch.Tensor) -> torch.Tensor:
        self._weights[self.rank * self.block :][: len(block)] = block
        return self._weights


class Run:
    """One optimizer on the problem.

    Args:
        base: one of BASES.
        setting: of the acceleration; None: the base optimizer alone.
        shapes: of the tensors.
        ranks: P.
        device: "cpu", "cuda", or "pretended": "cuda" inside `benchmarks.pretend_gpu.PretendGpu`.
        new_gradients: new tensors in each step, as after `zero_grad()`.

    Attributes:
        parameters: the weights.
        around: a context for the optimizer's part of each step.
        optimizer: the base optimizer, accelerated or not.
    """

    def __init__(
        self,
        base: str,
        setting: Setting | None,
        shapes: Sequence[torch.Size],
        ranks: int,
        device: str = "cpu",
        new_gradients: bool = True,
    ) -> None:
        self._new_gradients = new_gradients
        self._wait = torch.cuda.synchronize if device == "cuda" else None
        generator = torch.Generator("cpu" if device == "pretended" else device).manual_seed(0)
        device = self._device = "cuda" if device == "pretended" else device
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator, device=device))
            for shape in shapes
        ]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self._curvature, self._minimum = (
            {shape: make(shape) for shape in dict.fromkeys(shapes)}
            for make in (
                lambda shape: torch.logspace(-3, 0, shape.numel(), device=device).view(shape),
                lambda shape: torch.zeros(shape, device=device),
            )
        )
        self._setting = setting or Setting({})
        self._generator = generator
        self.around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.optimizer: Any = BASES[base](self.parameters)
        self._comm: Communicator = LocalCommunicator()
        if setting is not None:
            if ranks > 1:
                self._comm = _OneOfMany(ranks, self.parameters)
            engine = (_Engine if ranks > 1 else LocalEngine)(1, True, False)
            config = AndersonConfig(**setting.config)
            self.optimizer = AndersonOptimizer.accelerate(
                self.optimizer, engine, config, self._comm
            )

    def step(self) -> float:
        """One step; returns the seconds of the optimizer's part."""
        noise, drift = self._setting.noise, self._setting.drift
        for minimum in self._minimum.values():
            minimum += drift * self._random(minimum).abs()
        with torch.no_grad():
            for p in self.parameters:
                assert p.grad is not None
                minimum, curvature = self._minimum[p.shape], self._curvature[p.shape]
                if self._new_gradients:  # the old one is gone first, as in a backward pass
                    p.grad = None
                    p.grad = torch.sub(p, minimum)
                else:
                    torch.sub(p, minimum, out=p.grad)
                p.grad.mul_(curvature)
                if noise:
                    p.grad.add_(self._random(minimum), alpha=noise)
        if isinstance(self._comm, _OneOfMany):
            self._comm.prepare()
        with self.around:
            start = self._now()
            self.optimizer.step()
            return self._now() - start

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def _random(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self._generator, device=self._device)

    def kinds(self) -> Iterator[tuple[str, float]]:
        """Steps without end: what each was, and its seconds."""
        stats = self.optimizer.anderson.stats
        while True:
            accelerated, rejected, stored = stats.accelerated, dict(stats.rejected), stats.stored
            spent = self.step()
            if stats.accelerated > accelerated:
                kind = "accelerated"
            elif stats.rejected != rejected:
                kind = "rejected"
            elif stats.stored > stored:
                kind = "stored"
            else:
                kind = "other"
            yield kind, spent


class _Calls(TorchDispatchMode):
    """Counts the operations of torch that are started, and those that a GPU has a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        # Neither views of what there is, nor memory.
        self.kernels += not func.is_view and not func.__name__.startswith(_NO_KERNEL)
        return func(*args, **(kwargs or {}))


def numbers(tensors: int, ranks: int) -> int:
    """In a tensor: few, but so many that a rank has more rows than columns."""
    return max(16, 64 * ranks // tensors)


def with_few_numbers(shapes: Sequence[torch.Size], ranks: int) -> list[torch.Size]:
    """Shapes with as many axes, and the same few numbers in each."""
    count = numbers(len(shapes), ranks)
    return [torch.Size([count, *[1] * (len(shape) - 1)]) for shape in shapes]


def measure(
    base: str,
    name: str,
    shapes: Sequence[torch.Size],
    ranks: int,
    steps: int,
    device: str = "cpu",
    new_gradients: bool = True,
) -> dict[str, Any]:
    """Measures one setting on one base optimizer.

    Returns:
        "base": its seconds (median, quartiles); "mean_ratio": seconds of all steps over those of
        the base; "kinds": by what a step was, how many there were, their seconds beyond the base's
        median, and the operations of torch that one starts beyond the base's; "kernels_a_step":
        those of them that a GPU has a kernel for, mean of all steps; "parts": mean seconds of each
        part in the steps of a kind, on the host.
    """
    plain, ours = (
        Run(base, setting, shapes, ranks, device, new_gradients)
        for setting in (None, SETTINGS[name])
    )
    stepped = ours.kinds()
    for _ in range(WARM):
        plain.step()
        next(stepped)
    alone: list[float] = []
    found: dict[str, list[float]] = {}
    parts: dict[str, dict[str, float]] = {}
    for _ in range(steps):
        alone.append(plain.step())
        before = dict(ours.optimizer.anderson.stats.seconds)
        kind, spent = next(stepped)
        found.setdefault(kind, []).append(spent)
        own = parts.setdefault(kind, dict.fromkeys(before, 0.0))
        for part, seconds in ours.optimizer.anderson.stats.seconds.items():
            own[part] += seconds - before[part]
    median = report.spread(alone)["median"]
    total = sum(sum(spent) for spent in found.values())
    calls, kernels = _calls(plain, ours, min(steps, COUNTED))
    return {
        "case": name,
        "base_optimizer": base,
        "ranks": ranks,
        "base": report.spread(alone),
        "mean_ratio": total / sum(alone),
        "kernels_a_step": kernels,
        "kinds": {
            kind: {
                "steps": len(spent),
                "beyond": report.spread([one - median for one in spent]),
                "calls": calls.get(kind),
                "parts": {
                    part: seconds / len(spent) for part, seconds in parts[kind].items() if seconds
                },
            }
            for kind, spent in found.items()
        },
    }


def _calls(plain: Run, ours: Run, steps: int) -> tuple[dict[str, int], float]:
    """Operations of torch in the last step of each kind, and kernels a step, beyond the base's."""
    counted = _Calls()
    plain.around = ours.around = counted
    plain.step()
    base, base_kernels, found = counted.count, counted.kernels, {}
    counted.kernels, stepped = 0, ours.kinds()
    for _ in range(steps):
        before = counted.count
        kind, _ = next(stepped)
        found[kind] = counted.count - before - base
    return found, counted.kernels / steps - base_kernels


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        command.at_least(1, options, "steps", "ranks")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device is cuda, but torch finds no GPU. Must be cpu here")
        report.prepare(options.out.parent)
        torch.set_num_threads(1)
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    add = made.add_argument
    add("--parameters", default="resnet50", metavar="NETWORK", help="default: %(default)s")
    add("--ranks", type=int, nargs="+", default=[1, 1536], help="default: 1 1536")
    add("--steps", type=int, default=640, help="timed steps; default: %(default)s")
    add("--bases", nargs="+", choices=BASES, default=list(BASES), help="default: all")
    add("--settings", nargs="+", choices=SETTINGS, metavar="NAME",
        default=[name for name in SETTINGS if "cuda_graphs" not in name],
        help=f"of {', '.join(map(repr, SETTINGS))}; default: all without CUDA graphs")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--whole", action="store_true", help="tensors as large as the network's")
    add("--same-gradients", action="store_true", help="gradients stay the same tensors")
    add("--profile", action="store_true", help="print where the time goes, by function")
    add("--out", type=report.Path, default=OUT, help="default: %(default)s")
    return made


def run(options: argparse.Namespace) -> None:
    """Measures what is asked for, and prints and writes it."""
    shapes = shapes_of(options.parameters)
    tensors, runs, new = len(shapes), [], not options.same_gradients
    for ranks in options.ranks:
        own = shapes if options.whole else with_few_numbers(shapes, ranks)
        for base in options.bases:
            for name in options.settings:
                what = base, name, own, ranks
                runs.append(measure(*what, options.steps, options.device, new))
                print(runs[-1]["case"], end=" ", flush=True)
                if options.profile:
                    profile(*what, new)
    few = {ranks: numbers(tensors, ranks) for ranks in options.ranks}
    each = "the network's" if options.whole else few
    print(f"\n{options.parameters}: {tensors} tensors; numbers in each, by ranks: {each}\n")
    print(markdown(runs))
    print(f"\n{parts_table(runs)}")
    found = {"parameters": options.parameters, "tensors": tensors, "numbers": each}
    found |= {"device": options.device, "new_gradients": new}
    report.write(options.out, found | {"steps": options.steps, "runs": runs})


def profile(
    base: str, name: str, shapes: Sequence[torch.Size], ranks: int, new_gradients: bool
) -> None:
    """Prints by function where the time of the steps goes, the base optimizer's included."""
    ours = Run(base, SETTINGS[name], shapes, ranks, new_gradients=new_gradients)
    for _ in range(WARM):
        ours.step()
    step, profiler = ours.optimizer.step, cProfile.Profile()
    ours.optimizer.step = lambda: profiler.runcall(step)
    for _ in range(WARM):
        ours.step()
    print(f"\n{base}, {name}, {ranks} ranks, {WARM} steps")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """The runs as a table."""
    rows = []
    for run in runs:
        ranks = "one rank" if run["ranks"] == 1 else f"1 of {run['ranks']:,} ranks"
        title = f"{run['base_optimizer']}, {ranks}, {run['case']}"
        base = 1e6 * run["base"]["median"]
        for kind in sorted(run["kinds"]):
            own = run["kinds"][kind]
            calls = "" if own["calls"] is None else str(own["calls"])
            beyond = f"{1e6 * own['beyond']['median']:.0f}"
            ratio = f"{run['mean_ratio']:.2f}" if title else ""
            name = f"{title}: {kind}" if title else kind
            rows.append([name, str(own["steps"]), f"{base:.0f}", beyond, calls, ratio])
            title = ""
    head = ["", "steps", "base, us", "beyond it, us", "operations", "mean step over base"]
    return report.table(head, rows)


def parts_table(runs: Sequence[dict[str, Any]]) -> str:
    """Host's microseconds by part of the steps that try to accelerate."""
    names = list(
        dict.fromkeys(
            part for run in runs for own in run["kinds"].values() for part in own["parts"]
        )
    )
    rows = []
    for run in runs:
        for kind in ("accelerated", "rejected"):
            if kind in run["kinds"]:
                own = run["kinds"][kind]["parts"]
                title = f"{run['base_optimizer']}, {run['ranks']}, {run['case']}: {kind}"
                rows.append([title, *(f"{1e6 * own.get(name, 0.0):.0f}" for name in names)])
    return report.table(["us on the host", *names], rows)


if __name__ == "__main__":
    sys.exit(main())
