"""Counters by cause, timers and bytes: what Anderson acceleration did and what it cost."""

from __future__ import annotations

import dataclasses
import enum
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from aadl_hvd.schema import entries, every, instance, integer, number


class Rejection(enum.Enum):
    """Why an acceleration step left the base optimizer's step in place."""

    NONFINITE = "nonfinite"  # NaN or Inf in weights, residual or history: look at the base's lr
    DEGENERATE = "degenerate"  # zero residual, or no independent column: converged, or q too small
    NOISE = "noise"  # the residual does not stand out of its noise: stats.batch_factor
    BACKOFF = "backoff"  # not tried, because of bad experience shortly before
    DESCENT = "descent"  # <w+ - w, r> <= 0: near a saddle, or the history is too old: lower m
    RESIDUAL = "residual"  # the norm of the next residual did not fall: lower beta
    GAIN = "gain"  # no direction in which the base optimizer is slow: nothing to gain
    LOSS = "loss"  # the loss was higher, at once (closure) or in the next step (observe)


class Reset(enum.Enum):
    """Why the history was forgotten."""

    NONFINITE = "nonfinite"
    # Parameters, dtypes, devices, which learning rates are 0, a weight decay by more than 10 %;
    # with residual="step" the ratio of the groups' rates.
    CHANGED = "changed"
    # Ranks had not stored the same (one loaded a checkpoint), or did not hold the same weights.
    DESYNCHRONIZED = "desynchronized"
    RANKS = "ranks"  # elastic: parts went with a rank that is gone
    LOADED = "loaded"  # load_state_dict
    REQUESTED = "requested"  # reset() was called


# Order of an accelerated step; "read" copies this rank's rows, "replicas" compares all weights,
# "write" puts the update in place.
PARTS = (
    "read",
    "replicas",
    "noise",
    "store",
    "gram",
    "solve",
    "update",
    "gather",
    "write",
    "safeguard",
    "average",
)
_SMOOTHING = 0.9
_COUNTED = "steps", "stored", "accelerated", "jumps", "averaged"
_MEASURED = (
    *("promised_reduction", "condition", "rank", "noise_variance", "signal", "gate"),
    *("wobble", "walk", "block_length", "promised_gain"),
)
_CAUSES = every(integer(), key=instance(str))
_COUNTERS = entries(dict.fromkeys(_COUNTED, integer()) | {"rejected": _CAUSES, "resets": _CAUSES})
_MEASUREMENTS = entries({}, dict.fromkeys(_MEASURED, number(finite=False)))


class _Timer(AbstractContextManager[None]):
    """A class, for steps enter several of them: a generator takes twice as long."""

    __slots__ = ("_outer", "_part", "_start", "_stats")

    def __init__(self, stats: Stats, part: str) -> None:
        self._stats, self._part = stats, part

    def __enter__(self) -> None:
        stats = self._stats
        self._outer, stats._nested = stats._nested, 0.0
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent, stats = time.perf_counter() - self._start, self._stats
        stats.seconds[self._part] += spent - stats._nested
        stats._nested = self._outer + spent


