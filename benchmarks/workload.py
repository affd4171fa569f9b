"""A problem whose gradient costs next to nothing, so that the optimizer is measured.

f(w) = 1/2 <w, D w> with a random positive diagonal D, on parameters of the shapes of a network.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.report import spread
from models import networks
from models.errors import UserError

CPU = torch.device("cpu")
# The library's timers of an acceleration step and the stores before it, in their order.
# "safeguard" is left out: it does nothing if every point is taken.
CYCLE_PARTS = (
    "read",
    "replicas",
    "noise",
    "store",
    "gram",
    "solve",
    "update",
    "gather",
    "write",
    "average",
)


class Clock:
    """Times work on a device; on a GPU by events in its stream, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Marks this moment; on a GPU, the moment when its stream gets here."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Waits until the device has done all its work. Needed before `seconds`."""
        if self._gpu:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""
        return float(start.elapsed_time(end)) / 1e3 if self._gpu else float(end - start)

    def time(self, work: Callable[[], Any]) -> float:
        """Seconds that the device takes for `work`."""
        start = self.mark()
        work()
        end = self.mark()
        self.synchronize()
        return self.seconds(start, end)


@contextlib.contextmanager
def gpu_synchronizations(part: Callable[[], str | None]) -> Iterator[dict[str, int]]:
    """Counts the synchronizations of the host with the GPU, by part, as far as torch warns of them.

    `part` returns the present part; None: not counted. Without a GPU the result is empty.
    """
    found: dict[str, int] = {}

    def note(message: Any, *_: Any, **__: Any) -> None:
        name = part()
        if name is not None and "synchronizing CUDA" in str(message):
            found[name] = found.get(name, 0) + 1

    if not torch.cuda.is_available():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


def copy_bandwidth(
    numbers: int = 2**25, repeats: int = 9, device: torch.device = CPU
) -> dict[str, float]:
    """Measures the bytes per second, read and written, of a copy far larger than caches."""
    source, target = torch.ones(numbers, device=device), torch.zeros(numbers, device=device)
    clock = Clock(device)
    target.copy_(source)
    clock.synchronize()
    times = [clock.time(lambda: target.copy_(source)) for _ in range(repeats)]
    return spread([2 * 4 * numbers / seconds for seconds in times])


def shapes_of(name: str) -> list[torch.Size]:
    """Shapes of the parameters of a network of `models.networks`.

    `name` may be a number of entries. They are split evenly into as many tensors as ResNet50 has.

    Raises:
        UserError: the name is neither a network nor a number.
    """
    if name.isdigit() and int(name) > 0:
        count = len(shapes_of("resnet50"))
        ends = [int(name) * i // count for i in range(count + 1)]
        return [torch.Size([b - a]) for a, b in itertools.pairwise(ends) if b > a]
    try:
        with torch.device("meta"):
            network = networks.build(name, 1000)
    except (UserError, ValueError, KeyError) as error:
        raise UserError(
            f"--parameters is {name!r}, must be a network such as resnet50 or a number"
        ) from error
    return [parameter.shape for parameter in network.parameters()]


class Workload:
    """Parameters and their gradients.

    Args:
        shapes: shapes of the parameters.
        seed: seed of weights and D, the same on all ranks.

    Attributes:
        parameters: parameters of these shapes, float32 on the CPU.
    """

    def __init__(self, shapes: Sequence[torch.Size], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        ]
        # Eigenvalues over two decades; at the learning rate used, lr D < 1.
        self._curvatures = [
            10.0 ** (-2.0 * torch.rand(shape, generator=generator)) for shape in shapes
        ]
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    @property
    def n(self) -> int:
        """The number of entries of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def named(self, prefix: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters with names, as Horovod wants them. Each optimizer needs its own prefix."""
        return [(f"{prefix}.{i}", parameter) for i, parameter in enumerate(self.parameters)]

    def backward(self) -> None:
        """Sets the gradient, as the backward pass of the loss at the present weights would."""
        with torch.no_grad():
            for parameter, curvature in zip(self.parameters, self._curvatures, strict=True):
                assert parameter.grad is not None
                torch.mul(parameter, curvature, out=parameter.grad)
