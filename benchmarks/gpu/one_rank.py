"""Times the own work of one rank of P on a device, and counts its kernels.

The rank is alone: its communicator answers as P ranks would, and sends nothing. The weights have
the shapes of the network. Gradients are those of a quadratic, at a new random point in every step.
So no acceleration step is rejected, and each does all of its work. This module uses private names
of the library, because parts on a GPU are timed in its stream.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import aadl_hvd.core.chunking as chunking
import aadl_hvd.core.gram as gram
import aadl_hvd.core.replicas as replicas
import aadl_hvd.core.state as state
import aadl_hvd.kernels as library_kernels
from aadl_hvd import AndersonConfig
from aadl_hvd.comm.base import Communicator, Values
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.optim.gradient_samples import GradientSamples
from aadl_hvd.optim.problem import OptimizerFixedPoint
from aadl_hvd.stats import Stats
from benchmarks.report import spread
from benchmarks.workload import Clock, copy_bandwidth, gpu_synchronizations

# Parts beside the library's own: samples of the rank's own gradient, taken in the backward pass;
# their mean after it; this rank's rows of the gradient; the library's work between its parts.
BACKWARD, SAMPLE, RESIDUAL, OTHER = "backward", "sample", "residual", "other"
_NO_KERNEL = (
    *("empty", "new_empty", "detach", "unflatten_dense_tensors", "lift", "alias", "_local"),
    "promote_types",
)
_SYNCHRONIZING = ("cpu", "tolist", "item", "__float__")


class OneOfMany(Communicator):
    """A communicator that answers as if all `size` ranks held the same as this one.

    Args:
        size: P.
        rank: this rank.
        weights: result of an allgather, [n].
    """

    def __init__(self, size: int, rank: int, weights: Tensor) -> None:
        self.size, self.rank = size, rank
        self._weights = weights

    def allgather_object(self, item: Any) -> list[Any]:  # noqa: D102
        return [item] * self.size

    def _allreduce_sum(self, values: Values) -> Values:
        return values * self.size

    def _allreduce_max(self, values: Values) -> Values:
        return values

    def _broadcast(self, values: Values) -> Values:
        return values.copy()

    def _allgather(self, block: Tensor) -> Tensor:
        return self._weights

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        return tensor


class _Timers(Stats):
    """Stats whose parts exclude one another, and which know the present part.

    On a GPU a part lasts from when the GPU reaches its start to when it reaches its end, idle time
    included. `settle` brings `seconds` up to date.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seconds.update(dict.fromkeys((BACKWARD, SAMPLE, RESIDUAL, OTHER), 0.0))
        self._clock = Clock(device)
        self._spans: list[tuple[str, Any, Any]] = []
        self._under_way: list[str] = []
        self._since = self._clock.mark()

    @property
    def part(self) -> str | None:
        """The present part; None outside all parts."""
        return self._under_way[-1] if self._under_way else None

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        self._turn()
        self._under_way.append(part)
        try:
            yield
        finally:
            self._turn()
            self._under_way.pop()

    def settle(self) -> dict[str, float]:
        """Waits for the device and returns a copy of `seconds`."""
        self._clock.synchronize()
        for part, start, end in self._spans:
            self.seconds[part] += self._clock.seconds(start, end)
        self._spans.clear()
        return dict(self.seconds)

    def _turn(self) -> None:
        now = self._clock.mark()
        if self.part is not None:
            self._spans.append((self.part, self._since, now))
        self._since = now


class _TimedSamples:
    """Gradient samples, under a timer of their own."""

    def __init__(self, samples: GradientSamples, timers: _Timers) -> None:
        self._samples, self._timers = samples, timers
        self.samples, self.complete = samples.samples, samples.complete

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._samples, name)
        if name == "take":  # too short for a timer of its own
            return method

        def timed(*arguments: Any) -> Any:
            with self._timers.timed(SAMPLE):
                return method(*arguments)

        return timed


def foreach_launches(tensors: int, numbers: int) -> int:
    """Number of kernels of one torch._foreach_copy_ on a GPU.

    A launch takes at most 320 pieces of 65,536 numbers, of at most 64 tensors (two lists), as in
    torch's MultiTensorApply.cuh. It ends at the limit that is met first.
    """
    return math.ceil(tensors / 64) + numbers // (65536 * 320)


