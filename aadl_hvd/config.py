"""Configuration of Anderson acceleration: one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol, get_args

import torch

from aadl_hvd.errors import ConfigError

Safeguard = Literal["none", "residual", "loss", "descent"]
Method = Literal["auto", "residual", "subspace"]
Residual = Literal["step", "gradient"]
Layout = Literal["rows", "columns"]
ShardGroup = Literal["world", "node"]
DesyncReaction = Literal["error", "resync"]
MAX_DEPTH: Final = 1000
HISTORY_DTYPES: Final = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}

# The settings printed in section "Numerical results" of arXiv 2110.14813. It never gives t.
_PAPER: Final[dict[str, dict[str, Any]]] = {
    "admissions": {"history_depth": 10, "frequency": 1, "store_every": 1, "relaxation": 0.1},
    "burgers2d": {"history_depth": 5, "frequency": 10, "store_every": 5, "relaxation": 1.0},
    "burgers100d": {"history_depth": 20, "frequency": 1, "store_every": 1, "relaxation": 1.0},
    "resnet50": {"history_depth": 20, "frequency": 5, "store_every": 5, "relaxation": 0.5},
}
_PAPER_WINDOW: Final = {"admissions": 5, "burgers2d": 5, "burgers100d": 5, "resnet50": 4}
_PAPER_THRESHOLD: Final = 0.1

# Options that earlier versions had, and what to use in their place.
DROPPED: Final = {
    "damping": "It is called mixing now: the mixing parameter of Anderson's method.",
    "refine": "Leave it out: no measured case has needed refinement. If the least-squares problem "
    "is ill-conditioned, use regularization=1e-10.",
    "momentum": "Leave it out: the base optimizer's momentum is always kept.",
    "history_device": "Leave it out: the history is on the device of the parameters. If it does "
    "not fit, use a smaller history_depth, history_dtype='bfloat16' or averages=().",
}


class ProcessSet(Protocol):
    """What `AndersonConfig` needs to know of a Horovod process set."""

    ranks: Any

    def included(self) -> bool:
        """Whether this rank belongs to it."""


class ProcessGroup(Protocol):
    """A process group of torch.distributed, or a DeviceMesh."""

    def size(self) -> int:
        """How many ranks it has."""


def _refuses_dropped_options(cls: type[AndersonConfig]) -> type[AndersonConfig]:
    """Makes the constructor raise a `ConfigError` for an option that earlier versions had.

    Python's own error would be "unexpected keyword argument", without what to use instead. The
    dropped names cannot be fields: they would be part of the signature. `functools.wraps` keeps
    the signature that `help` shows. Only the constructor changes, so `pickle`, `copy` and
    `dataclasses.replace` work as for any frozen dataclass.
    """
    construct: Callable[..., None] = cls.__init__

    @functools.wraps(construct)
    def __init__(self: AndersonConfig, *args: Any, **settings: Any) -> None:
        for name, advice in DROPPED.items():
            if name in settings:
                raise ConfigError(
                    f"Invalid {name}={settings[name]!r}. AndersonConfig has no such option. "
                    f"{advice}"
                )
        construct(self, *args, **settings)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_refuses_dropped_options
@dataclasses.dataclass(frozen=True, kw_only=True)
class AndersonConfig:
    """Settings of Anderson acceleration (AA), all keyword-only, validated at construction.

    Equation numbers are those of Lupo Pasini, Yin, Reshniak, Stoyanov, "Stable Anderson
    Acceleration for Deep Learning" (arXiv 2110.14813). The defaults are not the paper's: they were
    measured with full batches and with mini-batches (README, "When does it pay?"). The paper's own
    settings are `AndersonConfig.paper(name)`.

    The training program makes its options from the fields and from this section: see
    `models.anderson_options`.

    Args:
        enabled: False trains with the base optimizer alone, bit for bit: no history, no averages,
            no samples of gradients, no collectives in a step. `observe` is ignored, and
            `averaged_weights` yields the weights as they are. The other settings must be valid all
            the same. The value must be the same on all ranks.
        method: what makes a point of the history. "residual": the point of the smallest residual
            in the span of the history (Anderson acceleration, type II; the paper's), for full
            batches. "subspace": half a Newton step in the span of recent block means (type I), for
            mini-batches; it has no settings, and history_depth, frequency, store_every, relaxation,
            mixing, regularization and noise_gate are not about it. "auto": the first while its
            noise gate opens, else the second, whatever pays. "auto" never hands over with
            residual="step", layout="columns", safeguard="residual" or an average_window, which
            "subspace" refuses, nor with noise_gate=None.
        history_depth: m, the number of columns of W and R (Eq. 2, 3); from 1 to 1000. Every
            acceleration step sends a message of 8 m^2 bytes and decomposes an m x m matrix on each
            rank. With m = 1000 that is 8 MB and 0.4 s on one core; time grows with m^3.
        frequency: p, accelerate on every p-th step, where k mod p = 0 (Eq. 8); at least 1. Steps
            are counted from k = 1 after the warm-up.
        store_every: q, store the pair (w, r) where k mod q = 0, before accelerating; at least 1.
        relaxation: beta, above 0 and up to 1: the step taken towards the accelerated point (Eq. 6).
        mixing: weight of the residual term r - R gamma, from 0 to 10; 1 is Eq. 4, 0 drops the
            term. What the history leaves of r lies in directions of low curvature, in which the
            base optimizer's step is short. Measured, 3 is better than 1.
        warmup_steps: plain steps of the base optimizer before the first pair is stored.
        regularization: ridge of the least-squares problem, relative to the diagonal of the Gram
            matrix; at least 0. The result does not depend on the scale of the problem, nor on that
            of a column.
        average_window: t, number of iterates in the moving average (Eq. 11), at least 2;
            None switches the moving average off.
        average_threshold: epsilon of the criterion of Eq. 16, greater than 0. The average replaces
            the weights only while max sqrt(S) >= epsilon * max |r|.
        averages: decay factors per step, above 0 and below 1, of the running averages of the
            weights that are kept for evaluation (`averaged_weights`). They do not change the
            training. Each costs 2 n/P numbers; () for no averages.
        noise_gate: c of the noise gate: a point is accepted only where ||r||^2 - s > c s, with s
            the variance of the residual's noise as the ranks measure it. A column is used only
            where the square of its norm is above 2 c s. None opens the gate. That is for full
            batches on one rank, where noise has to be estimated from the residuals alone.
        safeguard: when an accelerated point is taken. "none": always. "descent": only if
            <w+ - w, r> > 0; no extra pass; after a rejection the older half of the columns is
            dropped. "residual": the paper's, judged in the next step: if the norm of the residual
            has not fallen, weights and base-optimizer state go back (costs a copy of the base
            optimizer's state and one wasted step per rejection). "loss": the closure given to
            `step` is evaluated at the base and at the accelerated point (two extra passes per
            acceleration step).
        residual: what r is. "step": G(w) - w, the paper's; wrong for optimizers with momentum.
            "gradient": -(gradient + weight_decay * w), turned into a step by the base optimizer's
            own scaling: lr / (1 - momentum), lr / (sqrt(v) + eps) for Adam and its kin.
        layout: "rows": every rank holds n/P rows of all columns. "columns": every rank holds full
            columns; uses at most m ranks.
        shard_group: the P ranks that share one history. "world": all that train together; least
            memory. "node": those of one node; the one large message of an acceleration step stays
            inside the node. Every group holds a full history; with layout="rows" only. In Python
            also a Horovod process set, or a process group or one-dimensional DeviceMesh of
            torch.distributed, that includes this rank; the ranks' sets must split the world into
            groups of one size.
        history_dtype: dtype of the stored columns: float64, float32 or bfloat16, in Python as a
            `torch.dtype` or its name. None: float64 if a parameter is float64, else float32.
        on_desync: what follows when ranks no longer hold the same weights, which every
            acceleration step checks. "error": an error on all ranks that names the ranks that
            differ from most. "resync": these get weights and optimizer state of the others, with a
            warning. Ranks that were never equal are warned of, and not accelerated.
        overlap: True: a jump of the subspace method is gathered while the next step runs, and added
            at its end. So the large message has a whole step's time. The gathered jump takes n
            numbers meanwhile. It is as late on one rank as on many, which then train alike. Nothing
            is late with FSDP2, where nothing large travels, nor where a closure judges the jump.
        cuda_graphs: True: pieces of a step's work on a GPU are captured as CUDA graphs at their
            third call. The host then starts each piece by one launch. It is meant for few rows a
            rank, where starting kernels takes the time, and for the subspace method above all. Each
            graph keeps the memory that its piece works in, which the forecast of memory leaves out.
            If a capture fails, steps go on without graphs and with a warning, but torch itself may
            not: begin again with False then. Not together with `torch.compile(mode=
            "reduce-overhead")`. With more than 2^21 rows a rank, and on a processor, it does
            nothing. It has never run on a real GPU; on the tests' pretended one weights are the
            same, bit for bit.

    Raises:
        ConfigError: a value is not allowed; the message names parameter, value and range.
    """

    enabled: bool = True
    method: Method = "auto"
    history_depth: int = 15
    frequency: int = 2
    store_every: int = 1
    relaxation: float = 1.0
    mixing: float = 3.0
    warmup_steps: int = 0
    regularization: float = 0.0
    average_window: int | None = None
    average_threshold: float = 0.1
    averages: tuple[float, ...] = (0.95, 0.99, 0.997)
    noise_gate: float | None = 10.0
    safeguard: Safeguard = "descent"
    residual: Residual = "gradient"
    layout: Layout = "rows"
    shard_group: ShardGroup | ProcessSet | ProcessGroup = "world"
    history_dtype: torch.dtype | None = None
    on_desync: DesyncReaction = "error"
    overlap: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("enabled", "overlap", "cuda_graphs"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"Invalid {name}={value!r}. Must be True or False.")
        self._check_integer("history_depth", 1, MAX_DEPTH)
        for name, low in (("frequency", 1), ("store_every", 1), ("warmup_steps", 0)):
            self._check_integer(name, low)
        if self.average_window is not None:
            self._check_integer("average_window", 2, other="or None, for no moving average")
        self._check_real("relaxation", 0.0, 1.0, low_open=True)
        self._check_real("mixing", 0.0, 10.0)
        if self.noise_gate is not None:
            self._check_real("noise_gate", 0.0, math.inf, other="or None, for no gate")
        self._check_real("regularization", 0.0, math.inf)
        self._check_real("average_threshold", 0.0, math.inf, low_open=True)
        self._check_averages()
        self._check_choice("method", get_args(Method))
        self._check_choice("safeguard", get_args(Safeguard))
        residual: Any = self.residual
        if isinstance(residual, str) and residual == "state":
            raise ConfigError(
                "Invalid residual='state', which AndersonConfig no longer has. Must be 'gradient', "
                "which is right for optimizers with momentum, or 'step'."
            )
        self._check_choice("residual", get_args(Residual))
        self._check_choice("layout", get_args(Layout))
        self._check_shard_group()
        self._check_choice("on_desync", get_args(DesyncReaction))
        self._check_history_dtype()
        if self.method == "subspace" and self._unfit:
            raise ConfigError(f"Invalid {self._unfit} with method='subspace'.")

    @classmethod
    def paper(cls, name: str, *, average: bool = True) -> AndersonConfig:
        """Settings of one of the paper's training problems.

        History depth, frequencies, relaxation and the threshold epsilon = 0.1 are the paper's
        (for ResNet50 it prints no epsilon; 0.1 is what it uses everywhere else). The residual is
        the base optimizer's step and the safeguard is that of Algorithm 1. The paper never gives
        the averaging window t, and asks for t < p, which p = 1 cannot satisfy: here t = 4 for
        "resnet50" (p = 5) and t = 5 for the others.

        Args:
            name: "admissions", "burgers2d", "burgers100d" or "resnet50".
            average: with the moving average (the paper's proposal) or without (its "AADL").

        Raises:
            ConfigError: unknown name.
        """
        if name not in _PAPER:
            raise ConfigError(f"Invalid name={name!r}. Must be one of {', '.join(_PAPER)}.")
        return cls(
            **_PAPER[name],
            average_window=_PAPER_WINDOW[name] if average else None,
            average_threshold=_PAPER_THRESHOLD,
            mixing=1.0,
            averages=(),
            noise_gate=None,
            safeguard="residual",
            residual="step",
            method="residual",
        )

    @property
    def hands_over(self) -> bool:
        """Whether the subspace method takes over where the noise gate stays shut."""
        return self.method == "auto" and self.noise_gate is not None and not self._unfit

    @property
    def _unfit(self) -> str:
        """Why the subspace method cannot work with these settings; "" if it can."""
        if self.residual != "gradient":
            return f"residual={self.residual!r}. Must be 'gradient'"
        if self.layout != "rows":
            return f"layout={self.layout!r}. Must be 'rows'"
        if self.safeguard == "residual":
            return "safeguard='residual'. Must be 'descent', 'none' or 'loss'"
        if self.average_window is not None:
            return f"average_window={self.average_window}. Must be None"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types only (for checkpoints, logs and comparison across ranks)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["averages"] = list(self.averages)
        if not isinstance(self.shard_group, str):
            fields["shard_group"] = "process set"  # another one on every group of ranks
        if self.history_dtype is not None:
            fields["history_dtype"] = str(self.history_dtype).removeprefix("torch.")
        return fields

    def _check_integer(
        self, name: str, low: int, high: int | None = None, *, other: str = ""
    ) -> None:
        value: Any = getattr(self, name)
        ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not ok or not low <= value <= (math.inf if high is None else high):
            upper = "" if high is None else f" and <= {high}"
            also = f", {other}" if other else ""
            raise ConfigError(
                f"Invalid {name}={value!r}. Must be an integer >= {low}{upper}{also}."
            )
        object.__setattr__(self, name, int(value))  # NumPy's numbers are no plain ones

    def _check_real(
        self, name: str, low: float, high: float, *, low_open: bool = False, other: str = ""
    ) -> None:
        value: Any = getattr(self, name)
        ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
        ok = ok and math.isfinite(value) and low <= value <= high
        if not ok or (low_open and value == low):
            lower = f"> {low:g}" if low_open else f">= {low:g}"
            upper = "" if math.isinf(high) else f" and <= {high:g}"
            also = f", {other}" if other else ""
            raise ConfigError(
                f"Invalid {name}={value!r}. Must be a finite number {lower}{upper}{also}."
            )
        if type(value) is not int:
            object.__setattr__(self, name, float(value))

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if not (value is None or isinstance(value, str)) or value not in choices:
            close = difflib.get_close_matches(str(value), filter(None, choices), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Invalid {name}={value!r}. Must be one of {choices}.{hint}")

    def _check_averages(self) -> None:
        value: Any = self.averages
        ok = isinstance(value, tuple | list) and len(set(value)) == len(value)
        for decay in value if ok else ():
            real = isinstance(decay, numbers.Real) and not isinstance(decay, bool)
            if real and 2 <= decay < math.inf and decay == int(decay):
                raise ConfigError(
                    f"Invalid averages={value!r}. Must be decay factors, > 0 and < 1. In earlier "
                    f"versions {decay:g} was the length of a window: "
                    f"{1.0 - 2.0 / (decay + 1):.4g} weights the steps with the same mean age."
                )
            ok = ok and real and 0.0 < decay < 1.0
        if not ok:
            raise ConfigError(
                f"Invalid averages={value!r}. Must be a tuple of different decay factors, > 0 and "
                "< 1."
            )
        object.__setattr__(self, "averages", tuple(map(float, value)))

    def _check_shard_group(self) -> None:
        value = self.shard_group
        if isinstance(value, str):
            self._check_choice("shard_group", get_args(ShardGroup))
        elif not (
            hasattr(value, "included") or hasattr(value, "get_group") or hasattr(value, "rank")
        ):
            raise ConfigError(
                f"Invalid shard_group={value!r}. Must be one of {get_args(ShardGroup)}, a Horovod "
                "process set, or a process group or DeviceMesh of torch.distributed."
            )
        if self.layout == "columns" and value != "world":
            raise ConfigError(
                f"Invalid shard_group={value!r} with layout='columns', whose updates are sums "
                "over ranks that groups may round differently. Must be 'world', or layout='rows'."
            )

    def _check_history_dtype(self) -> None:
        value: Any = self.history_dtype
        if value is torch.float16 or (isinstance(value, str) and value == "float16"):
            raise ConfigError(
                f"Invalid history_dtype={value!r}, whose range is too small for a history. Must be "
                "'bfloat16', which takes as much memory, or 'float32'."
            )
        if isinstance(value, str) and value in HISTORY_DTYPES:
            object.__setattr__(self, "history_dtype", HISTORY_DTYPES[value])
        elif value is not None and not any(value is known for known in HISTORY_DTYPES.values()):
            raise ConfigError(
                f"Invalid history_dtype={value!r}. Must be None or one of "
                f"{', '.join(HISTORY_DTYPES)} (as a torch.dtype or a string)."
            )
