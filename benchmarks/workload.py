"""Something to optimize whose gradient costs next to nothing, so that the optimizer is measured.

f(w) = 1/2 <w, D w> with a random positive diagonal D, on parameters of the shapes of a network.
"""

from __future__ import annotations

import itertools
import time

import torch
from torch import nn

from benchmarks.report import spread
from models import networks
from models.errors import UserError


def copy_bandwidth(numbers: int = 2**25, repeats: int = 9) -> dict[str, float]:
    """Bytes per second, read and written, of a copy far larger than caches; measured."""
    source, target = torch.ones(numbers), torch.zeros(numbers)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        target.copy_(source)
        found.append(2 * 4 * numbers / (time.perf_counter() - started))
    return spread(found)


def shapes_of(name: str) -> list[torch.Size]:
    """Shapes of the parameters of a network of `models.networks`.

    A number in place of a name: as many numbers, in as many alike tensors as ResNet50 has.
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
        shapes: of the parameters.
        seed: of weights and D, the same on all ranks.

    Attributes:
        parameters: of the shapes given, float32 on the CPU.
    """

    def __init__(self, shapes: list[torch.Size], seed: int = 0) -> None:
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
        """How many numbers the parameters are."""
        return sum(parameter.numel() for parameter in self.parameters)

    def named(self, prefix: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters with names, as Horovod wants them: another prefix for every optimizer."""
        return [(f"{prefix}.{i}", parameter) for i, parameter in enumerate(self.parameters)]

    def backward(self) -> None:
        """Sets the gradient, as the backward pass of the loss at the present weights would."""
        with torch.no_grad():
            for parameter, curvature in zip(self.parameters, self._curvatures, strict=True):
                assert parameter.grad is not None
                torch.mul(parameter, curvature, out=parameter.grad)
