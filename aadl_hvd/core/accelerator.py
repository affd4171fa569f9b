"""Anderson acceleration of a fixed-point iteration w <- G(w), its history shared by P ranks.

    r                                                      residual, zero where G(w) = w
    W, R                                                   differences of stored w and r, n x m
    gamma = argmin || r - R gamma ||                       paper, Eq. 5
    w+ = w + beta [ -W gamma + mixing M (r - R gamma) ]   paper, Eq. 4 and 6 (mixing = 1)

M is diagonal and makes a step of a residual: the identity for r = G(w) - w, the paper's; the base
optimizer's own scaling where r is minus a gradient (fixed_point.py).

The paper's Eq. 8 prints (1 - beta) I - beta (W + R) ..., which contradicts its Eq. 4 and 6, and
Algorithm 1 stores where "k (mod q) != 0": both are taken as misprints.

Weights are replicated, bit for bit; the history is not. A step that neither stores nor
accelerates costs nothing, but for samples of the gradient where the next one accelerates. Which
collectives a step enters depends on its number alone, until one of them has told all ranks the
same: a rank whose state differs (a checkpoint loaded there only) makes the history reset
everywhere and hangs nobody. So a loaded history, and with it the number of the step, is a pending history
until a collective that all ranks enter anyhow has shown that all have the same one: see `agree`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.local import PendingCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core import acceptance as safeguard
from aadl_hvd.core import memory, replicas
from aadl_hvd.core.acceptance import Backoff, LossWatch, Trial
from aadl_hvd.core.averages import MovingAverage, WeightAverages
from aadl_hvd.core.gram import Gram, matrix_bytes
from aadl_hvd.core.history import History, chunked_dot, working_bytes
from aadl_hvd.core.noise import Deviations, NoiseMeter, stands_out, variance_from_history
from aadl_hvd.core.reduction import numbers_of
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.core.solve import Factorization, Matrix, Vector, promised_reduction
from aadl_hvd.errors import (
    ConfigError,
    HistoryMemoryError,
    ReplicaMismatchError,
    UnsupportedError,
)
from aadl_hvd.stats import Rejection, Reset, Stats


class FixedPoint(Protocol):
    """The iteration to accelerate: what `Accelerator` needs to know of an optimizer."""

    @property
    def config_lines(self) -> list[str]:
        """What decides where the base optimizer goes, line by line, to be compared over ranks."""

    @property
    def signature(self) -> Hashable:
        """What stored pairs depend on; when it changes, the history is worth nothing."""

    @property
    def n(self) -> int:
        """Length of the flat vector w."""

    @property
    def dtype(self) -> torch.dtype:
        """Widest dtype among the parts of w."""

    @property
    def device(self) -> torch.device:
        """Where w is."""

    @property
    def tensors(self) -> list[Tensor]:
        """What w consists of, one after the other."""

    @property
    def moves(self) -> bool:
        """Whether the base optimizer goes anywhere (no learning rate of 0)."""

    def read_before(self, lo: int, hi: int, out: Tensor, residual: Tensor) -> Tensor:
        """Copies rows [lo, hi) of w, before `advance`, which may use the memory of `residual`."""

    def advance(self) -> Any:
        """One step of the base optimizer; its return value is handed to the user."""

    def read(self, lo: int, hi: int, out: Tensor) -> Tensor:
        """Copies rows [lo, hi) of the current weights."""

    def read_residual(self, lo: int, hi: int, w: Tensor, out: Tensor) -> Tensor:
        """Copies rows [lo, hi) of r, after `advance`; w: rows from before it."""

    def scaling(self, lo: int, hi: int) -> float | Tensor:
        """The diagonal of M: one number, or rows [lo, hi) of it."""

    @property
    def uniform_scaling(self) -> float | None:
        """M where it is one number and costs nothing to know, else None."""

    def deviations(self) -> Deviations | None:
        """What is known of the noise in the residual of this step, after `advance`."""

    def skip(self) -> Any:
        """Ends a step without moving; its return value is handed to the user."""

    def write(self, flat: Tensor, lo: int = 0) -> None:
        """Sets rows [lo, lo + k) of the weights from `flat` [k]; what lies beyond n is left out."""

    def snapshot(self) -> Any:
        """A copy of the base optimizer's state: plain types and tensors, for `restore`."""

    def restore(self, undo: Any) -> None:
        """Puts back what `snapshot` returned; it is used up."""

    def state_tensors(self) -> list[Tensor]:
        """The base optimizer's state, in an order that is the same on all ranks."""

    def loss(self) -> float:
        """Evaluates the loss of this rank at the current weights."""