@dataclasses.dataclass
class Stats:
    """What has happened since the optimizer was made.

    The same on every rank but for times, and for counters that a checkpoint brought to one rank
    alone.

    Attributes:
        steps: calls of `step`.
        stored: pairs (w, r) that entered the history; with the subspace method, block means.
        accelerated: steps whose weights were replaced by the accelerated point, rejections that
            came later included.
        jumps: those of the accelerated steps that the subspace method made, at the end of a block.
        rejected: acceleration steps that left the base optimizer's step in place, by cause, see
            `Rejection`. An acceleration step is counted as accelerated, under one cause, or, where
            it came too early for a point, not at all. One that `safeguard="residual"` or an
            observed loss rejects a step later is counted as both.
        resets: times the history was forgotten, by cause (`Reset`).
        averaged: steps whose weights were replaced by the moving average.
        promised_reduction: ||r - R gamma|| / ||r|| of the last solve; small is good, 1 is no gain.
        noise_variance: variance of the mean gradient's noise, summed over coordinates; smoothed
            over the last 10 acceleration steps or so.
        signal: square of the norm of the mean gradient without its noise, smoothed likewise.
        condition: condition number of the last Gram matrix after truncation.
        gate: `noise_gate` of the settings; NaN before the first acceleration step.
        method: the method at work, "residual" or "subspace".
        asleep: whether the subspace method looks at one block in 16 only, because nothing was
            gained for long.
        wobble: phi of the subspace method, the share of the loss that the iterates' own wobble
            makes up. Jumps are whole up to 0.2 and end at 0.4. NaN where no loss is observed.
        walk: psi of the subspace method, 1 where the block means go no farther than noise would
            carry them. Jumps are whole up to 0.5 and end at 1.5.
        block_length: L, steps in the last block.
        promised_gain: what the loss fell by through jumps in all, by the method's own prediction;
            those that an observed loss has taken back included.
        rank: columns' worth of directions that the last solve used.
        seconds: wall-clock of each part on this rank, summed. On a GPU, work is counted where the
            host waits for it, mostly under "gram".
        bytes: bytes this rank handed to collectives, by part.
        enabled: as in the settings. If False, no step is stored, accelerated, rejected or averaged.
    """

    steps: int = 0
    stored: int = 0
    accelerated: int = 0
    jumps: int = 0
    averaged: int = 0
    rejected: dict[str, int] = dataclasses.field(
        default_factory=lambda: {cause.value: 0 for cause in Rejection}
    )
    resets: dict[str, int] = dataclasses.field(
        default_factory=lambda: {cause.value: 0 for cause in Reset}
    )
    promised_reduction: float = math.nan
    condition: float = math.nan
    rank: int = 0
    noise_variance: float = math.nan
    signal: float = math.nan
    gate: float = math.nan
    method: str = "residual"
    asleep: bool = False
    wobble: float = math.nan
    walk: float = math.nan
    block_length: int = 0
    promised_gain: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    enabled: bool = True

    def __post_init__(self) -> None:
        self._nested = 0.0  # seconds of the timed parts within the one that runs

    @property
    def batch_factor(self) -> float:
        """How many times the present batch it takes for acceleration to be let through.

        Below 1 the gate is open. The noise of a mean falls as one over the batch:
        gate * noise_variance / signal. Infinite where no signal is seen, NaN where nothing has
        been measured.
        """
        if math.isnan(self.noise_variance) or math.isnan(self.signal):
            return math.nan
        if self.signal <= 0.0:
            return math.inf if self.noise_variance > 0.0 else math.nan
        return self.gate * self.noise_variance / self.signal

    def note_noise(self, variance: float, squared: float, gate: float) -> None:
        """Takes in one measurement: sigma^2 and ||r||^2, noise included."""
        self.gate = gate
        for name, value in (("noise_variance", variance), ("signal", squared - variance)):
            old = getattr(self, name)
            if math.isfinite(value):
                new = value if math.isnan(old) else _SMOOTHING * old + (1.0 - _SMOOTHING) * value
                setattr(self, name, new)

    def note_block(self, length: int, wobble: float, walk: float) -> None:
        """Notes a block of the subspace method: L, phi and psi."""
        self.block_length, self.wobble, self.walk = length, wobble, walk
        self.stored += 1

    def note_jump(self, gain: float) -> None:
        """Notes a jump of the subspace method by the gain that it predicts."""
        self.jumps += 1
        self.promised_gain += gain

    def take_back_jump(self, gain: float) -> None:
        """Undoes `note_jump`, for a jump that was rejected before it was made."""
        self.jumps -= 1
        self.promised_gain -= gain

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Adds the wall-clock time of the block to `seconds[part]`, less that of parts in it."""
        return _Timer(self, part)

    def counters(self) -> dict[str, Any]:
        """The counts alone, in plain types: what a checkpoint keeps."""
        counts = {name: getattr(self, name) for name in _COUNTED}
        return counts | {"rejected": dict(self.rejected), "resets": dict(self.resets)}

    def load_counters(self, saved: Mapping[str, Any]) -> None:
        """Takes over what `counters` returned; causes unknown here are kept.

        Raises:
            CheckpointError: something in it is no count. Nothing is taken over.
        """
        _COUNTERS(saved, "counters")
        for name in _COUNTED:
            setattr(self, name, saved[name])
        self.rejected = self.rejected | saved["rejected"]
        self.resets = self.resets | saved["resets"]

    def measured(self) -> dict[str, float]:
        """What was measured last, or smoothed: what a checkpoint keeps beside the counts."""
        return {name: getattr(self, name) for name in _MEASURED}

    def load_measured(self, saved: Mapping[str, float]) -> None:
        """Takes over what `measured` returned.

        Raises:
            CheckpointError: something in it is no number. Nothing is taken over.
        """
        _MEASUREMENTS(saved, "measured")
        for name in _MEASURED:
            setattr(self, name, saved.get(name, getattr(self, name)))

    def __str__(self) -> str:
        if not self.enabled:
            return f"{self.steps} steps of the base optimizer alone: enabled=False"
        rejected = ", ".join(f"{cause} {count}" for cause, count in self.rejected.items() if count)
        resets = ", ".join(f"{cause} {count}" for cause, count in self.resets.items() if count)
        text = (
            f"{self.steps} steps: {self.stored} stored, {self.accelerated} accelerated, "
            f"{sum(self.rejected.values())} rejected{f' ({rejected})' if rejected else ''}, "
            f"{self.averaged} averaged, {sum(self.resets.values())} resets"
            f"{f' ({resets})' if resets else ''}; "
        )
        if self.method == "subspace":
            text += (
                f"subspace method at work{', asleep' if self.asleep else ''}: {self.jumps} jumps, "
                f"promised gain {self.promised_gain:.3g}, blocks of {self.block_length} steps, "
                f"wobble {self.wobble:.3g}, walk {self.walk:.3g}; "
            )
        else:
            text += (
                f"last solve: promised reduction {self.promised_reduction:.3g}, condition "
                f"{self.condition:.3g}; gate opens at {self.batch_factor:.3g} times this batch; "
            )
        return f"{text}{sum(self.seconds.values()):.3g} s in Anderson acceleration"
