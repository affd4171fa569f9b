"""What this process is part of: Horovod, there or not, and other processes of the same job."""

from __future__ import annotations

import sys
from typing import Any

import torch

from aadl_hvd.errors import ConfigError, HorovodMissingError, UnsupportedError
from aadl_hvd.optim.shards import is_dtensor

# Each has a state of its own: a process in which one of them was initialised is in its job.
_HOROVODS = tuple(f"horovod.{of}" for of in ("torch", "tensorflow", "mxnet"))
# The module that classes of its distributed optimizers name as their own.
_HOROVODS_OPTIMIZERS = "horovod.torch.optimizer"


def processes() -> tuple[str, int]:
    """How many processes this one's job has, and which library says so. Loads none of them.

    Returns:
        "Horovod", "torch.distributed" or "MPI", and their number; 1 where none is initialised. The
        first of these that knows of most.
    """
    known = {"Horovod": _horovod_size(), "torch.distributed": _torch_size(), "MPI": _mpi_size()}
    return max(known.items(), key=lambda pair: pair[1])


def check_alone() -> None:
    """Refuses acceleration in one process that may be training a replica.

    What acceleration decides there from the losses, the noise and the rounding of one process does
    not reach the others.

    Raises:
        UnsupportedError: the job has more processes. All of them see the same job.
    """
    library, count = processes()
    if count == 1:
        return
    if library == "MPI":
        instead = (
            "Start Horovod (hvd.init()) or torch.distributed (init_process_group()) in them, and "
            "use DistributedAndersonOptimizer(optimizer)"
        )
    else:
        instead = "Use DistributedAndersonOptimizer(optimizer, model.named_parameters())"
        instead += " with the model in DistributedDataParallel" * (library != "Horovod")
    raise UnsupportedError(
        f"Invalid AndersonOptimizer in one of {count} processes of {library}: each process would "
        f"accelerate by itself, and replicas of one model would drift apart. {instead}. If every "
        "process trains a model of its own: AndersonOptimizer(..., independent=True)."
    )


def check_whole(parameter: torch.Tensor) -> None:
    """Refuses a parameter of which each process holds a part.

    Raises:
        UnsupportedError: it is sharded by FSDP, or is a DTensor of any kind.
    """
    if is_dtensor(parameter):
        kind = "a DTensor, as FSDP2 (fully_shard) and tensor parallelism make it"
    elif getattr(parameter, "_fsdp_flattened", False):  # FSDP marks those that it flattens
        kind = "sharded by FullyShardedDataParallel"
    else:
        return
    raise UnsupportedError(
        f"Invalid parameter: it is {kind}, and a process holds a part of it. Every process must "
        "hold whole parameters; with torch.distributed, DistributedAndersonOptimizer also takes "
        "those that fully_shard has sharded."
    )


def check_not_distributed(optimizer: torch.optim.Optimizer) -> None:
    """Raises an UnsupportedError for what `hvd.DistributedOptimizer` returned."""
    if type(optimizer).__module__ == _HOROVODS_OPTIMIZERS:
        raise UnsupportedError(
            "Invalid optimizer: it is a hvd.DistributedOptimizer. Pass the plain torch optimizer "
            "to DistributedAndersonOptimizer, with the arguments you gave to Horovod."
        )


def trains_with_torch_distributed() -> bool:
    """Whether torch.distributed is initialised in this process and Horovod is not.

    A group of one process says little: other libraries make one. A program that has imported
    Horovod then means Horovod, and has yet to initialise it.
    """
    size, imported = _torch_size(otherwise=0), "horovod.torch" in sys.modules
    return _horovod_size(otherwise=0) == 0 and (size > 1 or (size == 1 and not imported))


def check_started(hvd: Any) -> None:
    """Checks that Horovod knows the job.

    Args:
        hvd: the module `horovod.torch`.

    Raises:
        ConfigError: `hvd.init()` has not been called.
        UnsupportedError: other processes exist, and Horovod does not know of any.
    """
    if not hvd.is_initialized():
        raise ConfigError(
            "Invalid DistributedAndersonOptimizer before hvd.init(). Call hvd.init() first, or "
            "torch.distributed.init_process_group() in a program that torchrun starts."
        )
    others = _torch_size()
    if hvd.size() == 1 < others:
        raise UnsupportedError(
            f"Invalid DistributedAndersonOptimizer in one of {others} processes of "
            "torch.distributed, of which Horovod knows this one alone: replicas of one model would "
            "drift apart. Start the program with horovodrun and not with torchrun; or leave out "
            "hvd.init(), or give process_group=torch.distributed.group.WORLD, and train the model "
            "inside DistributedDataParallel. If every process trains a model of its own: "
            "AndersonOptimizer(..., independent=True)."
        )


def horovod_missing(error: Exception) -> HorovodMissingError:
    """The error to raise where `horovod.torch` cannot be imported, and why."""
    return HorovodMissingError.because(error)


def _horovod_size(otherwise: int = 1) -> int:
    """Processes of the job as Horovod knows it, `otherwise` where it is not initialised."""
    sizes = [otherwise]
    for name in _HOROVODS:
        hvd: Any = sys.modules.get(name)
        # Without them: under way to be imported, or built without this framework.
        if hasattr(hvd, "is_initialized") and hasattr(hvd, "size") and hvd.is_initialized():
            sizes.append(hvd.size())
    return max(sizes)


def _torch_size(otherwise: int = 1) -> int:
    """As `_horovod_size`, for torch.distributed."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return otherwise
    return distributed.get_world_size()


def _mpi_size() -> int:
    MPI: Any = sys.modules.get("mpi4py.MPI")
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized():
        return 1
    return int(MPI.COMM_WORLD.Get_size())