class Accelerator:
    """The algorithm and its state on one rank.

    Memory on this rank, in numbers of `history_dtype`: rows 2 m n/P, columns 2 n ceil(m/P); and
    in float32 (float64 where the parameters are) 4 n/P, or 4 n, for the last pair and the next,
    half as much for each of `averages`, and a quarter where a point may be taken back.

    Args:
        config: settings.
        comm: the ranks that train together; the same settings on all of them.
        group: those of them that share one history, P in number; None: all.

    Attributes:
        config: the settings.
        stats: counters, see `Stats`.
        agreed: whether `agree` has been called, on all ranks.
        consolidated: the whole history, where and while `checkpoint.consolidate` has left it.
        stepped_apart: whether this rank's base optimizer has stepped by itself. If some ranks'
            have, they get weights and state of those whose has not.
    """

    def __init__(
        self, config: AndersonConfig, comm: Communicator, group: ShardGroup | None = None
    ) -> None:
        self.config = config
        self.stats = Stats(enabled=config.enabled)
        self._stepping = False
        self._average: MovingAverage | None = None
        self._averages: WeightAverages
        self._base_rows: Tensor | None  # where the base step of the last accelerated one is kept
        self.connect(comm, ShardGroup(comm) if group is None else group, calls=0)

    def connect(self, comm: Communicator, group: ShardGroup, calls: int) -> None:
        """Goes on with other ranks, and knows nothing but the settings and what `stats` counts.

        Not collective.

        Args:
            comm: the ranks that train together from now on.
            group: those of them that share one history.
            calls: number of the last step, the same on all of them.
        """
        self._comm, self._group, self._calls = comm, group, calls
        self.agreed = self._use_kernels = False
        self._summer: kernels.Checksum | None = None
        self._pending: dict[str, Any] | None = None  # a loaded history that is not taken in yet
        self.consolidated: dict[str, Any] | None = None
        self._signature: Hashable = None
        self._trial: Trial | None = None
        self._noise = NoiseMeter()
        self._losses = LossWatch()
        self._backoff = Backoff()
        self._were_equal = False  # whether all ranks have ever been seen with the same weights
        self.stepped_apart = False
        self._warned = False
        self._weights_device = torch.device("cpu")
        self._set_up(n=0, work=torch.float32, device=torch.device("cpu"))

    @property
    def history_bytes(self) -> int:
        """Bytes of history and of all averages allocated on this rank."""
        average = self._average.nbytes if self._average is not None else 0
        return self._history.nbytes + average + self._averages.nbytes

    @property
    def columns(self) -> int:
        """h, how many columns the history holds now."""
        return self._history.columns

    @property
    def measures_noise(self) -> bool:
        """Whether this step needs the gradients one by one, before they are averaged.

        Only accelerated steps and those before them do. Before `step` is called it is the step to
        come that is meant, and while it runs, in which a closure may be evaluated, that one.
        """
        calls = self._calls
        if self._pending is not None and not self.agreed:  # what the next step will go by
            calls = self._pending["replicated"]["calls"]
        k = calls + (not self._stepping) - self.config.warmup_steps
        p = self.config.frequency
        measuring = self.config.enabled and self.config.noise_gate is not None
        return measuring and k >= 0 and (k % p == 0 or (k + 1) % p == 0)

    def observe(self, loss: float | Tensor) -> None:
        """Takes note of this rank's loss at the weights that the next step starts from.

        Raises:
            ConfigError: not one number.
            UnsupportedError: called while a step runs.
        """
        if self._stepping:
            raise UnsupportedError(
                "Invalid observe() while step() runs, as in a closure: it is about the step to "
                "come. Call it before step(), or use safeguard='loss', which asks the closure."
            )
        count = loss.numel() if isinstance(loss, Tensor) else 1
        if count != 1 or not isinstance(loss, Tensor | float | int | np.number):
            raise ConfigError(
                f"Invalid loss={type(loss).__name__} of {count} elements. Must be a number or a "
                "tensor with one element."
            )
        if not self.config.enabled:
            return
        self._losses.observe(loss.reshape(()) if isinstance(loss, Tensor) else float(loss))

    @property
    def average_gains(self) -> dict[float, float]:
        """What the loss would fall by at each of the running averages, as measured; NaN: unknown.

        By the trapezoidal rule over gradients, see `averaging.WeightAverages`. Measured for
        residual="gradient" only.
        """
        gains = self._averages.gains
        return gains if self.config.residual == "gradient" else dict.fromkeys(gains, math.nan)

    def best_average(self) -> float | None:
        """The average with the largest measured gain; None if none promises any. Collective.

        Gains are the same on every rank, but for one that has loaded a checkpoint since: then
        nothing is known anywhere.
        """
        gains = np.array(list(self.average_gains.values()))
        known = np.isfinite(gains)
        sums = self.mean_over_ranks(np.concatenate([np.where(known, gains, 0.0), known]))
        gains, known = sums[: len(gains)], sums[len(gains) :] == 1.0
        promising = np.where(known, gains, 0.0)
        if not (promising > 0.0).any():
            return None
        return self.config.averages[int(promising.argmax())]

    def put_average(self, problem: FixedPoint, kind: float) -> bool:
        """Puts one of the running averages into the weights. Collective.

        Returns:
            Whether there is one: False, on every rank, if a rank has none (yet, or any more).
        """
        with _plain_numerics(problem.device):
            kept = self.config.enabled and problem.signature == self._signature
            rows = self._averages.mean(kind) if kept else None
            if self.mean_over_ranks(np.array([float(rows is not None)]))[0] < 1.0:
                return False
            assert rows is not None
            self._put(problem, rows)
            return True

    @property
    def comm(self) -> Communicator:
        """The ranks that train together."""
        return self._comm

    @property
    def group(self) -> ShardGroup:
        """Of these, the ranks that share one history."""
        return self._group

    def mean_over_ranks(self, values: Vector) -> Vector:
        """Mean of a small vector over the ranks that train together. Collective."""
        return self._comm.allreduce(values) / self._comm.size

    def needed_bytes(self, problem: FixedPoint) -> int:
        """What `history_bytes` will be at most."""
        hash(problem.signature)  # up to date with the parameter groups
        sharding, work = self.share(problem.n), _work_dtype(problem)
        config, (lo, hi) = self.config, sharding.rows
        if not config.enabled:
            return 0
        narrow = 2 * len(sharding.slots) * (config.history_dtype or work).itemsize
        pairs, window = 4, config.average_window or 0
        return (hi - lo) * (narrow + (pairs + window + 2 * len(config.averages)) * work.itemsize)

    def check_memory(self, problem: FixedPoint) -> None:
        """Collective, before the first step.

        Raises:
            HistoryMemoryError: on every rank, if the history of any does not fit, or what the
                steps compute from it.
        """
        here = [
            (own, memory.free_bytes(device), memory.place(device))
            for device, own in self._forecast(problem).items()
        ]
        needed: dict[str, int] = {}
        free: dict[str, float] = {}
        everybody = [
            (rank, *entry)
            for rank, entries in enumerate(self._comm.allgather_object(here))
            for entry in entries
        ]
        for _, own, left, place in everybody:
            needed[place] = needed.get(place, 0) + own
            free[place] = min(free.get(place, math.inf), math.inf if left is None else left)
        for rank, own, _, place in everybody:
            if needed[place] > free[place]:
                raise HistoryMemoryError(
                    f"The history would take {own / 1e9:.3g} GB on rank {rank}, "
                    f"{needed[place] / 1e9:.3g} GB with all ranks on {place}, where "
                    f"{free[place] / 1e9:.3g} GB are free. Lower "
                    f"history_depth={self.config.history_depth}, or choose "
                    "history_dtype='bfloat16', averages=() or average_window=None; with "
                    "layout='rows' and shard_group='world' each of P ranks holds one P-th."
                )

    def _forecast(self, problem: FixedPoint) -> dict[torch.device, int]:
        """Bytes at most of all that grows with the depth, by where: what stays, what steps use."""
        config = self.config
        if not config.enabled:
            return {}
        sharding, work, home = self.share(problem.n), _work_dtype(problem), problem.device
        # Columns that are stored between two attempts are multiplied with all others.
        fresh = min(config.history_depth, config.frequency // config.store_every + 1)
        stored = config.history_dtype or work
        taken = {home: self.needed_bytes(problem)}
        taken[home] += working_bytes(sharding, stored, work, home, fresh)
        host = torch.device("cpu")
        taken[host] = taken.get(host, 0) + matrix_bytes(config.history_depth, self._comm.size)
        return taken

    def compare_replicas(self, problem: FixedPoint) -> bool:
        """Whether all ranks hold the same weights. Collective."""
        with _plain_numerics(problem.device):
            hash(problem.signature)
            sums = self._comm.allreduce(replicas.payload(int(self._checksum(problem))))
        same = replicas.equal(sums, self._comm.size)
        self._were_equal |= same
        return same

    def reset(self, cause: Reset = Reset.REQUESTED) -> None:
        """Forgets the history; it rebuilds itself in the next steps. On all ranks or none."""
        self.stats.resets[cause.value] += 1
        self._pending = self.consolidated = None
        self._trial = None
        self._losses.drop_trial()
        self._noise.clear()
        self._history.clear()
        self._gram.clear()
        if self._average is not None:
            self._average.clear()
        if cause is not Reset.NONFINITE:
            self._averages.clear()

    @torch.no_grad()
    def hold(self) -> Callable[[], None]:
        """Copies all that `reset` and `load` change, to host memory; the result puts it back.

        Costs nothing before the first step, and what `history_bytes` says after it.
        """
        owners = [
            *(self, self.stats, self._history, self._gram, self._noise, self._losses),
            *(self._backoff, self._averages, *self._averages.parts),
            *([] if self._average is None else [self._average]),
        ]
        held = []
        for owner in owners:
            attributes = dict(vars(owner))
            tensors = [value for value in attributes.values() if isinstance(value, Tensor)]
            held.append((owner, attributes, [(t, t.to("cpu", copy=True)) for t in tensors]))
        # Counted in place.
        rejected, resets = dict(self.stats.rejected), dict(self.stats.resets)

        def put_back() -> None:
            for owner, attributes, tensors in held:
                vars(owner).clear()
                vars(owner).update(attributes)
                with torch.no_grad():
                    for tensor, contents in tensors:
                        tensor.copy_(contents)
            self.stats.rejected, self.stats.resets = rejected, resets

        return put_back

    @property
    def has_part(self) -> bool:
        """Whether `part` is of use: not while ranks have yet to meet, unless one was loaded.

        Until then this rank's share is the whole, which no rank should have to hold.
        """
        return not isinstance(self._comm, PendingCommunicator) or self._pending is not None

    def part(self, problem: FixedPoint) -> dict[str, Any]:
        """This rank's part of all that acceleration goes on from, in host memory.

        Not collective. `checkpoint` says what it looks like, and fits it to other shardings.
        """
        self._prepare(problem)
        if self._pending is not None:
            return copy.deepcopy(self._pending)
        history, gram, averages, losses = self._history, self._gram, self._averages, self._losses
        columns = history.part() | {"products": gram.products()}
        lo, hi = self._rows
        names = [f"average {kind}" for kind in averages.kinds]
        rows = dict(zip(names, averages.part(), strict=False))
        if (pair := columns.pop("pair")) is not None:
            rows["pair"] = pair
        pushed = None
        if self._average is not None:
            pushed, rows["iterates"] = self._average.part()
        undo: dict[str, Any] = {}
        if self._trial is not None:
            rows["base"] = self._trial.base_rows.cpu().clone()
            undo["residual"] = {"norm": self._trial.norm, "undo": _on_host(self._trial.undo)}
        if losses.trial is not None:
            rows["base"] = losses.trial.cpu().clone()
            undo["loss"] = {}
        return {
            "sharding": {
                "layout": history.sharding.layout,
                "n": history.sharding.n,
                "size": history.sharding.size,
                "rank": history.sharding.rank,
                "rows": [lo, hi],
            },
            "replicated": {
                "calls": self._calls,
                "stored": history.stored,
                "columns": history.columns,
                "last": history.last,
                "gram": gram.state(),
                "averages": averages.state(),
                "pushed": pushed,
                "noise": self._noise.share,
                "losses": losses.state(),
                "backoff": self._backoff.state(),
            },
            "rows": rows,
            "columns": columns,
            "undo": undo,
            "ranks": self._comm.size,
            "own": {str(self._comm.rank): {"noise": self._noise.part(), "losses": losses.part()}},
        }

    def load(self, problem: FixedPoint, part: dict[str, Any], fingerprint: int) -> None:
        """Makes a part that fits this rank's the history to go on from, if all ranks do: a pending history.

        Not collective. It comes true in `agree`, which the first step calls; after that, in the
        next accelerated step, which then does not accelerate; there steps go on being counted as
        before, and what was on trial is forgotten.

        Args:
            problem: what is accelerated, as it was when the part was made.
            part: what `part` returned, of this rank's rows and columns.
            fingerprint: names the history among all: in [1, 2^36), the same for all its parts.
        """
        self._prepare(problem)
        self._pending, self._history.fingerprint = part, fingerprint
        if self._comm.size == 1 and not isinstance(self._comm, PendingCommunicator):
            self._take(continues=True)

    def agree(self, problem: FixedPoint) -> None:
        """Takes in a loaded history if all ranks have loaded the same; else it is reset on all.

        Collective: one tiny reduction. The first step calls it of itself. After a history was
        loaded on all ranks in the middle of a run, this makes the very next step go on from it.
        """
        if self._pending is not None:
            self._prepare(problem)
        self.agreed = True
        # Checksums are those of the memory, which lies on all ranks alike or is read in order.
        layout = zlib.crc32(repr([t.stride() for t in problem.tensors]).encode())
        stored = self.config.history_dtype or _work_dtype(problem)
        able = kernels.usable(problem.device, _work_dtype(problem), stored)
        fingerprint, layout_payload = (
            replicas.payload(self._history.fingerprint),
            replicas.payload(layout),
        )
        sums = self._comm.allreduce(np.concatenate([fingerprint, layout_payload, [able]]))
        fingerprint, layouts, (able_ranks,) = np.split(sums, [len(fingerprint), len(sums) - 1])
        self._set_kernels(
            able_ranks == self._comm.size and replicas.equal(layouts, self._comm.size)
        )
        if not replicas.equal(fingerprint, self._comm.size):
            self._reset_on_all()
        elif self._pending is not None:
            self._take(continues=True)

    def _set_kernels(self, able: bool) -> None:
        """Has `kernels` do the work where they can, if all ranks are able to."""
        self._use_kernels = able
        history = self._history
        history.use_kernels = able and kernels.usable(
            history.device, history.work_dtype, history.dtype
        )
        self._averages.use_kernels = history.use_kernels

    @torch.no_grad()
    def _take(self, continues: bool) -> None:
        """Takes in the pending history; `continues`: as if the run had not been interrupted."""
        part, self._pending = self._pending, None
        assert part is not None
        same, rows, columns = part["replicated"], part["rows"], part["columns"]
        own = part["own"].get(str(self._comm.rank)) if continues else None
        device = self._weights_device
        pair = {"pair": rows.get("pair")}
        self._history.take(columns | pair, same["stored"], same["columns"], same["last"])
        self._history.generation = 0  # the same on all ranks
        self._gram.take(same["gram"], columns["products"])
        averages = same["averages"]
        known = [f"average {kind}" for kind in averages["kinds"] if averages["count"]]
        self._averages.take(averages, [rows[name] for name in known])
        if self._average is not None:
            self._average.clear()
            if "iterates" in rows:
                self._average.take(same["pushed"], rows["iterates"])
        self._noise.take(same["noise"], own and own["noise"], device)
        self._backoff.take(same["backoff"])
        self._trial = None
        if not continues:
            self._losses.drop_trial()
            return
        self._calls = same["calls"]
        self._losses.take(same["losses"], own and own["losses"])
        if "base" in rows:
            self._base_rows = self._vector().copy_(rows["base"])
            if (trial := part["undo"].get("residual")) is not None:
                self._trial = Trial(self._base_rows, trial["undo"], trial["norm"])
            if "loss" in part["undo"]:
                self._losses.try_out(self._base_rows)

    def step(self, problem: FixedPoint) -> Any:
        """One step of the base optimizer, accelerated on every p-th. Collective on those steps.

        Returns:
            What `problem.advance()` returned.
        """
        self._stepping = True
        try:
            return self._step(problem)
        finally:
            self._stepping = False

    def _step(self, problem: FixedPoint) -> Any:
        config = self.config
        self.consolidated = None
        if not config.enabled:
            self.stats.steps += 1
            return problem.advance()
        if not self.agreed:
            self.agree(problem)
        self.stats.steps += 1
        self._calls += 1  # not `steps`: that may come from a checkpoint, on one rank alone
        k = self._calls - config.warmup_steps
        store = k >= 1 and k % config.store_every == 0
        accelerate = k >= 1 and k % config.frequency == 0
        confirm = config.safeguard == "residual" and k >= 2 and (k - 1) % config.frequency == 0
        average = config.average_window is not None and k >= 1
        self._losses.next_step()
        if self._losses.verdict_due and not self._confirm_loss(problem):
            return problem.skip()
        if not (store or accelerate or confirm or average):
            result = problem.advance()
            self._note_noise(problem)
            return result

        with _plain_numerics(problem.device), self.stats.timed("read"):
            self._prepare(problem)
            w, r = self._history.staging_buffer()
            w = problem.read_before(*self._rows, w, r)
        result = problem.advance()
        with _plain_numerics(problem.device):
            with self.stats.timed("read"):
                r = problem.read_residual(*self._rows, w, r)
            if confirm and not self._confirm(problem, r):
                return result
            self._note_noise(problem)
            stored = store and problem.moves  # at learning rate 0 r says nothing
            if stored:
                self._store(w, r, problem.uniform_scaling)
            if accelerate:
                with self.stats.timed("average"):
                    gains = self._averages.partial_gains(w, r, self._sharding.counted)
                with self.stats.timed("noise"):
                    noise = self._noise.measured()
                with self.stats.timed("replicas"):
                    checksum = self._checksum(problem)
                self._accelerate(problem, w, r, stored, [noise, checksum, gains])
            if average:
                self._replace_by_average(problem, r)
        return result

    def _note_noise(self, problem: FixedPoint) -> None:
        if self.config.noise_gate is not None:
            with self.stats.timed("noise"):
                self._noise.note(problem.deviations(), self._calls)

    def _store(self, w: Tensor, r: Tensor, scaling: float | None) -> None:
        with self.stats.timed("store"):
            new = self._history.push(w, r, self.config.mixing * (scaling or 0.0))
            if new is not None:
                self._gram.stored(*new)
            self.stats.stored += 1

    def _accelerate(
        self, problem: FixedPoint, w: Tensor, r: Tensor, stored: bool, measured: list[Tensor]
    ) -> None:
        stats, config = self.stats, self.config
        with stats.timed("gram"):
            # All at once: on a GPU this is one of the two waits of an event.
            asked = [self._gram.partial(r, stored), *measured, *self._losses.unread()]
            partial, deviations, checksum, gains, *unread = numbers_of(asked)
            self._losses.read(unread)
            payload = np.concatenate(
                [
                    self._noise.payload(deviations),
                    self._losses.payload(),
                    replicas.payload(int(checksum[0])),
                    gains,
                ]
            )
            sent = self._gram.sent
            system, sums = self._gram.assemble(partial, payload, r, stored)
            stats.bytes["gram"] += self._gram.sent - sent
        lengths = NoiseMeter.PAYLOAD, LossWatch.PAYLOAD, replicas.PAYLOAD
        noise, losses, same, gains = np.split(sums, np.cumsum(lengths))
        self._losses.event(losses, self._comm.size)
        ready = self._backoff.ready()
        if not replicas.equal(same, self._comm.size):
            return self._unequal(problem, int(checksum[0]))
        self._were_equal, self.stepped_apart = True, False
        if system is None:
            return self._reset_on_all()
        if self._pending is not None:  # version are equal: all ranks have it
            return self._take(continues=False)
        gram, b, rr = system
        if math.isfinite(rr):
            with stats.timed("average"):
                self._averages.push(w, r, gains)
        if len(b) == 0:
            return None  # no two pairs yet: nothing to try
        if (cause := safeguard.judge_system(gram, b, rr)) is not None:
            return self._reject(cause)
        columns = self._clear_of_noise(noise, gram, rr)
        if not columns:
            return self._reject(Rejection.NOISE)
        if not ready:
            return self._reject(Rejection.BACKOFF)
        gram, b = gram[np.ix_(columns, columns)], b[columns]
        slots = [self._history.live[i] for i in columns]
        with stats.timed("solve"):
            gamma = self._solve(gram, b, rr, slots)
        with stats.timed("update"):
            scaling = config.mixing * self._scaling(problem)
            start = w if self._sharding.layout == "rows" else None  # else parts are added up first
            update, partial_slope = self._history.update(
                r, gamma, scaling, self._history.scratch(w, r), start, config.relaxation
            )
            slope = float(self._comm.allreduce(partial_slope.reshape(1).cpu().numpy())[0])
            stats.bytes["update"] += 8
        cause = safeguard.judge_update(slope, config.safeguard)
        self._backoff.judged_by_descent(cause is Rejection.DESCENT)
        if cause is not None:
            if cause is Rejection.DESCENT:
                self._history.keep(self._history.columns // 2)  # the newest know the way down
            return self._reject(cause)
        observed = self._losses.observed
        if config.safeguard in ("residual", "loss") or observed:
            if self._base_rows is None:
                self._base_rows = self._vector()
            base_rows = problem.read(*self._rows, self._base_rows)
        if config.safeguard == "residual":
            self._trial = Trial(base_rows, problem.snapshot(), math.sqrt(rr))
        if config.safeguard == "loss":
            base_loss = self._mean_loss(problem)
        if self._sharding.layout == "columns":
            with stats.timed("gather"):
                stats.bytes["gather"] += update.numel() * update.element_size()
                update = self._group.comm.sum_tensor(update)
                torch.add(w, update, alpha=config.relaxation, out=update)
        self._put(problem, update)
        if config.safeguard == "loss":
            cause = safeguard.judge_loss(base_loss, self._mean_loss(problem))
            if cause is not None:
                self._put(problem, base_rows)
                return self._reject(cause)
        if observed:
            self._losses.try_out(base_rows)
        stats.accelerated += 1

    def _checksum(self, problem: FixedPoint) -> Tensor:
        if self._comm.size == 1:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        tensors = problem.tensors if self._use_kernels and kernels.usable(problem.device) else None
        if tensors is not None:
            sizes = tuple(tensor.numel() for tensor in tensors)
            now = sizes, problem.device
            if self._summer is None or (self._summer.sizes, self._summer.device) != now:
                self._summer = kernels.Checksum(sizes, problem.device)
            return self._summer.of(tensors, replicas.PRIME)
        work = _work_dtype(problem)
        return replicas.checksum(problem.read, problem.n, work, problem.device)

    def _unequal(self, problem: FixedPoint, checksum: int) -> None:
        """Ranks hold different weights: what to do about it, on all of them."""
        found = self._comm.allgather_object((checksum, self.stepped_apart, problem.config_lines))
        self.stepped_apart = False
        staying = [rank for rank, (_, apart, _) in enumerate(found) if not apart]
        if 0 < len(staying) < len(found) and len({found[rank][0] for rank in staying}) == 1:
            self._resync(problem, staying[0])
            self._were_equal = True
            return self._reset_on_all()
        root, others = replicas.outliers([number for number, _, _ in found])
        named = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
        what = f"Weights of {named} differ from those of rank {root} in step {self.stats.steps}"
        if self._were_equal and self.config.on_desync == "error":
            pairs = zip(found[others[0]][2], found[root][2], strict=False)
            why = "a fault of the machine, or one rank changed them by itself"
            for there, here in pairs:
                if there != here:
                    why = f"rank {others[0]} has {there}, rank {root} has {here}"
                    break
            raise ReplicaMismatchError(
                f"{what}, and were equal before: {why}. Go on from a checkpoint, or choose "
                "on_desync='resync'."
            )
        self._reset_on_all()
        if self._were_equal:
            warnings.warn(f"{what}: these ranks get weights and state of rank {root}", stacklevel=6)
            self._resync(problem, root)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{what}, and were never equal: no acceleration. Call "
                "hvd.broadcast_parameters(model.state_dict(), root_rank=0) before training.",
                stacklevel=6,
            )

    def _reset_on_all(self) -> None:
        self.reset(Reset.DESYNCHRONIZED)
        self._history.generation = 0  # from here on the same on all ranks

    def _resync(self, problem: FixedPoint, root: int) -> None:
        """Gives all ranks the weights and the base optimizer's state of one. Collective."""
        mine = self._comm.rank == root
        state = problem.state_tensors()
        shapes = self._comm.allgather_object([tuple(tensor.shape) for tensor in state])
        if any(other != shapes[root] for other in shapes):
            raise ReplicaMismatchError(
                f"Ranks hold optimizer states of different shapes, unlike rank {root}: they cannot "
                "be made equal. Go on from a checkpoint."
            )
        # Sums with zeros: the one large message that all communicators have.
        flat = torch.zeros(problem.n, dtype=_work_dtype(problem), device=problem.device)
        if mine:
            problem.read(0, problem.n, flat)
        problem.write(self._comm.sum_tensor(flat))
        for tensor in state:
            values = tensor.detach().to(torch.float64).reshape(-1)
            values = self._comm.sum_tensor(values if mine else torch.zeros_like(values))
            tensor.copy_(values.reshape(tensor.shape))

    def _clear_of_noise(self, sums: Vector, gram: Matrix, rr: float) -> list[int]:
        """The columns that stand out of the noise; none where the residual does not."""
        everything = list(range(len(gram)))
        if self.config.noise_gate is None:
            return everything
        gate = self.config.noise_gate
        measured = NoiseMeter.variance(sums, self._comm.size)
        by_gradients = measured is not None
        if measured is None:
            guess = variance_from_history(gram)
            if guess is None:  # too early to say: unknown noise is too much
                return []
            measured = guess, rr
        variance, squared = measured
        if self.config.residual == "gradient":
            squared = rr
        # A guess is a median already. Columns are judged by what was measured now: when steps are
        # short they are small beside r, and one bad measurement would keep them out for long.
        steadied = self._noise.steadied(variance, squared) if by_gradients else variance
        self.stats.note_noise(steadied, squared, gate)
        if not stands_out(squared, steadied, gate):
            return []
        if by_gradients and self.config.residual != "gradient":
            return everything  # columns are in other units than the noise
        return [i for i in everything if gram[i, i] > 2.0 * gate * variance]

    def _solve(self, gram: Matrix, b: Vector, rr: float, slots: list[int]) -> Tensor:
        """gamma [m] float64 on the host, zero for unused slots; the same bits on every rank."""
        history, config = self._history, self.config
        eps = torch.finfo(history.work_dtype).eps
        factor = Factorization(gram, config.regularization, precision=eps)
        gamma = np.zeros(config.history_depth)
        gamma[slots] = factor.solve(b)
        # Replicated, but not trusted: processors may differ, and weights must not.
        gamma = self._comm.broadcast(gamma)
        self.stats.bytes["solve"] += gamma.nbytes
        self.stats.condition, self.stats.rank = factor.condition, factor.rank
        self.stats.promised_reduction = promised_reduction(gram, b, rr, gamma[slots])
        return torch.from_numpy(gamma)

    def _put(self, problem: FixedPoint, rows: Tensor) -> None:
        """Makes the flat vector of every rank's rows the weights: the large message of a step."""
        sharding, comm, device = self._sharding, self._group.comm, self._weights_device
        if sharding.layout == "columns":  # every rank has all of them
            with self.stats.timed("write"):
                return problem.write(rows.to(device))
        if rows.numel() < sharding.block:
            rows = torch.nn.functional.pad(rows, (0, sharding.block - rows.numel()))
        self.stats.bytes["gather"] += rows.numel() * rows.element_size()
        with contextlib.closing(
            comm.gather_by_pieces(rows.to(device, non_blocking=True))
        ) as pieces:
            while True:
                with self.stats.timed("gather"):
                    first, everybodys = next(pieces, (0, None))
                if everybodys is None:
                    return None
                with self.stats.timed("write"):
                    if everybodys.shape[1] == sharding.block:
                        problem.write(everybodys.reshape(-1))
                        continue
                    for rank, piece in enumerate(everybodys):
                        problem.write(piece, rank * sharding.block + first)

    def _confirm_loss(self, problem: FixedPoint) -> bool:
        """Judges the accelerated step before this one by its loss; goes back if it was bad."""
        with _plain_numerics(problem.device), self.stats.timed("safeguard"):
            if problem.signature != self._signature:
                self._losses.drop_trial()  # the way back is that of another problem
            numbers = np.append(self._losses.payload(), self._losses.on_trial)
            sums = self._comm.allreduce(numbers)
            self.stats.bytes["safeguard"] += sums.nbytes
            trial = self._losses.verdict(sums, self._comm.size, self._backoff)
            if trial is None:
                return True
            base_rows = trial
            self._put(problem, base_rows)
            self._trial = None  # of the same step
            if self._average is not None:
                self._average.replace_last(base_rows)  # the rejected point was never there
            self._reject(Rejection.LOSS)
            return False

    def _confirm(self, problem: FixedPoint, r: Tensor) -> bool:
        """Judges the accelerated step before this one; if it was bad, goes back to the base's."""
        trial, self._trial = self._trial, None
        with self.stats.timed("safeguard"):
            partial = float(chunked_dot(r, r, self._sharding.counted))
            squared, trials = self._comm.allreduce(np.array([partial, trial is not None]))
            self.stats.bytes["safeguard"] += 16
            if trial is None or trials < self._comm.size:
                return True  # nothing to judge, or not on all ranks
            cause = safeguard.judge_residual(trial.norm, math.sqrt(squared))
            if cause is None:
                return True
            self._put(problem, trial.base_rows)
            problem.restore(trial.undo)
            if self._average is not None:
                self._average.replace_last(trial.base_rows)  # the rejected point was never there
            self._reject(cause)
            return False

    def _replace_by_average(self, problem: FixedPoint, r: Tensor) -> None:
        """Replaces the weights by their moving average unless Eq. 16 says they are calm."""
        average = self._average
        assert average is not None
        with self.stats.timed("average"):
            average.push(problem.read(*self._rows, self._vector()))
            mixed = (r * self._scaling(problem)).abs()
            largest = mixed.max() if r.numel() else r.new_zeros(())
            local = torch.stack([average.spread(), largest])
            values = np.append(local.double().cpu().numpy(), not average.full)
            spread, size, missing = self._comm.allreduce(values, "max")
            self.stats.bytes["average"] += values.nbytes
            calm = spread < self.config.average_threshold * size
            if not missing and math.isfinite(spread) and not calm:
                mean = average.mean()
                average.replace_last(mean)
                self._put(problem, mean)
                self.stats.averaged += 1

    def _mean_loss(self, problem: FixedPoint) -> float:
        with self.stats.timed("safeguard"):
            self.stats.bytes["safeguard"] += 8
            return float(self._comm.allreduce(np.array([problem.loss()]))[0]) / self._comm.size

    def _reject(self, cause: Rejection) -> None:
        self.stats.rejected[cause.value] += 1
        if cause is Rejection.NONFINITE:
            self.reset(Reset.NONFINITE)

    @property
    def _sharding(self) -> Sharding:
        return self._history.sharding

    @property
    def _rows(self) -> tuple[int, int]:
        return self._sharding.rows

    def _scaling(self, problem: FixedPoint) -> float | Tensor:
        scaling = problem.scaling(*self._rows)
        return scaling.to(self._history.device) if isinstance(scaling, Tensor) else scaling

    def _vector(self) -> Tensor:
        lo, hi = self._rows
        return torch.empty(hi - lo, dtype=self._history.work_dtype, device=self._history.device)

    def _prepare(self, problem: FixedPoint) -> None:
        """Sets up the history for this problem, anew where it is no longer the same problem."""
        signature = problem.signature
        if signature == self._signature:
            return
        if self._signature is not None:
            self.reset(Reset.CHANGED)
        self._signature = signature
        work, home = _work_dtype(problem), problem.device
        self._weights_device = problem.device
        current = self._history
        if (current.sharding.n, current.work_dtype, current.device) != (
            problem.n,
            work,
            home,
        ):
            self._set_up(problem.n, work, home)

    def share(self, n: int) -> Sharding:
        """Which part of a history of n numbers a column is this rank's."""
        group = self._group
        share = group.comm.size, group.comm.rank, group.count, group.index
        return Sharding(self.config.layout, n, self.config.history_depth, *share)

    def _set_up(self, n: int, work: torch.dtype, device: torch.device) -> None:
        config, sharding = self.config, self.share(n)
        self._history = History(sharding, config.history_dtype or work, work, device)
        self._gram = Gram(self._history, self._comm)
        lo, hi = sharding.rows
        self._base_rows = None
        kinds = config.averages if config.enabled else ()
        self._averages = WeightAverages(kinds, config.frequency, hi - lo, work, device)
        if config.enabled and config.average_window is not None:
            self._average = MovingAverage(config.average_window, hi - lo, work, device)
        self._set_kernels(self._use_kernels)


def _work_dtype(problem: FixedPoint) -> torch.dtype:
    """Of pairs and products: no narrower than any weight."""
    return torch.float64 if problem.dtype == torch.float64 else torch.float32


def _on_host(value: Any) -> Any:
    """A copy in host memory of nested dicts of tensors and plain types."""
    if isinstance(value, dict):
        return {key: _on_host(entry) for key, entry in value.items()}
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


@contextlib.contextmanager
def _plain_numerics(device: torch.device) -> Iterator[None]:
    """No graph, no autocast, no TF32, whatever the user's training loop has switched on."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _full_precision(device):
        yield


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32. Only the setting of the device's own backend is touched."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    # torch refuses to read its old switches once its new ones were set; old versions have no new.
    switch: tuple[str, Any, tuple[Any, ...]] = ("fp32_precision", "ieee", ("tf32", "bf16"))
    if not hasattr(matmul, switch[0]):
        matmul, switch = torch.backends.cuda.matmul, ("allow_tf32", False, (True,))
    name, full, reduced = switch
    before = getattr(matmul, name)
    if before not in reduced:
        yield
        return
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)
