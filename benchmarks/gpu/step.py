"""A network's training step on one device, with and without acceleration, in turns.

It uses mixed precision with a GradScaler. Images are in channels_last, and so are weights unless
Horovod has to send them. Every accelerated point is taken, so that no acceleration step is cut
short. What the network learns does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from aadl_hvd import AndersonConfig, AndersonOptimizer
from benchmarks.gpu.parts import FREQUENCY
from benchmarks.report import spread, table
from benchmarks.simulate.model import history_bytes
from benchmarks.workload import Clock, gpu_synchronizations
from models import networks
from models.errors import UserError

CLASSES = 1000
DIGITS = 10
WARM_UP = 5
BLOCK, DEPTH = 10, 10  # steps in a block of the subspace method at momentum 0.9, its columns
BATCHES = 4  # synthetic batches, which are repeated
Batches = Iterator[tuple[Tensor, Tensor]]


class Training:
    """A network in training, with its optimizer.

    Args:
        options: options of the command line.
        device: device of the network.
        wrap: makes the optimizer that steps from the base optimizer and the network.
        distributed: the optimizer has Horovod's methods.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        device: torch.device,
        wrap: Callable[[torch.optim.Optimizer, nn.Module], Any],
        distributed: bool,
    ) -> None:
        torch.manual_seed(0)
        gc.collect()  # old optimizers are reference cycles: free them before bytes are counted
        gpu = device.type == "cuda"
        self._before = torch.cuda.memory_allocated() if gpu else 0
        model = networks.build(options.model, CLASSES).to(device)
        if not distributed:  # Horovod sends contiguous tensors only
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        self.n = sum(p.numel() for p in model.parameters())
        self.optimizer = wrap(base, model)
        self._model, self._distributed, self._device = model, distributed, device
        self._dtype = torch.float16 if gpu else torch.bfloat16  # processors have no fast float16
        self._scaler = torch.amp.GradScaler(device.type)
        if gpu:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_bytes(self) -> int | None:
        """Peak bytes allocated on the GPU beyond those at construction; None without a GPU."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() - self._before

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, backward and the optimizer's step."""
        self.optimizer.zero_grad()
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, dtype=self._dtype):
            loss = nn.functional.cross_entropy(self._model(images).float(), labels)
        self._scaler.scale(loss).backward()
        if self._distributed:
            self.optimizer.synchronize()
            self._scaler.unscale_(self.optimizer)
            with self.optimizer.skip_synchronize():
                self._scaler.step(self.optimizer)
        else:
            self._scaler.step(self.optimizer)
        self._scaler.update()


def measure(
    options: argparse.Namespace, device: torch.device, batches: Batches, distributed: bool
) -> dict[str, Any]:
    """Times accelerated steps and the base optimizer's own steps, in turns.

    Args:
        options: options of the command line.
        device: device of the network.
        batches: images float32 [B, 3, H, W] and labels int64 [B] without end.
        distributed: step through Horovod, which must be started; it reduces even with one rank.

    Returns:
        Seconds of both steps and their ratio, over cycles of p steps; seconds of an acceleration
        step beyond the base's; synchronizations by step of a cycle, the acceleration step last;
        peak bytes.
    """
    p, m = FREQUENCY, options.depth
    config = AndersonConfig(
        history_depth=m, frequency=p, store_every=p, safeguard="none", noise_gate=None
    )
    if options.method == "subspace":  # not every block ends with a jump: see "accelerated"
        p, m = BLOCK, DEPTH
        config = AndersonConfig(method="subspace")
    clock = Clock(device)

    def run(training: Training, steps: int) -> list[float]:
        marks = [clock.mark()]
        for _ in range(steps):
            training.step(*next(batches))
            marks.append(clock.mark())
        clock.synchronize()
        return [clock.seconds(a, b) for a, b in itertools.pairwise(marks)]

    def synchronizations(training: Training) -> list[int]:
        counts = []
        with gpu_synchronizations(lambda: "step") as found:
            for _ in range(p):
                before = sum(found.values())
                run_one = next(batches)
                training.step(*run_one)
                counts.append(sum(found.values()) - before)
        return counts

    with _reducing_alone() if distributed else contextlib.nullcontext():
        own = Training(options, device, _plain(distributed), distributed)
        run(own, WARM_UP)
        own_peak = own.peak_bytes
        accelerated = Training(options, device, _accelerated(distributed, config), distributed)
        stats = accelerated.optimizer.anderson.stats
        run(accelerated, p * (m + 2))
        # GradScaler leaves out steps whose gradients overflow, at the start.
        run(accelerated, -stats.steps % p)
        peak, had = accelerated.peak_bytes, stats.accelerated
        own_s, cycles_s, beyond_s, ratios = [], [], [], []
        for _ in range(options.cycles):
            turn, mine = run(own, p), run(accelerated, p)
            own_s.append(sum(turn) / p)
            cycles_s.append(sum(mine) / p)
            beyond_s.append(mine[-1] - sum(turn) / p)
            ratios.append(sum(mine) / sum(turn))
        taken = stats.accelerated - had
        gpu = device.type == "cuda"
        return {
            "n": own.n,
            "m": m,
            "p": p,
            "own_step_s": spread(own_s),
            "step_s": spread(cycles_s),
            "step_over_own": spread(ratios),
            "acceleration_step_s": spread(beyond_s),
            "cycles": options.cycles,
            "accelerated": taken,
            "own_synchronizations": synchronizations(own) if gpu else None,
            "synchronizations": synchronizations(accelerated) if gpu else None,
            "own_peak_bytes": own_peak,
            "peak_bytes": peak,
            "history_bytes": accelerated.optimizer.anderson.history_bytes,
            "formula_bytes": history_bytes(own.n, m, 1, averages=len(config.averages)),
        }


