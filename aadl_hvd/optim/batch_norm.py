"""Batch-norm statistics that belong to the weights in place and to the images of all ranks.

`mean_over_ranks` is what brings ranks together here: a collective that returns the mean of a
float64 vector over ranks, such as `hvd.allreduce`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Mean = Callable[[Tensor], Tensor]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers that keep running statistics, in the model's order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    mean_over_ranks: Mean,
    forward: Callable[[Any], Any] | None = None,
) -> None:
    """Measures running statistics anew: the plain mean over batches and ranks. Collective.

    Running statistics follow weights that move a little at a time; after an accelerated or an
    averaged step they belong to weights that no longer exist. Other layers, and training modes,
    stay as they are. With SyncBatchNorm all ranks need equally many batches.

    Args:
        model: nothing happens where no layer has running statistics.
        batches: of this rank, at least one.
        mean_over_ranks: see above.
        forward: what to call with a batch; None: the model.
    """
    norms = batch_norms(model)
    if not norms:
        return
    modes = [(norm, norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                (forward or model)(batch)
    finally:
        for norm, training, momentum in modes:
            norm.training, norm.momentum = training, momentum
    average_batch_norm(model, mean_over_ranks)


@torch.no_grad()
def average_batch_norm(model: nn.Module, mean_over_ranks: Mean) -> None:
    """Gives all ranks the running statistics of their images together. Collective.

    Every rank sees other images: without this they would evaluate different models, and a
    checkpoint would hold those of one rank alone. Second moments are averaged, not variances, so
    that differences between the ranks' means count as variance.

    Args:
        model: nothing happens where no layer has running statistics.
        mean_over_ranks: see above.
    """
    statistics: list[tuple[Tensor, Tensor]] = [
        (norm.running_mean, norm.running_var)
        for norm in batch_norms(model)
        if norm.running_mean is not None and norm.running_var is not None
    ]
    if not statistics:
        return
    means = torch.cat([mean.double() for mean, _ in statistics])
    squares = torch.cat([var.double() for _, var in statistics]) + means**2
    means, squares = mean_over_ranks(torch.cat([means, squares])).chunk(2)
    sizes = [len(mean) for mean, _ in statistics]
    for (mean, var), new_mean, new_square in zip(
        statistics, torch.split(means, sizes), torch.split(squares, sizes), strict=True
    ):
        mean.copy_(new_mean)
        var.copy_((new_square - new_mean**2).clamp_min_(0.0))


@contextlib.contextmanager
def kept_batch_norm(model: nn.Module) -> Iterator[None]:
    """Afterwards running statistics and training modes are what they were, bit for bit."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [b for norm in batch_norms(model) for b in norm.buffers(recurse=False)]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in zip(buffers, saved, strict=True):
                buffer.copy_(values)
        for module, training in modes:
            module.training = training
