"""The history of parameters that FSDP2 has sharded, in files of torch.distributed.checkpoint (DCP).

A vector of the history has a number for each number of the parameters. So it is saved as tensors
that are shaped and sharded like these. Any number of ranks loads them, and no rank ever holds more
than its part. The entries:

    about          [bytes] what is the same on all ranks
    own.RANK       [bytes] what one rank alone knows
    NAME.PLACE     [k, *shape] k vectors on the parameter at this place of the optimizer
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.checkpoint.format import check_format, readable
from aadl_hvd.checkpoint.shard_state import OwnLossState, OwnNoiseState, OwnState, ShardState
from aadl_hvd.checkpoint.state import COLUMNS
from aadl_hvd.checkpoint.state_dict import compare_parameters, parameter_table
from aadl_hvd.checkpoint.subspace_state import OwnBlockState
from aadl_hvd.checkpoint.transfer import bytes_of, from_bytes
from aadl_hvd.engines.rank_checks import accepted_by_all
from aadl_hvd.errors import CheckpointError
from aadl_hvd.optim.engine import Engine
from aadl_hvd.optim.loading import anderson_state
from aadl_hvd.optim.shards import is_dtensor, local, sharded_like

Path = str | os.PathLike[str]


class HistoryFiles:
    """Saves and loads the history of an optimizer. All methods are collective.

    Args:
        engine: of the optimizer.
        mesh: over which its parameters are sharded.
    """

    def __init__(self, engine: Engine, mesh: Any) -> None:
        self._engine, self._comm = engine, engine.accelerator.comm
        self._mesh = mesh
        # With HSDP these are all ranks of the job, which the mesh has no group for.
        self._group = mesh.get_group() if mesh.ndim == 1 else None

    def save(self, folder: Path) -> None:
        """See `DistributedAndersonOptimizer.save_history`."""
        engine, comm = self._engine, self._comm
        engine.accelerator.agree(engine.problem)
        shard = accepted_by_all(comm, lambda: engine.accelerator.shard_state(engine.problem))
        own = shard.own[str(comm.rank)]
        said = comm.allgather_object((shard.fingerprint(), shard.trial is not None, own.block))
        if len({fingerprint for fingerprint, _, _ in said}) > 1:
            raise CheckpointError(
                "Invalid history: that of each rank is of another moment. Must be saved by all "
                "ranks between the same two steps."
            )
        if not all(on_trial for _, on_trial, _ in said):
            shard = dataclasses.replace(shard, trial=None)
        block = _joined([block for _, _, block in said])
        entries = accepted_by_all(comm, lambda: self._entries(shard, own, block))
        self._transfer("save", entries, folder, "written to")

    def _entries(
        self, shard: ShardState, own: OwnState, block: OwnBlockState | None
    ) -> dict[str, Tensor]:
        divided = {name: t for name, kind, t in shard.tensors() if kind != COLUMNS}
        shared = dataclasses.replace(shard, own={}).with_tensors(dict.fromkeys(divided))
        about = {
            "anderson": anderson_state(self._engine),
            "history": shared.to_dict(),
            "tensors": {
                name: [str(t.dtype).removeprefix("torch."), [*t.shape[:-1]]]
                for name, t in divided.items()
            },
            "sharded": self._sharded,
            "block": None if block is None else block.to_dict(),
        }
        found = {"about": bytes_of(about), f"own.{self._comm.rank}": bytes_of(own.to_dict())}
        parameters = self._parameters
        sizes = [part.numel() for part in self._engine.problem.tensors]
        for name, t in divided.items():
            pieces = torch.split_with_sizes(
                t.reshape(math.prod(t.shape[:-1]), t.shape[-1]), sizes, dim=1
            )
            for (place, p), piece in zip(parameters.items(), pieces, strict=True):
                if len(piece) and self._saves(p):
                    found[f"{name}.{place}"] = sharded_like(p, piece)
        return found

    def load(self, folder: Path) -> None:
        """See `DistributedAndersonOptimizer.load_history`."""
        comm, own = self._comm, f"own.{self._comm.rank}"
        lengths = accepted_by_all(comm, lambda: _lengths(folder))
        read = {
            name: torch.empty(lengths[name], dtype=torch.uint8, device="cpu")
            for name in ("about", own)
            if name in lengths
        }
        self._transfer("load", read, folder, "read from")
        about, vectors = accepted_by_all(comm, lambda: self._vectors(read["about"]))
        self._transfer("load", vectors, folder, "read from")
        accepted_by_all(comm, lambda: self._take_in(about, read.get(own), vectors))
        accelerator = self._engine.accelerator
        accelerator.agree(self._engine.problem)  # now, in a run that has begun as well

    def _vectors(self, header: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """What is the same on all ranks, and memory for this rank's part of the vectors."""
        vectors = {}
        with readable("history"):
            about: Any = from_bytes(header)
            check_format("history", about["anderson"]["format"])
            table = parameter_table(self._engine.optimizer)
            compare_parameters(about["anderson"]["parameters"], table, dtypes=True)
            for name, (dtype, shape) in about["tensors"].items():
                for place, p in self._parameters.items() if math.prod(shape) else ():
                    if self._saves(p):
                        rows = math.prod(shape), local(p).numel()
                        memory = torch.empty(rows, dtype=getattr(torch, dtype), device="cpu")
                        vectors[f"{name}.{place}"] = sharded_like(p, memory)
        return about, vectors

    def _take_in(self, about: Any, own: Tensor | None, vectors: dict[str, Tensor]) -> None:
        """Makes this rank's shard of what was read, and loads it as any other."""
        parameters, rank = self._parameters, str(self._comm.rank)
        n = self._engine.problem.n
        with readable("history"):
            history = about["history"]
            for name, (dtype, shape) in about["tensors"].items():
                found = [vectors.pop(f"{name}.{place}", None) for place in parameters]
                rows = [_by_vectors(local(t).cpu()) for t in found if t is not None]
                made = torch.cat(rows, 1) if rows else torch.empty(0, dtype=getattr(torch, dtype))
                *path, last = name.split(".")
                section = history
                for key in path:
                    section = section[key]
                section[last] = made.reshape(*shape, n)
            origin = {"layout": "rows", "n": n, "size": 1, "rank": 0, "rows": [0, n]}
            if own is not None and about["sharded"] == self._sharded:
                alone = from_bytes(own)
            else:
                alone = _unknown(about["block"], n, self._comm.rank == 0).to_dict()
            history |= {"sharding": origin, "ranks": self._comm.size, "own": {rank: alone}}
        optimizer: Any = self._engine.optimizer
        optimizer.load_state_dict({"anderson": about["anderson"] | {"history": history}})

    @property
    def _parameters(self) -> dict[int, Tensor]:
        """Those that are trained, by their places in the optimizer."""
        groups = self._engine.optimizer.param_groups
        every = enumerate(p for group in groups for p in group["params"])
        return {place: p.detach() for place, p in every if p.requires_grad}

    def _saves(self, p: Tensor) -> bool:
        """Whether rows of a parameter are this rank's; see `optim.shards`."""
        return is_dtensor(p) or not self._mesh.get_coordinate()[-1]

    @property
    def _sharded(self) -> str:
        """How parameters are divided. What a rank alone knows is of use only where it is so."""
        placements = [str(getattr(p, "placements", "")) for p in self._parameters.values()]
        return repr((tuple(self._mesh.shape), placements))

    def _transfer(self, verb: str, entries: dict[str, Tensor], folder: Path, done: str) -> None:
        """Has DCP save or load entries. It raises on all ranks, or on none."""
        import torch.distributed.checkpoint as dcp

        try:
            getattr(dcp, verb)(entries, checkpoint_id=folder, process_group=self._group)
        except dcp.CheckpointException as error:
            causes = "; ".join(f"rank {r}: {e}" for r, (e, _) in sorted(error.failures.items()))
            raise CheckpointError(
                f"Invalid folder={os.fspath(folder)!r}: the history could not be {done} it "
                f"({causes})."
            ) from error