def synthetic(options: argparse.Namespace, device: torch.device) -> Batches:
    """Returns random images and labels on the device, without end."""
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, 3, options.image_size, options.image_size)
    made = [
        (
            torch.randn(size, generator=generator).to(device),
            torch.randint(CLASSES, (options.batch,), generator=generator).to(device),
        )
        for _ in range(BATCHES)
    ]
    return itertools.cycle(made)


@contextlib.contextmanager
def decoded(options: argparse.Namespace, device: torch.device) -> Iterator[Batches]:
    """Yields batches of JPEGs that DALI decodes and augments, on the GPU if there is one.

    Raises:
        UserError: DALI is not installed, or the batch is larger than the data.
    """
    from models.data import LoaderOptions, list_images, open_loader, write_digits

    with tempfile.TemporaryDirectory() as folder:
        size = max(options.image_size, 32)
        images = list_images(write_digits(Path(folder) / "digits", size=size) / "train")
        settings = LoaderOptions(
            train=True,
            batch_size=options.batch,
            image_size=options.image_size,
            resize=size,
            augment="imagenet",
            device=device,
        )
        loader = open_loader("dali", images, settings)
        try:
            yield itertools.chain.from_iterable(itertools.repeat(loader))
        finally:
            loader.close()


def horovod_lacks(device: torch.device) -> str | None:
    """Why Horovod cannot be measured here; None where it can."""
    try:
        import horovod.torch as hvd
    except ImportError:
        return "Horovod is not installed"
    if device.type == "cuda" and not hvd.nccl_built():
        return "Horovod is built without NCCL"
    return None


def steps_table(runs: dict[str, Any]) -> str:
    """One row for each way to feed and to reduce; a reason in place of a run that is missing."""
    head = [
        "",
        "base / ms",
        "accelerated",
        "ratio",
        "quartiles",
        "acceleration step beyond",
        "taken",
    ]
    head += ["synchronizations, base", "synchronizations", "extra MB", "formula"]
    rows = []
    for name, run in runs.items():
        if isinstance(run, str):
            rows.append([name, f"not run: {run}", *[""] * (len(head) - 2)])
            continue
        ratio = run["step_over_own"]
        peak = None
        if run["peak_bytes"] is not None:
            peak = run["peak_bytes"] - run["own_peak_bytes"]
        rows.append(
            [
                name,
                f"{1000 * run['own_step_s']['median']:.3g}",
                f"{1000 * run['step_s']['median']:.3g}",
                f"{ratio['median']:.3f}",
                f"{ratio['first_quartile']:.3f} to {ratio['third_quartile']:.3f}",
                f"{1000 * run['acceleration_step_s']['median']:.3g}",
                f"{run['accelerated']} of {run['cycles']}",
                *(
                    " ".join(map(str, run[key])) if run[key] else "-"
                    for key in ("own_synchronizations", "synchronizations")
                ),
                "-" if peak is None else f"{peak / 1e6:.0f}",
                f"{run['formula_bytes'] / 1e6:.0f}",
            ]
        )
    return table(head, rows)


def _plain(distributed: bool) -> Callable[[torch.optim.Optimizer, nn.Module], Any]:
    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        if not distributed:
            return optimizer
        import horovod.torch as hvd

        return hvd.DistributedOptimizer(optimizer, list(model.named_parameters(prefix="own")))

    return wrap


def _accelerated(
    distributed: bool, config: AndersonConfig
) -> Callable[[torch.optim.Optimizer, nn.Module], Any]:
    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        if not distributed:
            return AndersonOptimizer(optimizer, anderson=config)
        from aadl_hvd import DistributedAndersonOptimizer
        from aadl_hvd.elastic import TorchState

        named = list(model.named_parameters(prefix="accelerated"))
        made = DistributedAndersonOptimizer(optimizer, named, anderson=config)
        TorchState(model=model, optimizer=made).sync()  # where the ranks of an elastic run meet
        return made

    return wrap


@contextlib.contextmanager
def _reducing_alone() -> Iterator[None]:
    """Context in which Horovod reduces gradients even with one rank, as in elastic runs."""
    with mock.patch.dict(os.environ, {"HOROVOD_ELASTIC": "1"}):
        yield


def checked(options: argparse.Namespace) -> None:
    """Raises UserError if the network is not known."""
    with torch.device("meta"):
        try:
            networks.build(options.model, CLASSES)
        except UserError as error:
            raise UserError(f"--model: {error}") from error
