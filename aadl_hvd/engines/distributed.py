"""`DistributedAndersonOptimizer`: one name for all that reduces gradients over ranks.

The constructor finds out whether Horovod or torch.distributed runs this job, and leaves the rest to
`horovod.py` or `torch_distributed.py`. Importing this module imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from aadl_hvd.config import AndersonConfig
from aadl_hvd.engines import horovod, torch_distributed
from aadl_hvd.engines.sharded_history import HistoryFiles
from aadl_hvd.errors import ConfigError, UnsupportedError
from aadl_hvd.optim import job
from aadl_hvd.optim.accelerated import AcceleratedOptimizer

if TYPE_CHECKING:
    from horovod.torch import ProcessSet
    from horovod.torch.compression import Compressor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from aadl_hvd.engines.horovod_engine import HorovodEngine


class DistributedAndersonOptimizer(AcceleratedOptimizer):
    """Anderson acceleration for data-parallel training, with Horovod or torch.distributed.

    With Horovod it is a drop-in swap for `horovod.torch.DistributedOptimizer`, with the same
    arguments. With torch.distributed (torchrun) it takes the optimizer of a model in
    `DistributedDataParallel` (DDP) or `fully_shard` (FSDP2), which reduces the gradients:

        opt = DistributedAndersonOptimizer(opt, named_parameters=model.named_parameters())
        opt = DistributedAndersonOptimizer(opt)  # the same, in a program that torchrun starts

    Which of them it is: torch.distributed if `process_group` is given, or if it is initialised and
    Horovod is not; Horovod otherwise.

    The ranks share the history: each holds n/P rows of it (or, with `layout="columns"`, m/P
    columns; with `shard_group="node"` the ranks of a node share one). With FSDP2 these are the rows
    of its own shard, so that nothing large travels. Collective over the ranks that train together:
    configuration and parameter shapes are compared here.

    The result is an instance of the given optimizer's class with the attribute `anderson`, see
    `AndersonOptimizer`. State, defaults and hooks of the given optimizer are kept, and schedulers
    made before go on working.

    *With Horovod* step hooks fire as Horovod's do, twice a step: around all of it, and around the
    base optimizer's step, when gradients are reduced. So a pre-hook that clips gradients clips what
    the base optimizer uses, and residuals are made of that. The outer post-hook sees the
    accelerated weights. Differences from Horovod's own, all of them repairs: `zero_grad` takes
    `set_to_none`; state that `hvd.broadcast_optimizer_state` made up for a fresh optimizer is not
    kept; reductions that are under way end before a step pre-hook fires, and are not changed by it
    halfway; parameters that join later (`add_param_group`, unfreezing) are reduced; with a closure,
    gradients are reduced after it and before the update.

    *With torch.distributed* hooks fire once, around everything, as torch does. With DDP gradients
    must be the same on all ranks when `step` is called; the first step compares them. `no_sync`,
    communication hooks, unused parameters, static graphs and GradScaler work as in plain DDP. Not
    within `DistributedDataParallel.join`: a rank that has run out of data does not answer. The
    noise of the gradient is estimated from successive steps, as in one process.

    *With FSDP2* parameters must be sharded over one mesh, with HSDP over one of two dimensions and
    all ranks. The caller averages the gradients of those that are not sharded. `layout` must be
    "rows", `shard_group` "world" and `safeguard` not "residual". Sharded weights are not compared,
    for a rank has only its part of them. `save_history` and `load_history` take the place of
    `consolidate_state_dict`, which is refused. What `sharded_state_dict` returns is loaded by the
    same rank of as many. Load the base optimizer before this call: `torch.distributed.checkpoint`
    makes the state of a new optimizer by a step of its own.

    Args:
        optimizer: any `torch.optim.Optimizer` that the library takes.
        named_parameters: as in Horovod; not looked at with torch.distributed.
        compression: as in Horovod; None: `hvd.Compression.none`.
        backward_passes_per_step: as in Horovod.
        op: `hvd.Average`, `hvd.Sum` or `hvd.Adasum`; None: Average.
        gradient_predivide_factor: as in Horovod.
        num_groups: as in Horovod (deprecated there).
        groups: as in Horovod.
        sparse_as_dense: as in Horovod.
        process_set: as in Horovod; None: the global one.
        process_group: with torch.distributed: that of the model, or a `DeviceMesh` of one
            dimension; None: the default group.
        anderson: settings; None: `AndersonConfig()`, with `residual="step"` for Adasum, where no
            reduced gradient exists.

    Raises:
        HorovodMissingError: Horovod is not installed, was built without torch, or fails to load;
            and torch.distributed is not initialised.
        ConfigError: neither `hvd.init()` nor `torch.distributed.init_process_group()` has been
            called; an argument belongs to the other library; `anderson` is not an
            `AndersonConfig`, or does not go with Adasum; `compression` compresses nothing.
        UnsupportedError: as for `AndersonOptimizer`; LBFGS; with torch.distributed an optimizer
            whose ranks make different steps (ZeroRedundancyOptimizer), and parameters sharded in
            another way (tensor parallelism, FSDP1).
        ReplicaMismatchError: on every rank, if ranks differ in parameters or settings; in the first
            step, if gradients differ.
        HistoryMemoryError: on every rank, if the history of any does not fit into free memory.
    """

    anderson_engine: HorovodEngine | torch_distributed.TorchEngine

    def __new__(  # noqa: D102  (the class has the docstring)
        cls,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        compression: Compressor | type[Compressor] | None = None,
        backward_passes_per_step: int = 1,
        op: int | None = None,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: int | list[list[Tensor]] | None = None,
        sparse_as_dense: bool = False,
        process_set: ProcessSet | None = None,
        *,
        process_group: ProcessGroup | DeviceMesh | None = None,
        anderson: AndersonConfig | None = None,
    ) -> Self:
        of_horovod = {
            "compression": (compression, None),
            "backward_passes_per_step": (backward_passes_per_step, 1),
            "op": (op, None),
            "gradient_predivide_factor": (gradient_predivide_factor, 1.0),
            "num_groups": (num_groups, 0),
            "groups": (groups, None),
            "sparse_as_dense": (sparse_as_dense, False),
            "process_set": (process_set, None),
        }
        if process_group is not None or job.trains_with_torch_distributed():
            for name, (value, default) in of_horovod.items():
                if value is not default and value != default:
                    raise ConfigError(
                        f"Invalid {name}={value!r} with torch.distributed: it is an argument of "
                        "Horovod. Must be left out; DistributedDataParallel has its own ways to "
                        "accumulate, compress and group gradients."
                    )
            return torch_distributed.accelerate(cls, optimizer, process_group, anderson)
        return horovod.accelerate(
            cls,
            optimizer,
            named_parameters=named_parameters,
            anderson=anderson,
            **{name: value for name, (value, _) in of_horovod.items()},  # type: ignore[arg-type]
        )

    def save_history(self, folder: str | os.PathLike[str]) -> None:
        """Saves the history of parameters that FSDP2 has sharded. Collective.

        `torch.distributed.checkpoint` writes it, each rank its part. Model and base optimizer are
        saved as without this library.

        Args:
            folder: a new one that all ranks see. It is complete when this call returns.

        Raises:
            UnsupportedError: the parameters are not sharded; see `sharded_state_dict`.
            CheckpointError: on every rank, if any could not write its part.
        """
        self._history_files.save(folder)

    def load_history(self, folder: str | os.PathLike[str]) -> None:
        """Loads what `save_history` wrote, on any number of ranks. Collective.

        Each rank reads its part alone. After the model and the base optimizer are loaded, the
        training goes on as from `load_state_dict`: with the same mesh bit for bit, with another to
        rounding. On another mesh, what a rank alone knew of its losses and its noise begins anew.

        Args:
            folder: that of `save_history`.

        Raises:
            UnsupportedError: the parameters are not sharded.
            CheckpointError: on every rank, if any could not read its part: damaged, from another
                version, of another model.
        """
        self._history_files.load(folder)

    @property
    def _history_files(self) -> HistoryFiles:
        engine = self.anderson_engine
        if not engine.sharded:
            raise UnsupportedError(
                "Invalid save_history() or load_history() with parameters that fully_shard has not "
                "sharded. Must be sharded_state_dict() or consolidate_state_dict(), and "
                "load_state_dict()."
            )
        assert isinstance(engine, torch_distributed.TorchEngine)
        return HistoryFiles(engine, engine.mesh)

    # Horovod's methods

    def synchronize(self) -> None:
        """As in Horovod; parameters that joined after the construction are reduced, too."""
        self.horovod_engine.synchronize()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """As in Horovod: within, `step` does not reduce, for it follows `synchronize`."""
        skipping: AbstractContextManager[None] = self._horovods("skip_synchronize")
        return skipping

    def set_backward_passes_per_step(self, passes: int) -> None:
        """As in Horovod."""
        self._horovods("set_backward_passes_per_step", passes)

    # Horovod's hooks on parameters call these.

    def _allreduce_grad_async(self, p: Tensor) -> object:
        return self.horovod_engine.reduce_async(p)

    def _grouped_allreduce_grad_async(self, ps: Sequence[Tensor]) -> object:
        return self.horovod_engine.reduce_group_async(ps)

    def _horovods(self, method: str, *args: object) -> Any:
        return self.horovod_engine.horovods[method](self, *args)

    @property
    def horovod_engine(self) -> HorovodEngine:
        """The engine, where it is Horovod's.

        Raises:
            UnsupportedError: it is that of torch.distributed.
        """
        engine = self.anderson_engine
        if isinstance(engine, torch_distributed.TorchEngine):
            raise UnsupportedError(
                "Invalid call of a method of Horovod's optimizer with torch.distributed. "
                "DistributedDataParallel has reduced all gradients when backward() returns: leave "
                "the call out, and accumulate within the model's no_sync()."
            )
        return engine