def _by_vectors(t: Tensor) -> Tensor:
    """[k, numbers of a parameter] of [k, *shape of the parameter], which may be one number."""
    return t.flatten(1) if t.dim() > 1 else t.unsqueeze(1)


def _lengths(folder: Path) -> dict[str, int]:
    """Bytes of the entries that are bytes."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        found: dict[str, Any] = {**FileSystemReader(folder).read_metadata().state_dict_metadata}
        return {n: found[n].size.numel() for n in found if n == "about" or n.startswith("own.")}
    except Exception as error:  # anything: DCP does not say what a bad file raises
        raise CheckpointError(
            f"Invalid folder={os.fspath(folder)!r}: its metadata cannot be read "
            f"({type(error).__name__}: {error}). Must be one that save_history has written."
        ) from error


def _joined(blocks: Sequence[OwnBlockState | None]) -> OwnBlockState | None:
    """What ranks alone know of the block that runs, as one rank would that has all rows."""
    known = [block for block in blocks if block is not None]
    if len(known) < len(blocks):
        return None
    losses = [block.losses for block in known]
    alike = len({len(own) for own in losses}) == 1
    means = (
        tuple(sum(of_step) / len(losses) for of_step in zip(*losses, strict=True)) if alike else ()
    )
    return OwnBlockState(dot=sum(block.dot for block in known), rows=(0, 0), losses=means)


def _unknown(block: Any, n: int, first: bool) -> OwnState:
    """What a rank knows that goes on from a history of others.

    The block that runs goes on: the sums over ranks are those of the ranks that saved it.
    """
    running = None
    if block is not None:
        dot = block["dot"] if first else 0.0
        running = OwnBlockState(dot=dot, rows=(0, n), losses=tuple(block["losses"]))
    return OwnState(
        noise=OwnNoiseState(call=-1, now=None, changes=()),
        losses=OwnLossState(losses=(), variances=(), last_difference=None),
        block=running,
    )
