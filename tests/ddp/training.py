"""A small model, and its training: each rank on its part of the data, or one on all of them."""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

ROWS = 72  # divisible by 2, 3 and 4


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def data(k, part=slice(None), dtype=torch.float64):
    """The batch of step k: [rows, 6] and [rows, 3], new targets in every step."""
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    generator.manual_seed(1000 + k)
    y = torch.tanh(x[:, :3]) + 0.1 * torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return x[part].to(dtype), y[part].to(dtype)


def mine(rank=None, size=None):
    rank = dist.get_rank() if rank is None else rank
    return slice(rank, None, dist.get_world_size() if size is None else size)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | settings)


def train(model, opt, steps, part=None, observe=False, passes=1, clip=None, first=0):
    """Takes steps; returns the weights after each, [steps, n].

    Args:
        model: plain, or in DistributedDataParallel.
        opt: its optimizer.
        steps: how many.
        part: rows of each batch; None: this rank's.
        observe: whether to call `observe`.
        passes: micro-batches of a step, all but the last within `no_sync`.
        clip: the largest norm of the gradient.
        first: number of the first step.
    """
    part, path = mine() if part is None else part, []
    dtype = next(model.parameters()).dtype
    for k in range(first, first + steps):
        x, y = data(k, part, dtype)
        opt.zero_grad()
        for i, (inputs, targets) in enumerate(zip(x.chunk(passes), y.chunk(passes), strict=True)):
            waits = passes > 1 and i < passes - 1 and hasattr(model, "no_sync")
            with model.no_sync() if waits else contextlib.nullcontext():
                loss = (model(inputs) - targets).square().mean() / passes
                loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if observe:
            opt.observe(loss * passes)
        opt.step()
        path.append(weights(model))
    return torch.stack(path)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def wrapped(model=None, **options):
    return DistributedDataParallel(copy.deepcopy(model) if model else network(), **options)


def assert_same_on_all(tensor, group=None):
    everybodys = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybodys, tensor.contiguous(), group=group)
    for rank, other in enumerate(everybodys):
        assert torch.equal(other, tensor), f"rank {rank} holds other bits"
