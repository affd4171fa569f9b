"""Horovod elastic: ranks come and go, each with its shard of the history.

    state = aadl_hvd.elastic.TorchState(model=model, optimizer=opt, epoch=0, batch=0)

and everything else as with `horovod.torch.elastic`, `hvd.elastic.run` included.

What is committed of the optimizer is every rank's own: the base optimizer's state and this rank's
shard of the history. When ranks have come or gone, they tell each other what shards they hold; if
these make a whole, each goes to the rank it falls to now, else the history is reset on all. Ranks
that were there before and new ones enter the same collectives, in `TorchState.sync` alone: a
distributed optimizer made in an elastic job waits for nobody.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.checkpoint import transfer
from aadl_hvd.checkpoint.shard_state import ShardState
from aadl_hvd.engines.distributed import DistributedAndersonOptimizer
from aadl_hvd.errors import CheckpointError, UnsupportedError
from aadl_hvd.optim import job
from aadl_hvd.optim.accelerated import AcceleratedOptimizer
from aadl_hvd.optim.loading import anderson_state
from aadl_hvd.stats import Reset

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HostsUpdatedInterrupt
    from horovod.torch.elastic import state as horovods
except Exception as error:
    raise job.horovod_missing(error) from error

__all__ = ["TorchState"]

_log = logging.getLogger("aadl_hvd")


class TorchState(hvd.elastic.TorchState):  # type: ignore[misc]
    """`horovod.torch.elastic.TorchState` for optimizers with Anderson acceleration.

    Arguments, attributes and methods are Horovod's. What is different:

    - `commit` copies this rank's shard of the history to host memory, 2 m n/P numbers and a few
      more, beside what Horovod copies; `restore` puts back exactly that.
    - `sync` gives every rank the shard that is its own now, and ends with a commit. It is called
      after every change of hosts: Horovod leaves it out where hosts are only removed.
    - before ranks leave for a change of hosts that was announced, each hands a copy of its shard to
      a rank of another host, so that the history survives the loss of one.

    What happened to the history is said by rank 0 through the logger "aadl_hvd": level INFO where
    it was kept, WARNING where it is reset, and why.
    """

    def sync(self) -> None:
        """As Horovod's. Collective: ranks that were there before, and new ones."""
        super().sync()
        self.save()

    def check_host_updates(self) -> None:
        """As Horovod's. Collective."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:  # on every rank, while all are still there
            for handler in self._handlers.values():
                if isinstance(handler, AndersonStateHandler):
                    handler.hand_over()
            # Without a sync, one who joins as others leave would wait for ever.
            raise HostsUpdatedInterrupt(skip_sync=False) from None


class AndersonStateHandler(horovods.StateHandler):  # type: ignore[misc]
    """What `TorchState` does about an optimizer with Anderson acceleration.

    Args:
        optimizer: what `DistributedAndersonOptimizer` returned.
    """

    value: DistributedAndersonOptimizer

    def __init__(self, optimizer: DistributedAndersonOptimizer) -> None:
        super().__init__(optimizer)
        self._handed: list[dict[str, Any]] = []  # shards of other ranks
        self.save()

    def save(self) -> None:
        """Copies what this rank has."""
        accelerator = self.value.anderson
        self._ranks = accelerator.comm, accelerator.group
        # The base's state where it is, as Horovod keeps it; the shard comes in host memory.
        self._saved = copy.deepcopy(_state(self.value))
        self._shard = _shard(self.value)

    def restore(self) -> None:
        """Puts back what this rank had, under the sharding of then."""
        self._handed = []
        self.value.anderson_engine.connect(*self._ranks, _calls(self._shard))
        # Not the copy itself: torch would go on in its tensors.
        _load(self.value, copy.deepcopy(self._saved), self._shard)

    def sync(self) -> None:
        """Goes on with the ranks of now, on all of them, in the state of rank 0. Collective."""
        optimizer = self.value
        own = _shard(optimizer)
        engine = optimizer.horovod_engine
        comm, group = engine.meet()
        shards = _readable([shard for shard in (own, *self._handed) if shard is not None])
        unreadable = own is not None and not shards  # rank 0's says which history it is
        state, calls, unreadable = _of_rank_0((_state(optimizer), _calls(own), unreadable))
        engine.connect(comm, group, calls)
        problem, accelerator = engine.problem, engine.accelerator
        new, lost = transfer.redistribute(comm, shards, accelerator.share(problem.n))
        lost = "the shard of rank 0 is damaged" if unreadable else lost
        _load(optimizer, state, None if new is None else new.to_dict())
        if lost:
            accelerator.stats.resets[Reset.RANKS.value] += 1
        if hvd.rank() == 0 and own is not None:
            _log_history(own, comm.size, lost)
        accelerator.check_memory(problem)
        accelerator.compare_replicas(problem)  # equal now, they must stay it
        self._handed = []
        self.save()

    def hand_over(self) -> None:
        """Hands this rank's shard to a rank of another host, if there is one. Collective."""
        accelerator = self.value.anderson
        comm = accelerator.comm
        if comm.size == 1 or accelerator.group.count > 1:  # other groups have the same
            return
        hosts = comm.allgather_object(os.environ.get("HOROVOD_HOSTNAME", socket.gethostname()))
        to = _elsewhere(hosts, comm.rank)
        sent = {}
        if to is not None:
            try:
                sent[to] = transfer.bytes_of(_shard(self.value))
            except CheckpointError as error:  # the others are in step with this rank: it must go on
                _log.warning(
                    "elastic: the shard of rank %d is not handed over: %s", comm.rank, error
                )
        arrived = comm.all_to_all(sent)
        self._handed = [transfer.from_bytes(data) for data in arrived.values()]


