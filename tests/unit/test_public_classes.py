"""The public classes as tools and subclasses see them: ordinary classes with typed methods."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
import typed_program
from test_optimizer import NEVER, OFTEN, data, flat, network, train
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from aadl_hvd import AndersonOptimizer, DistributedAndersonOptimizer
from aadl_hvd.optim.accelerated import AcceleratedOptimizer

METHODS = [
    "add_param_group",
    "averaged_weights",
    "consolidate_state_dict",
    "load_state_dict",
    "observe",
    "sharded_state_dict",
    "state_dict",
    "step",
    "zero_grad",
]
CLASSES = AndersonOptimizer, DistributedAndersonOptimizer


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_documented_and_annotated(cls, name):
    method = getattr(cls, name)
    assert inspect.getdoc(method)
    if name == "step":  # torch.compiler.disable hides the annotations; mypy sees the overloads
        return
    signature = inspect.signature(method)
    assert signature.return_annotation not in (inspect.Signature.empty, "Any")
    for parameter in list(signature.parameters.values())[1:]:
        assert parameter.annotation not in (inspect.Parameter.empty, "Any"), parameter


@pytest.mark.parametrize("cls", CLASSES)
def test_constructors_say_what_they_return(cls):
    signature = inspect.signature(cls)
    assert signature.return_annotation == "Self"
    assert all(p.annotation not in ("Any", p.empty) for p in signature.parameters.values())
    assert issubclass(cls, AcceleratedOptimizer)


def test_typed_program_runs():
    """mypy checks the same program."""
    model = torch.nn.Linear(2, 2)
    opt = typed_program.in_one_process(model, model(torch.ones(1, 2)).sum())
    assert typed_program.narrowed(opt) == opt.anderson.columns
    assert typed_program.narrowed(torch.optim.SGD(model.parameters())) == -1


class Counting(AndersonOptimizer):
    """A user's subclass: it extends two methods and adds one."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.zeroed = True
        super().zero_grad(set_to_none)

    def twice(self):
        return 2 * self.steps


def test_a_subclass_is_what_one_gets():
    model, other = network(), network()
    opt = Counting(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), anderson=OFTEN)
    assert isinstance(opt, Counting) and isinstance(opt, torch.optim.SGD)
    hooks = []
    opt.register_step_pre_hook(lambda *_: hooks.append(opt.steps))
    train(model, opt, data(9))
    assert opt.twice() == 18 and opt.zeroed
    assert hooks == list(range(9)), "hooks fire once, around all of it"
    plain = AndersonOptimizer(
        torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), anderson=OFTEN
    )
    train(other, plain, data(9))
    assert opt.anderson.stats.accelerated == 3
    assert torch.equal(flat(model), flat(other))
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert isinstance(twin, Counting)


def test_methods_that_the_given_class_extends_by_super():
    """They mean torch's methods, and not ours."""

    class Noting(torch.optim.SGD):
        def state_dict(self):
            return super().state_dict() | {"note": 1}

        def add_param_group(self, group):
            super().add_param_group(group)
            self.added = getattr(self, "added", 0) + 1

    model = network()
    opt = AndersonOptimizer(Noting(model[0].parameters(), lr=0.1), anderson=OFTEN)
    opt.add_param_group({"params": list(model[2].parameters())})
    train(model, opt, data(4))
    state = opt.state_dict()
    assert state["note"] == 1 and "anderson" in state
    assert opt.added == 2


def test_zero_grad_takes_what_the_given_class_takes():
    class Partly(torch.optim.SGD):
        def zero_grad(self, set_to_none=True, *, first=0):
            self.asked = set_to_none, first
            for p in self.param_groups[0]["params"][first:]:
                p.grad = None if set_to_none else torch.zeros_like(p)

    model = network()
    opt = AndersonOptimizer(Partly(model.parameters(), lr=0.1), anderson=OFTEN)
    weights = [*model.parameters()]
    for given, asked in (((), True), ((False,), False)):
        for p in weights:
            p.grad = torch.ones_like(p)
        opt.zero_grad(*given, first=1)
        assert opt.asked == (asked, 1)
        assert bool(weights[0].grad.all())
        assert not any(p.grad is not None and p.grad.any() for p in weights[1:])
    with pytest.raises(TypeError, match="unexpected keyword argument 'second'"):
        opt.zero_grad(second=1)


@pytest.mark.parametrize("hooks", ["own", "everywhere"])
def test_a_step_that_the_user_has_wrapped_fires_hooks_once(hooks, monkeypatch):
    """functools.wraps keeps the mark that torch has wrapped it already."""
    found = []
    for accelerated in (False, True):
        model, calls = network(), []
        torch.optim.SGD(model.parameters(), lr=0.1)  # torch wraps step at the first construction
        inside = torch.optim.SGD.step

        @functools.wraps(inside)
        def wrapped(self, *args, inside=inside, calls=calls, **kwargs):
            calls.append("wrapper")
            return inside(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.SGD, "step", wrapped)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if accelerated:
            opt = AndersonOptimizer(opt, anderson=NEVER)
        register = opt.register_step_pre_hook, opt.register_step_post_hook
        if hooks == "everywhere":
            register = register_optimizer_step_pre_hook, register_optimizer_step_post_hook

        def clip(*_, model=model, calls=calls):
            calls.append("pre")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        def note(*_, calls=calls):
            calls.append("post")

        handles = register[0](clip), register[1](note)
        try:
            train(model, opt, data(4))
        finally:
            for handle in handles:
                handle.remove()
            monkeypatch.undo()
        assert sorted(calls) == sorted(["pre", "wrapper", "post"] * 4)
        count = len(calls)
        train(model, opt, data(1))
        assert calls.count("pre") == 4, "a hook that was removed has fired"
        assert count == 12
        found.append(flat(model))
    assert torch.equal(*found)


def test_hooks_that_fire_in_a_closure_are_not_silenced(monkeypatch):
    """A closure may step another optimizer; hooks of all optimizers hear of that one, too."""
    found = []
    for accelerated in (False, True):
        model, other, calls = network(), torch.nn.Parameter(torch.ones(2)), []
        torch.optim.SGD([other], lr=0.1)  # torch wraps step at the first construction
        inside = torch.optim.SGD.step

        @functools.wraps(inside)
        def wrapped(self, *args, inside=inside, **kwargs):
            return inside(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.SGD, "step", wrapped)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        if accelerated:
            opt = AndersonOptimizer(opt, anderson=NEVER)
        another = torch.optim.Adam([other])

        def closure(model=model, opt=opt, other=other, another=another):
            opt.zero_grad()
            other.grad = torch.ones(2)
            another.step()
            loss = model(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        def note(optimizer, *_, opt=opt, calls=calls):
            calls.append("its own" if optimizer is opt else "another's")

        handles = [
            register_optimizer_step_pre_hook(note),
            register_optimizer_step_post_hook(note),
        ]
        try:
            for _ in range(2):
                opt.step(closure)
        finally:
            for handle in handles:
                handle.remove()
            monkeypatch.undo()
        assert calls == ["its own", "another's", "another's", "its own"] * 2
        found.append(flat(model))
    assert torch.equal(*found)