class _Kernels(TorchDispatchMode):
    """Counts kernels on a GPU, by part: one per operation, except for lists of tensors."""

    def __init__(self, timers: _Timers) -> None:
        super().__init__()
        self._timers = timers
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if self._timers.part is not None and not func.is_view and not name.startswith(_NO_KERNEL):
            kernels = 1
            if name.startswith("_foreach"):
                kernels = foreach_launches(len(args[0]), sum(t.numel() for t in args[0]))
            self.found[self._timers.part] = self.found.get(self._timers.part, 0) + kernels
        return func(*args, **(kwargs or {}))

    def started(self, on: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Wraps `on` to count Triton's kernels: torch does not see them, and each calls `on`."""

        def counted(tensor: Tensor) -> Any:
            if self._timers.part is not None:
                self.found[self._timers.part] = self.found.get(self._timers.part, 0) + 1
            return on(tensor)

        return counted


class _Synchronizations(TorchFunctionMode):
    """Counts places where the host would synchronize with a GPU, by part."""

    def __init__(self, timers: _Timers) -> None:
        super().__init__()
        self._timers = timers
        self.found: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part = self._timers.part
        if part is not None and getattr(func, "__name__", "") in _SYNCHRONIZING:
            self.found[part] = self.found.get(part, 0) + 1
        return func(*args, **(kwargs or {}))


def share(
    shapes: Sequence[torch.Size],
    config: AndersonConfig,
    ranks: int,
    cycles: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measures one rank's own work for an acceleration step and the steps before it.

    Args:
        shapes: shapes of the parameters.
        config: settings; p = q, or q = 1.
        ranks: P.
        cycles: timed cycles of p steps, after the history is full.
        device: device of the rank.

    Returns:
        Rows of this rank, its bytes, and the bandwidth of a copy in bytes/s, measured just before
        and after. By part: seconds (median and quartiles over cycles), kernels and synchronizations
        of one cycle. And synchronizations by step, the acceleration step last; on a GPU those that
        torch warns of. `peak_bytes` is the peak allocation on a GPU beyond weights and gradients,
        without the result of an allgather.

    Raises:
        RuntimeError: an acceleration step was rejected.
    """
    n = sum(shape.numel() for shape in shapes)
    p, m, q = config.frequency, config.history_depth, config.store_every
    gpu = device.type == "cuda"
    gc.collect()  # the rank before is in reference cycles: free it before bytes are counted
    rank = _Rank(shapes, config, ranks, device)
    before_all = copy_bandwidth(repeats=5, device=device)["median"]
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    own_bytes = torch.cuda.memory_allocated() if gpu else 0
    rank.run((m + 1) * q + -m * q % p + p)  # whole cycles, until the history is full
    rank.run(-rank.calls % p)
    seconds, accepted = [], rank.timers.accelerated
    for _ in range(cycles):
        before = rank.timers.settle()
        rank.run(p)
        seconds.append({k: v - before[k] for k, v in rank.timers.settle().items()})
    peak_bytes = torch.cuda.max_memory_allocated() - own_bytes if gpu else None
    bandwidth = (before_all + copy_bandwidth(repeats=5, device=device)["median"]) / 2
    by_step = []
    with (
        rank.counting() as (kernels, seen),
        gpu_synchronizations(lambda: rank.timers.part) as warned,
    ):
        found = warned if gpu else seen.found
        for _ in range(p):
            so_far = sum(found.values())
            rank.run(1)
            by_step.append(sum(found.values()) - so_far)
    if rank.timers.accelerated - accepted != cycles + 1:
        raise RuntimeError(
            f"an acceleration step was rejected and did not do all of its work: {rank.timers}"
        )
    return {
        "parameters": n,
        "ranks": ranks,
        "layout": config.layout,
        "p": p,
        "q": q,
        "rows": rank.rows.stop - rank.rows.start,
        "bytes": rank.accelerator.history_bytes,
        "bandwidth": bandwidth,
        "seconds": {part: spread([cycle[part] for cycle in seconds]) for part in seconds[0]},
        "launches": kernels.found,
        "synchronizations": found,
        "synchronizations_by_step": by_step,
        "peak_bytes": peak_bytes,
    }


class _Rank:
    """One rank of P on its own, with a problem to accelerate."""

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        config: AndersonConfig,
        ranks: int,
        device: torch.device,
    ) -> None:
        n = sum(shape.numel() for shape in shapes)
        generator = torch.Generator().manual_seed(0)
        self._curvature = torch.rand(n, generator=generator).mul_(0.9).add_(0.1).to(device)
        self._w, self._g = torch.empty(n, device=device), torch.empty(n, device=device)
        parameters = [
            torch.nn.Parameter(part.view(shape))
            for part, shape in zip(self._w.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        for p, part in zip(parameters, self._g.split([s.numel() for s in shapes]), strict=True):
            p.grad = part.view(p.shape)
        self._parameters = parameters
        optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=1e-4)
        self._problem = OptimizerFixedPoint(optimizer, config.residual)
        block = -(-n // ranks)
        rank = min(ranks // 2, (n - 1) // block)  # in the middle, and not an empty one
        lo, hi = (rank * block, min((rank + 1) * block, n)) if config.layout == "rows" else (0, n)
        self.rows = slice(lo, hi)
        weights = torch.rand(max(n, ranks * block), generator=generator).to(device)
        self._points = torch.randn(hi - lo + 4096, generator=generator).to(device)
        self._w.copy_(weights[:n])
        if config.layout == "columns":
            rank = 0  # no rank holds more columns
        self.timers = _Timers(device)
        with mock.patch.object(state, "Stats", lambda **_: self.timers):  # parts share one
            self.accelerator = Accelerator(config, OneOfMany(ranks, rank, weights))
        if config.noise_gate is not None:
            self._problem.sample_gradients(1, 1.0)
            samples = cast(GradientSamples, self._problem.samples)
            self._problem.samples = cast(Any, _TimedSamples(samples, self.timers))
        self._config, self._loss = config, torch.ones((), device=device)
        self._generator = np.random.default_rng(0)
        self.calls = 0

    def run(self, steps: int) -> None:
        """Takes steps; only the work of acceleration is timed.

        The residuals here are random. They are treated as if they changed slowly, so that R^T r is
        carried forward on a CPU.
        """
        with mock.patch.object(gram, "DRIFT", math.inf):
            for _ in range(steps):
                self._step()

    @contextlib.contextmanager
    def counting(self) -> Iterator[tuple[_Kernels, _Synchronizations]]:
        """Context that counts kernels and synchronizations, with a GPU's length of chunks."""
        kernels, synchronizations = _Kernels(self.timers), _Synchronizations(self.timers)
        with contextlib.ExitStack() as stack:
            for module in (chunking, replicas):
                stack.enter_context(mock.patch.object(module, "CHUNK", module.CHUNK_GPU))
            started = kernels.started(library_kernels._on)
            stack.enter_context(mock.patch.object(library_kernels, "_on", started))
            stack.enter_context(synchronizations)
            stack.enter_context(kernels)
            yield kernels, synchronizations

    def _step(self) -> None:
        accelerator, problem, config = self.accelerator, self._problem, self._config
        self.calls += 1
        acts = self.calls % config.store_every == 0 or self.calls % config.frequency == 0
        sampled = accelerator.measures_noise
        if acts:
            offset = int(self._generator.integers(4096))
            self._w[self.rows].copy_(self._points[offset : offset + len(self._points) - 4096])
        if acts or sampled:
            torch.mul(self._curvature, self._w, out=self._g)
        if sampled and problem.samples is not None:
            with torch.no_grad():
                with self.timers.timed(BACKWARD):
                    for parameter in self._parameters:
                        problem.samples.take(parameter)
                problem.samples.take_mean()

        def advance() -> None:
            with self.timers.timed(RESIDUAL):
                problem.keep_gradient()

        problem.base_step = problem.skip_step = advance
        accelerator.observe(self._loss)
        with self.timers.timed(OTHER):
            accelerator.step(problem)
        problem.forget_gradient()
