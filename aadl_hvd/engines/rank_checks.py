"""What ranks tell each other before they train together: whether all accept, and have the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.errors import ReplicaMismatchError, UnsupportedError

_Accepted = TypeVar("_Accepted")


def accepted_by_all(comm: Communicator, accept: Callable[[], _Accepted]) -> _Accepted:
    """What `accept` returns. Collective.

    Raises:
        ReplicaMismatchError: another rank's `accept` raised an error.
        Exception: what `accept` raised on this rank.
    """
    try:
        accepted = accept()
    except Exception as error:
        comm.allgather_object(str(error) or type(error).__name__)
        raise
    for rank, refusal in enumerate(comm.allgather_object(None)):
        if refusal is not None:
            raise ReplicaMismatchError(f"Rank {rank} refused what this rank accepts: {refusal}")
    return accepted


def check_distributable(optimizer: torch.optim.Optimizer) -> None:
    """Raises an UnsupportedError for an optimizer that decides by what one rank knows."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "Invalid optimizer LBFGS. It decides from the loss of one rank how often it calls the "
            "closure; ranks would wait for each other for ever. AndersonOptimizer takes it."
        )


def compare_ranks(
    comm: Communicator,
    optimizer: torch.optim.Optimizer,
    config: AndersonConfig,
    arguments: Mapping[str, Any],
) -> None:
    """Raises an error where ranks differ: they would hang or diverge later. Collective.

    Args:
        comm: the ranks that train together.
        optimizer: its class and its parameters are compared.
        config: settings, which are compared.
        arguments: further values to compare, by name. Ranks must print them alike, see `by_index`.

    Raises:
        ReplicaMismatchError: on every rank; says what differs.
    """
    lines = [f"a {type(optimizer).__name__} optimizer"]
    lines += [f"{name}={value!r}" for name, value in {**config.to_dict(), **arguments}.items()]
    lines += [
        f"parameter {i}.{j}: shape {tuple(p.shape)}, {p.dtype}, requires_grad={p.requires_grad}"
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = comm.allgather_object(digest)
    if len(set(digests)) == 1:
        return
    everybody = comm.allgather_object(lines)
    rank = next(r for r, d in enumerate(digests) if d != digests[0])
    for here, there in itertools.zip_longest(everybody[0], everybody[rank], fillvalue="nothing"):
        if here != there:
            break
    raise ReplicaMismatchError(
        f"Ranks that share a history differ: rank 0 has {here}, rank {rank} has {there}. All must "
        "build the same model, optimizer and AndersonConfig before this call."
    )


def by_index(value: Any, optimizer: torch.optim.Optimizer) -> Any:
    """An argument that may hold parameters, with these named by their index in the optimizer."""
    names = {
        id(p): f"parameter {i}.{j}"
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    }

    def named(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [named(entry) for entry in value]
        return names.get(id(value), "a tensor") if isinstance(value, Tensor) else value

    return named(value)
