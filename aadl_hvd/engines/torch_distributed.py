"""torch.distributed as an engine: gradients are reduced when the backward pass ends.

`DistributedDataParallel` does that, and nothing of it is touched here: own gradients are not
looked at. So the noise of the gradient is estimated from successive steps, as in one process.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.engines.rank_checks import accepted_by_all, check_distributable, compare_ranks
from aadl_hvd.errors import ConfigError, ReplicaMismatchError, UnsupportedError
from aadl_hvd.optim.accelerated import AcceleratedOptimizer
from aadl_hvd.optim.checks import check_optimizer, checked_config
from aadl_hvd.optim.engine import Engine
from aadl_hvd.optim.problem import OptimizerFixedPoint
from aadl_hvd.optim.shards import mesh_of

_Public = TypeVar("_Public", bound=AcceleratedOptimizer)

# Ranks add up the same gradients. Different processors may do so in different orders.
_ROUNDING = 1e-6


class TorchEngine(Engine):
    """Gradients are reduced when a step begins. The first step makes sure of it.

    Args:
        mesh: over which FSDP2 has sharded the parameters, and so the gradients; None: it has not.
    """

    reduces_gradients = False

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.mesh, self.sharded = mesh, mesh is not None
        self._compared = False

    def reduce(self) -> None:
        """Compares the gradients, in the first step. They have been reduced already. Collective.

        Those of sharded parameters are no rank's alone: FSDP2 has reduced them.

        Raises:
            ReplicaMismatchError: on every rank, if the gradients differ.
        """
        if self._compared or not self.accelerator.config.enabled:
            return
        self._compared = True
        if not (compared := self.problem.replicated if self.sharded else self.problem.tensors):
            return
        size = _absolute_sum(compared)
        largest, negative = self.accelerator.comm.allreduce(np.array([size, -size]), "max")
        if largest + negative > _ROUNDING * largest:
            raise ReplicaMismatchError(
                "Gradients differ between ranks in the first step: the sums of their absolute "
                f"values reach from {-negative:.9g} to {largest:.9g}. Must be the same when step() "
                "is called: train the model inside DistributedDataParallel, with the same "
                "process_group, and call step() outside of its no_sync(). Average by yourself the "
                "gradients of parameters that fully_shard has not sharded."
            )


def accelerate(
    public: type[_Public],
    optimizer: torch.optim.Optimizer,
    process_group: Any,
    anderson: AndersonConfig | None,
) -> _Public:
    """An accelerated optimizer of a model in `DistributedDataParallel` or FSDP2. Collective.

    The class `public` has the methods that come first, see `accelerated_class`. The other
    arguments are those of `DistributedAndersonOptimizer`, and so are the errors.
    """
    from aadl_hvd.comm.torch_distributed import shard_group, torch_communicator

    comm = torch_communicator(process_group)
    config, mesh = accepted_by_all(comm, lambda: _accept(optimizer, anderson, comm))
    sharded = mesh is not None
    compare_ranks(comm, optimizer, config, {"sharded": sharded})
    engine = TorchEngine(mesh)
    accepted_by_all(comm, lambda: OptimizerFixedPoint(optimizer, config.residual, None, sharded))
    group = _own_shard(mesh) if sharded else shard_group(comm, config.shard_group)
    made = public.accelerate(optimizer, engine, config, comm, group)
    made.anderson.check_memory(engine.problem)
    made.anderson.compare_replicas(engine.problem)  # if equal now, they must stay it
    return made


def _accept(
    optimizer: torch.optim.Optimizer, anderson: AndersonConfig | None, comm: Communicator
) -> tuple[AndersonConfig, Any]:
    """The settings, and the mesh over which FSDP2 has sharded the parameters, or None."""
    config = checked_config(anderson)
    if hasattr(config.shard_group, "included"):
        raise ConfigError(
            f"Invalid shard_group={config.shard_group!r} with torch.distributed. Must be 'world', "
            "'node', a process group of torch.distributed or a DeviceMesh of one dimension."
        )
    check_optimizer(optimizer)
    check_distributable(optimizer)
    kind = type(optimizer)
    if kind.__module__.startswith("torch.distributed.optim"):
        raise UnsupportedError(
            f"Invalid optimizer {kind.__name__}, whose ranks hold different states or make "
            "different steps. Must be a plain torch optimizer with the same parameters on all "
            "ranks; the history is shared out by itself."
        )
    mesh = mesh_of(p for group in optimizer.param_groups for p in group["params"])
    if mesh is not None:
        _check_sharded(config, mesh, comm)
    return config, mesh


def _own_shard(mesh: Any) -> ShardGroup:
    """With FSDP2 a rank has its own part of everything, and writes nobody else's.

    Ranks that hold a copy of the same part (HSDP) share the work of sums over it.
    """
    copies = (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim > 1 else (1, 0)
    return ShardGroup(LocalCommunicator(), *copies)


def _check_sharded(config: AndersonConfig, mesh: Any, comm: Communicator) -> None:
    """Raises a ConfigError for what cannot be with parameters that FSDP2 has sharded."""
    if mesh.size() != comm.size:
        raise ConfigError(
            f"Invalid process_group of {comm.size} ranks. Must be that of the parameters, which "
            f"fully_shard has sharded over {mesh.size()}: process_group=mesh; HSDP takes all ranks "
            "of the job and no process_group."
        )
    for name, value, allowed in (
        ("layout", config.layout, ("rows",)),
        ("shard_group", config.shard_group, ("world",)),
        ("safeguard", config.safeguard, ("descent", "loss", "none")),
    ):
        if value not in allowed:
            raise ConfigError(
                f"Invalid {name}={value!r} with parameters that fully_shard has sharded: each rank "
                f"has its own rows of everything. Must be one of {allowed}."
            )


def _absolute_sum(parameters: list[Tensor]) -> float:
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    sums = [g.abs().sum(dtype=torch.float64) for g in dense]
    return float(torch.stack(sums).sum()) if sums else 0.0
