"""The class of an accelerated optimizer: made at run time, from the given optimizer's class.

Users see an ordinary class, such as `AndersonOptimizer`. What they get is an instance of a class
below it and below their own optimizer's class:

    made -> keeping -> given class -> ... -> torch.optim.Optimizer -> AndersonOptimizer -> ...

The methods of the public class are copied into `made`, so that they come first. As a base class the
public class stands last, for two reasons. Methods of Horovod's optimizer call
`super(self.__class__, self)`, which must lead to `keeping`. And where the given class calls
`super().state_dict()`, it means torch's method and not ours.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from aadl_hvd.optim.engine import Closure

_Public = TypeVar("_Public")
_Attribute = tuple[Any, str, Any]  # whose, its name, its value

# Holds hooks of all optimizers: torch.optim.optimizer.register_optimizer_step_pre_hook.
TORCH_MODULE: Any = sys.modules[torch.optim.Optimizer.__module__]
# The code that torch wraps around the method `step` of every optimizer class, to fire hooks.
_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__

# Attributes of a class that are not to be copied into another.
_OF_A_CLASS = {"__dict__", "__weakref__", "__new__", "__module__", "__qualname__", "__doc__"}
_OF_A_CLASS |= {"__annotations__", "__firstlineno__", "__static_attributes__"}


def attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of an optimizer's attributes, to be shared with the accelerated one."""
    # An instance attribute `step` is a scheduler's wrapper, bound to the optimizer given.
    attributes = {k: v for k, v in vars(optimizer).items() if k != "step"}
    # GradScaler must unscale gradients before they become residuals, even for fused optimizers.
    return attributes | {"_step_supports_amp_scaling": False}


def accelerated_class(
    public: type[_Public],
    given: type[torch.optim.Optimizer],
    below: Mapping[str, Any] | None = None,
    hook_base: bool = False,
    wrap_step: Callable[[Any], Any] | None = None,
) -> type[_Public]:
    """A class below both `public` and `given`, in which the methods of `public` come first.

    Args:
        public: `AndersonOptimizer` or alike, or a subclass that a user has made of it.
        given: class of the optimizer to accelerate.
        below: further attributes, which come after those of `public` and before those of `given`;
            `__module__` among them is the module that the class names as its own.
        hook_base: whether step hooks fire around the base optimizer's step as well.
        wrap_step: applied to the method `step`. None: torch's hooks are wrapped around it.
    """
    namespace = {"__module__": given.__module__} | dict(below or {})
    for cls in reversed(public.__mro__[:-1]):
        namespace |= {k: v for k, v in vars(cls).items() if k not in _OF_A_CLASS}
    namespace["_anderson_public"] = public
    # The public class makes its instances in __new__; this one cannot be used to make more.
    namespace["__new__"] = lambda cls, *args, **kwargs: object.__new__(cls)
    if wrap_step is not None:
        namespace["step"] = wrap_step(namespace["step"])
    keeping = _keeping_gradient(given, hooked=hook_base)
    return type(given.__name__, (keeping, public), namespace)


def _keeping_gradient(given: type[torch.optim.Optimizer], hooked: bool) -> Any:
    """The given class, with a look at the final gradients before it uses them.

    Args:
        given: class of the optimizer to accelerate.
        hooked: whether step hooks fire here: then what they do to gradients counts.
    """
    bare, inside = _without_hooks(given.step)

    def step(self: Any, closure: Closure | None = None) -> Any:
        engine = self.anderson_engine
        engine.before_base_step()

        def evaluate() -> Any:
            assert closure is not None
            with _exchanged(heard):  # the closure may step another optimizer
                loss = engine.evaluate(closure)
            engine.problem.keep_gradient()
            return loss

        with _exchanged(_no_hooks(self) if inside else []) as heard:
            if closure is not None:
                return bare(self, evaluate)
            engine.problem.keep_gradient()
            return bare(self)

    namespace: dict[str, Any] = {"step": step, "__module__": given.__module__}
    if hooked and (inside or bare is not given.step):
        namespace["step"] = torch.optim.Optimizer.profile_hook_step(step)
    return type(given.__name__, (given,), namespace)


def _without_hooks(step: Any) -> tuple[Any, bool]:
    """A method `step` without what torch has wrapped around it, if anything.

    Returns:
        The method, and whether it fires hooks all the same: users may have wrapped it once more
        (`functools.wraps`), and what is inside a function cannot be taken out.
    """
    if getattr(step, "__code__", None) is _HOOKED:
        return step.__wrapped__, False
    # The mark by which torch itself knows that a step fires hooks; functools.wraps copies it.
    return step, bool(getattr(step, "hooked", False))


def _no_hooks(optimizer: Any) -> list[_Attribute]:
    """For `_exchanged`: no step hooks fire within, for they fire around it."""
    changed: list[_Attribute] = []
    for kind in ("pre", "post"):
        changed.append((optimizer, f"_optimizer_step_{kind}_hooks", OrderedDict()))
        name = f"_global_optimizer_{kind}_hooks"
        if getattr(TORCH_MODULE, name):
            changed.append((TORCH_MODULE, name, OrderedDict()))
    return changed


@contextlib.contextmanager
def _exchanged(attributes: list[_Attribute]) -> Iterator[list[_Attribute]]:
    """Within, attributes have other values. Yields what they had before."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    for attribute in attributes:
        setattr(*attribute)
    try:
        yield before
    finally:
        for attribute in before:
            setattr(*attribute)
