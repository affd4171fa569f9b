"""Collectives by which the ranks of the training program agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from models.errors import UserError
from models.horovod import hvd

T = TypeVar("T")


def on_rank0(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and gives its result to all ranks.

    For work that would overload a shared file system if every rank did it, or that could have
    different results on different ranks. Collective.

    Args:
        work: Called without arguments, on rank 0 only; its result has to be picklable.

    Returns:
        The result of rank 0's call, on every rank.

    Raises:
        UserError: On every rank, when rank 0's call raised it.
    """
    result, problem = None, None
    if hvd.rank() == 0:
        try:
            result = work()
        except UserError as error:
            problem = str(error)
    result, problem = hvd.broadcast_object((result, problem), root_rank=0, name="on_rank0")
    if problem is not None:
        raise UserError(problem)
    return result


def gather(value: T) -> list[T]:
    """Collects a small picklable value of every rank, in rank order, on all ranks. Collective."""
    return hvd.allgather_object(value, name="gather")


def fail_together(problem: str | None) -> None:
    """Raises on every rank if any rank has a problem. Collective.

    Args:
        problem: The problem of this rank, or None.

    Raises:
        UserError: On every rank, with the same message.
    """
    problems = [(rank, text) for rank, text in enumerate(gather(problem)) if text is not None]
    if not problems:
        return
    rank, text = problems[0]
    others = len({text for _, text in problems}) - 1
    where = f"rank {rank}: " if hvd.size() > 1 and len(problems) < hvd.size() else ""
    raise UserError(where + text + (f" ({others} more on other ranks)" if others else ""))


def sum_over_ranks(values: Iterable[float], name: str) -> list[float]:
    """Sums a few numbers over all ranks in float64. Collective."""
    total = hvd.allreduce(torch.tensor(list(values), dtype=torch.float64), name=name, op=hvd.Sum)
    return total.tolist()


def start() -> None:
    """Initialises Horovod and shares this machine's cores among its ranks.

    If OMP_NUM_THREADS is set, the number of threads is left as it is.
    """
    cores = len(os.sched_getaffinity(0))
    hvd.init()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // hvd.local_size()))


def launcher() -> str | None:
    """Name of the program that started the ranks; None for a single rank without a launcher."""
    for name, program in (
        ("JSM_NAMESPACE_RANK", "jsrun"),
        ("OMPI_COMMAND", "mpirun"),
        ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "horovodrun"),
    ):
        if name in os.environ:
            return program
    if hvd.size() == 1:
        return None
    return "srun" if "SLURM_STEP_ID" in os.environ else "the launcher"
