"""Distributed Anderson acceleration for torch optimizers, on Horovod or torch.distributed.

    opt = DistributedAndersonOptimizer(opt, named_parameters=model.named_parameters())

Neither Horovod nor MPI is needed to import this package or to use `AndersonOptimizer`.
"""

from typing import Any

from aadl_hvd import checkpoint
from aadl_hvd.config import AndersonConfig
from aadl_hvd.engines.distributed import DistributedAndersonOptimizer
from aadl_hvd.errors import (
    AndersonError,
    CheckpointError,
    CommunicationError,
    ConfigError,
    HistoryMemoryError,
    HorovodMissingError,
    ReplicaMismatchError,
    UnsupportedError,
)
from aadl_hvd.optim.batch_norm import average_batch_norm, recalibrate_batch_norm
from aadl_hvd.optim.local import AndersonOptimizer
from aadl_hvd.optim.neumann import NeumannOptimizer

__all__ = [
    "AndersonConfig",
    "AndersonError",
    "AndersonOptimizer",
    "CheckpointError",
    "CommunicationError",
    "ConfigError",
    "DistributedAndersonOptimizer",
    "HistoryMemoryError",
    "HorovodMissingError",
    "NeumannOptimizer",
    "ReplicaMismatchError",
    "UnsupportedError",
    "average_batch_norm",
    "checkpoint",
    "recalibrate_batch_norm",
]
__version__ = "0.8.0"


def __getattr__(name: str) -> Any:
    """`aadl_hvd.elastic` imports Horovod: only when it is asked for."""
    if name == "elastic":
        import importlib

        return importlib.import_module("aadl_hvd.elastic")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
