"""Batch-norm statistics that belong to the weights in place, whatever weights those are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aadl_hvd.comm.base import Communicator


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers that keep running statistics, in the model's order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Afterwards running statistics and training mode are what they were, bit for bit."""
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


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    comm: Communicator,
    forward: Callable[[Any], Any] | None = None,
) -> None:
    """Measures running statistics anew: the plain mean over batches and ranks. Collective.

    Second moments are averaged over ranks, not variances, so that differences between the ranks'
    means count as variance.

    Args:
        model: in which layers without running statistics, and training modes, stay as they are.
        batches: of this rank, at least one.
        comm: the ranks.
        forward: what to call with a batch; None: the model, as ordinary forward passes do.
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
    if comm.size > 1:
        _average(norms, comm)


def _average(norms: list[_BatchNorm], comm: Communicator) -> None:
    kept: list[tuple[Tensor, Tensor]] = [
        (norm.running_mean, norm.running_var)
        for norm in norms
        if norm.running_mean is not None and norm.running_var is not None
    ]
    means = torch.cat([mean.double() for mean, _ in kept])
    squares = torch.cat([var.double() for _, var in kept]) + means**2
    total = comm.sum_tensor(torch.cat([means, squares])) / comm.size
    means, squares = total.chunk(2)
    sizes = [len(mean) for mean, _ in kept]
    for (mean, var), new_mean, new_square in zip(
        kept, torch.split(means, sizes), torch.split(squares, sizes), strict=True
    ):
        mean.copy_(new_mean)
        var.copy_((new_square - new_mean**2).clamp_min_(0.0))