def _elsewhere(hosts: Sequence[str], rank: int) -> int | None:
    """A rank on another host than `rank`; those of one host choose different ones, if they can."""
    after = [*range(rank + 1, len(hosts)), *range(rank)]
    others = [other for other in after if hosts[other] != hosts[rank]]
    return others[hosts[:rank].count(hosts[rank]) % len(others)] if others else None


def _state(optimizer: DistributedAndersonOptimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its `state_dict`, of which hooks may have made anything, and what goes with a history."""
    accelerator = optimizer.anderson
    full, accelerator.full_state = accelerator.full_state, None  # rank 0 has asked for it
    try:
        return optimizer.state_dict(), anderson_state(optimizer.anderson_engine)
    finally:
        accelerator.full_state = full


def _load(
    optimizer: DistributedAndersonOptimizer,
    state: tuple[dict[str, Any], dict[str, Any]],
    shard: dict[str, Any] | None,
) -> None:
    """Loads what `_state` has said, and a shard of the history."""
    base, anderson = state
    optimizer.load_state_dict(base)
    optimizer.load_state_dict({"anderson": anderson | {"history": shard}})


def _shard(optimizer: DistributedAndersonOptimizer) -> dict[str, Any] | None:
    """This rank's shard, a copy in host memory; None if it has none yet."""
    if not optimizer.anderson.has_shard_state:
        return None
    shard: dict[str, Any] = optimizer.sharded_state_dict()["anderson"]["history"]
    return shard


def _readable(shards: Sequence[dict[str, Any]]) -> list[ShardState]:
    """Those that can be read. Others are lost, as if their ranks had left: nobody ends for them."""
    found = []
    for shard in shards:
        with contextlib.suppress(CheckpointError):
            found.append(ShardState.from_dict(shard, "history"))
    return found


def _calls(shard: dict[str, Any] | None) -> int:
    return 0 if shard is None else int(shard["calls"])


def _of_rank_0(value: Any) -> Any:
    """Nested containers of rank 0, bit for bit; large tensors through host memory. Collective.

    Horovod's `broadcast_optimizer_state` takes a step on ranks that have no state yet, in which
    weight decay moves the weights.
    """
    rest, large = transfer.take_apart(value)
    sizes = [tensor.numel() * tensor.element_size() for tensor in large]
    rest, sizes = hvd.broadcast_object((rest, sizes), name="aadl_hvd.elastic")
    received: list[Tensor] = []
    for i, size in enumerate(sizes):
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
        if hvd.rank() == 0:
            data = large[i].detach().cpu().reshape(-1).view(torch.uint8)
        received.append(hvd.broadcast_(data, 0, name="aadl_hvd.elastic.tensor"))
    return transfer.put_together(rest, received)


def _log_history(own: dict[str, Any], ranks: int, lost: str) -> None:
    columns, calls = own["columns"], own["calls"]
    where = f"elastic: {ranks} rank{'s' * (ranks > 1)}, {own['ranks']} before, after step {calls}:"
    if lost:
        _log.warning("%s the history is reset, %s", where, lost)
    elif columns["stored"]:
        _log.info("%s the history goes on, %d columns resharded", where, columns["count"])
    elif own["subspace"] is not None:
        blocks = own["subspace"]["blocks"]["stored"]
        _log.info("%s the history goes on, means of %d blocks resharded", where, blocks)


def _handler(optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(optimizer, DistributedAndersonOptimizer):
        return AndersonStateHandler(optimizer)
    if isinstance(optimizer, AcceleratedOptimizer):
        raise UnsupportedError(
            "Invalid AndersonOptimizer in an elastic state: it is for one process. Must be made by "
            "DistributedAndersonOptimizer."
        )
    return horovods.OptimizerStateHandler(optimizer)


# The first that matches is taken: Horovod's would put rank 0's shard over everybody's.
horovods.get_handler_registry().insert(0, (torch.optim.Optimizer, _handler))
