"""The public methods of an accelerated optimizer, whatever reduces its gradients.

`AndersonOptimizer` (one process) and `DistributedAndersonOptimizer` (Horovod) are ordinary
subclasses that add a constructor. A subclass for another library adds an `Engine`, too, and calls
`AcceleratedOptimizer.accelerate` in its `__new__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar, overload

import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.errors import UnsupportedError
from aadl_hvd.optim import averaged, loading
from aadl_hvd.optim.classes import accelerated_class, attributes_of
from aadl_hvd.optim.engine import Closure, Engine

_Loss = TypeVar("_Loss", bound=float | Tensor)
_Batch = TypeVar("_Batch")

if TYPE_CHECKING:
    _Optimizer = torch.optim.Optimizer
else:
    # Instances are torch optimizers by their own class, see `aadl_hvd.optim.classes`: ours must
    # come after it.
    _Optimizer = object


class AcceleratedOptimizer(_Optimizer):
    """A torch optimizer with Anderson acceleration: its methods, without a constructor.

    Instances are made by `AndersonOptimizer` or `DistributedAndersonOptimizer`. They are instances
    of the given optimizer's class as well.

    Attributes:
        anderson: the algorithm: `.stats`, `.config`, `.history_bytes`, `.reset()`.
        anderson_engine: what reduces the gradients.
    """

    anderson: Accelerator
    anderson_engine: Engine
    _anderson_public: ClassVar[type]  # the class that the constructor was called on

    @classmethod
    def accelerate(
        cls,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        config: AndersonConfig,
        comm: Communicator,
        group: ShardGroup | None = None,
    ) -> Self:
        """An accelerated optimizer that shares state, groups and hooks with a plain one.

        For the constructors of subclasses: each belongs to one way to reduce gradients. Not
        collective.

        Args:
            optimizer: any `torch.optim.Optimizer`.
            engine: a new one, for this optimizer alone.
            config: settings of the acceleration, the same on all ranks.
            comm: the ranks that train together.
            group: those of them that share one history with this rank; None: all.

        Raises:
            UnsupportedError: the parameters or the optimizer cannot be accelerated.
        """
        made_class = accelerated_class(cls, type(optimizer))
        made = made_class.__new__(made_class)
        vars(made).update(attributes_of(optimizer))
        return made._attach(engine, optimizer, config, comm, group or ShardGroup(comm))

    def _attach(
        self,
        engine: Engine,
        given: torch.optim.Optimizer,
        config: AndersonConfig,
        comm: Communicator,
        group: ShardGroup,
    ) -> Self:
        engine.attach(self, given, config, comm, group)
        self.anderson, self.anderson_engine = engine.accelerator, engine
        self._patch_step_function()  # torch's own: step hooks and the name in profiles
        return self

    def __init__(self, *_: object, **__: object) -> None:
        # Python calls this with what __new__ has made. All other calls are mistakes.
        if "anderson" not in vars(self):
            raise UnsupportedError(
                f"Invalid use of the class of an accelerated {type(self).__name__}: it cannot be "
                "constructed, nor wrapped by hvd.DistributedOptimizer. Pass the plain torch "
                "optimizer to AndersonOptimizer or DistributedAndersonOptimizer."
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Closure | None = None) -> float | Tensor | None:
        """One step of the base optimizer, accelerated on every p-th. Collective.

        Args:
            closure: clears the gradients, computes the loss, calls `backward()` and returns the
                loss, as in torch; needed with `safeguard="loss"`.

        Returns:
            What the base optimizer returns: the loss of the closure, None without one.

        Raises:
            UnsupportedError: called in `averaged_weights`, or without a closure that is needed.
        """
        engine = self.anderson_engine
        engine.check_step()
        config = self.anderson.config
        if closure is None and config.enabled and config.safeguard == "loss":
            raise UnsupportedError(
                "Invalid step(closure=None) with safeguard='loss'. Must be given a closure that "
                "clears the gradients, computes the loss, calls backward() and returns the loss; "
                "or choose safeguard='descent', which needs none."
            )
        if engine.averaging:
            raise UnsupportedError(
                "Invalid step() inside averaged_weights(): training goes on from the weights "
                "themselves. Leave the block first."
            )
        vars(engine.given)["_opt_called"] = True  # for schedulers made before the wrapping
        return engine.step(closure)  # type: ignore[no-any-return]

    def observe(self, loss: float | Tensor) -> None:
        """Says this rank's loss at the present weights, before `step`: an optional line.

        It judges the accelerated step before. If the mean over ranks is higher than it was, by
        more than the losses' own spread, weights and momentum go back to the base optimizer's
        step on all ranks. This step then does nothing else, and acceleration pauses for a while.
        All ranks should call it; a step in which one does not is not judged.

        Args:
            loss: of the ordinary forward pass, a float or a tensor []; of several calls before one
                step the mean counts.

        Raises:
            ConfigError: not one number.
            UnsupportedError: called while a step runs, or with op=Adasum, which moves the weights
                in the backward pass.
        """
        self.anderson_engine.check_observe()
        self.anderson.observe(loss)

    def averaged_weights(
        self,
        loss: Closure | None = None,
        *,
        which: float | str | None = "auto",
        model: torch.nn.Module | None = None,
        batches: Iterable[_Batch] = (),
        forward: Callable[[_Batch], object] | None = None,
    ) -> AbstractContextManager[float | None]:
        """Within, the model holds averaged weights, for evaluation, saving or export.

        Afterwards weights and batch-norm statistics are what they were, bit for bit. Collective;
        no step may be taken inside. Which of `AndersonConfig.averages` it is:

        - with `loss`: the one, the last iterate included, with the lowest mean over ranks; so it
          is never worse than the last iterate on the data that `loss` sees.
        - without: the one that promises the largest gain by the trapezoidal rule over gradients
          measured in training (residual="gradient" only), the last iterate if none does.

        Args:
            loss: evaluates this rank's loss at the weights in place, on the same few batches each
                time.
            which: names an average, or None for the last iterate, in place of a choice.
            model: its batch-norm statistics are measured at the weights chosen (and at those
                compared), and averaged over ranks; needs `batches`. With FSDP2 it must be given,
                for its modules have to gather the weights; without batch norm it needs no batches.
            batches: at least one with `model`.
            forward: called with each batch; None: `model`.

        Returns:
            A context manager. It yields the average's name in `AndersonConfig.averages`, or None
            for the last iterate.

        Raises:
            ConfigError: there is no such average, or no batches.
            UnsupportedError: called inside itself.
            ReplicaMismatchError: on the other ranks, if one rank raised one of these; on all, if
                they asked for different things.
        """
        return averaged.averaged_weights(self.anderson_engine, loss, which, model, batches, forward)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with counters and settings under "anderson".

        Not collective. Loads into plain torch as well. The history is not in it, except on the
        rank that `consolidate_state_dict` has just given it; without it the history rebuilds
        itself in m stores after loading. Hooks see all of it. Where one returns another state in
        its place, "anderson" is put into that; one that puts a state inside another dict has to
        keep the entry itself.
        """
        return loading.state_dict(self.anderson_engine)

    def consolidate_state_dict(self, to: int = 0) -> dict[str, Any] | None:
        """`state_dict` with the whole history, on rank `to`; None on the others. Collective.

        Loads into any number of ranks, any layout and depth. The ranks' shards travel through host
        memory, one rank's at a time. Rank `to` needs memory for the whole, 2 m n numbers and what
        else there is (2 n for the last pair, 2 n for each average); the others need it for
        one tensor of their own. Until the next step, load, reset or new parameter group
        `state_dict` on rank `to` holds it, too. Hooks of `state_dict` fire on rank `to` alone,
        when nobody waits for it any more: they may raise, and must not be collective.

        Args:
            to: a rank of the process set.

        Raises:
            ConfigError: there is no such rank, or ranks asked for different ones; on every rank.
            CheckpointError: on every rank, if any could not hand out or receive a shard.
        """
        return self.state_dict() if loading.consolidate(self.anderson_engine, to) else None

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's shard of the history, copied to host memory, without the base's state.

        Not collective. For one file a rank, written in parallel, and for a rank that may outlive
        others: 2 m n/P numbers, 2 n/P for the last pair, 2 n/P for each average. Where a
        step is on trial that may have to be undone, the base optimizer's state is in it, too (with
        `safeguard="residual"`). No hooks of `state_dict` fire: they are about the base's state.

        Returns:
            {"anderson": ...}: plain dicts, lists, numbers and tensors, see `aadl_hvd.checkpoint`.
            `load_state_dict` takes it on the same rank of as many, alone, after the base
            optimizer's state, or with it, `{**state, **shard}`;
            `aadl_hvd.checkpoint.merge_shards` joins the shards of all ranks.
        """
        state = loading.anderson_state(self.anderson_engine)
        state["history"] = self.anderson.shard_state(self.anderson_engine.problem).to_dict()
        return {"anderson": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, with a history or without, or of plain torch.

        Settings are not taken from it: those given at construction hold. A history is fitted to
        them, to the number of ranks and to the layout: with a smaller `history_depth` the newest
        columns are kept. Where that is impossible (another `residual`, other trained parameters,
        other ratios of the rates where the residual depends on them) it is left out with a
        warning, and rebuilds itself in m stores. What else does not fit raises an error, and
        everything stays as it was.

        Not collective: Horovod's usual resume, in which rank 0 alone loads and broadcasts
        afterwards, must not wait for anybody. So the history, and the number of the step that
        says when to store and accelerate, come into force only when a collective that all ranks
        enter anyhow has shown that all have loaded the same: the first `step` of an optimizer has
        a tiny one for this. If all ranks load, each its own shard or all the full state, that step
        goes on bit for bit as the run that was saved, on as many ranks (on other numbers, to
        rounding). If only some have, the history is reset on all of them. In the middle of a run
        the next acceleration step finds out, or `anderson.agree(...)`. There the history and its
        averages are copied to host memory meanwhile, so that they can be put back.

        Hooks fire as in torch, pre-hooks before anything is examined, so that they may adapt it;
        what they raise comes through, and everything is put back then, too. None fire for a shard
        of the history alone, {"anderson": ...}.

        With `enabled=False` a history is left out with a warning. What such an optimizer has saved
        holds none: one that is enabled loads it and begins its history as a new one does.

        Raises:
            CheckpointError: damaged, from a newer version, of another model, or a shard that is
                not this rank's: says what differs. The base optimizer's state is examined, too: a
                tensor that holds NaN, of which nothing good can come, is damage.
        """
        loading.load(self.anderson_engine, state_dict)

    def zero_grad(self, set_to_none: bool | None = None, **more: object) -> None:
        """As in torch; with Horovod not between backward() and step() or synchronize().

        Args:
            set_to_none: None: as the given optimizer's class has it.
            more: what else the given optimizer's class takes.
        """
        self.anderson_engine.check_zero_grad()
        given = () if set_to_none is None else (set_to_none,)
        self.anderson_engine.base.zero_grad(*given, **more)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the history is reset in the next step."""
        self.anderson_engine.base.add_param_group(param_group)
        self.anderson.full_state = None

    def __repr__(self) -> str:
        return f"{self.anderson_engine.base.__repr__()}\n{self.anderson.config}"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError(
            "Invalid copy or pickle of a distributed optimizer, which is tied to its parameters "
            "and to the other ranks. Use state_dict() and load_state_dict()."
        )
