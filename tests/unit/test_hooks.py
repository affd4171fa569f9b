"""torch's hooks on an accelerated optimizer: in one process, as torch fires them.

On several ranks: tests/parallel/test_hooks.py.
"""

import copy
import inspect
import pickle

import pytest
import torch
from problems import TEXTBOOK
from test_optimizer import NEVER, OFTEN, assert_same_state, data, flat, network, train

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    CheckpointError,
    DistributedAndersonOptimizer,
)


class Calling(torch.optim.SGD):
    """A subclass whose step calls the one above: torch fires hooks there as well."""

    def step(self, closure=None):
        return super().step(closure)


def momentum(model, cls=torch.optim.SGD):
    return cls(model.parameters(), lr=0.1, momentum=0.9)


def with_closure(opt, model, batches):
    for x, y in batches:

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        opt.step(closure)


@pytest.mark.parametrize("cls", [torch.optim.SGD, Calling])
@pytest.mark.parametrize("closure", [False, True])
def test_step_hooks_fire_as_torch_fires_them(cls, closure):
    found = []
    for accelerated in (False, True):
        model = network()
        opt, events = momentum(model, cls), []
        if accelerated:
            opt = AndersonOptimizer(opt, anderson=NEVER)

        def clip(opt, args, kwargs, model=model, events=events):
            grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
            events.append(("pre", len(args), *kwargs, flat(model).tolist(), grads))
            if grads[0] is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            return args, kwargs

        def shrink(opt, args, kwargs, model=model, events=events):
            events.append(("post", len(args), *kwargs, flat(model).tolist()))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)  # unlike clamping, another thing when done twice

        hooks = opt.register_step_pre_hook(clip), opt.register_step_post_hook(shrink)
        if closure:
            with_closure(opt, model, data(4))
        else:
            train(model, opt, data(4))
        count = len(events)
        for hook in hooks:
            hook.remove()
        train(model, opt, data(1))
        assert len(events) == count == (2 if cls is torch.optim.SGD else 4) * 4
        found.append((events, flat(model), opt.state_dict()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert_same_state(found[1][2], found[0][2])


def test_name_in_a_profile():
    model = network()
    opt = AndersonOptimizer(momentum(model), anderson=OFTEN)
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        train(model, opt, data(3))
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#SGD.step") == 3


def test_residuals_are_of_the_gradients_that_hooks_leave():
    found = []
    for hooked in (False, True):
        model = network()
        opt = AndersonOptimizer(momentum(model), anderson=OFTEN)

        def clip(*_, model=model):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        if hooked:
            opt.register_step_pre_hook(clip)
        for x, y in data(9):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            if not hooked:
                clip()
            opt.step()
        assert opt.anderson.stats.accelerated == 3
        found.append(flat(model))
    assert torch.equal(*found)


def accelerated(steps=9):
    model = network()
    opt = AndersonOptimizer(momentum(model), anderson=OFTEN)
    train(model, opt, data(steps))
    return model, opt


def noting(events, name, result=None):
    def hook(opt, *rest):
        events.append(name)
        return result(*rest) if result is not None else None

    return hook


@pytest.mark.parametrize("before", [False, True])
def test_state_hooks_fire_once_and_in_order(before):
    model, events = network(), []
    opt = momentum(model)
    given = opt
    if not before:
        opt = AndersonOptimizer(opt, anderson=NEVER)
    for register, name in (
        (opt.register_state_dict_pre_hook, "before saving"),
        (opt.register_state_dict_post_hook, "saved"),
        (opt.register_load_state_dict_pre_hook, "before loading"),
        (opt.register_load_state_dict_post_hook, "loaded"),
    ):
        register(noting(events, f"{name} 2"))
        register(noting(events, f"{name} 1"), prepend=True)
        register(noting(events, f"{name} 3"))
        register(noting(events, "removed")).remove()
    if before:
        opt = AndersonOptimizer(opt, anderson=NEVER)
    train(model, opt, data(2))
    state = opt.state_dict()
    assert events == [f"{name} {i}" for name in ("before saving", "saved") for i in (1, 2, 3)]
    events.clear()
    opt.load_state_dict(state)
    assert events == [f"{name} {i}" for name in ("before loading", "loaded") for i in (1, 2, 3)]
    events.clear()
    opt.load_state_dict(opt.sharded_state_dict())
    assert not events
    given.state_dict()  # they are the given optimizer's still
    assert len(events) == 6


def test_copies_have_no_hooks_as_in_torch():
    model, opt = accelerated(2)
    opt.register_step_pre_hook(lambda *_: 1 / 0)
    opt.register_state_dict_pre_hook(lambda *_: 1 / 0)
    for copied in (copy.deepcopy(opt), copy.deepcopy(momentum(model))):
        assert not copied._optimizer_step_pre_hooks
        assert not copied._optimizer_state_dict_pre_hooks


@pytest.mark.parametrize("kind", ["around", "another", "more"])
def test_hooks_that_make_another_state_keep_the_history(kind):
    model, opt = accelerated(7)
    saving = {
        "around": lambda opt, state: {"optimizer": state},
        "another": lambda opt, state: {k: state[k] for k in ("state", "param_groups")},
        "more": lambda opt, state: state.update(ema=[1.0]),
    }
    loading = {
        "around": lambda opt, state: state["optimizer"],
        "more": lambda opt, state: state.pop("ema") and None,
    }
    opt.register_state_dict_post_hook(saving[kind])
    state = copy.deepcopy(opt.consolidate_state_dict())
    assert (
        set(state)
        == {
            "around": {"optimizer"},
            "another": {"state", "param_groups", "anderson"},
            "more": {"state", "param_groups", "anderson", "ema"},
        }[kind]
    )
    keys, other = set(state), network()
    other.load_state_dict(model.state_dict())
    resumed = AndersonOptimizer(momentum(other), anderson=OFTEN)
    if kind in loading:
        resumed.register_load_state_dict_pre_hook(loading[kind])
    resumed.load_state_dict(state)
    assert set(state) == keys, "a hook has changed the state that it was given a copy of"
    for each, steps in ((opt, model), (resumed, other)):
        train(steps, each, data(9)[7:])
    assert torch.equal(flat(model), flat(other))
    assert resumed.anderson.stats.accelerated == 3


def test_load_hooks_adapt_a_foreign_state():
    """Other names, other keys, a missing setting, an entry that only a post-hook can make."""
    model = network()
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    train(model, plain, data(3))
    state = copy.deepcopy(plain.state_dict())
    foreign = {
        "anderson": "another program's",
        "slots": {f"p{k}": v for k, v in state["state"].items()},
        "param_groups": state["param_groups"],
    }
    del foreign["param_groups"][0]["betas"], foreign["slots"]["p0"]["exp_avg_sq"]

    def adapt(opt, found):
        groups = [group | {"betas": (0.9, 0.999)} for group in found["param_groups"]]
        return {
            "state": {int(k[1:]): v for k, v in found["slots"].items()},
            "param_groups": groups,
        }

    def complete(opt):
        for p, entry in opt.state.items():
            if "exp_avg_sq" not in entry:
                entry["exp_avg_sq"] = plain.state[p]["exp_avg_sq"].clone()

    opt = AndersonOptimizer(torch.optim.Adam(model.parameters()), anderson=NEVER)
    with pytest.raises(CheckpointError):
        opt.load_state_dict(foreign)
    opt.register_load_state_dict_pre_hook(adapt)
    opt.register_load_state_dict_post_hook(complete)
    opt.load_state_dict(foreign)
    assert_same_state(opt.state_dict(), state)
    assert opt.anderson_engine.given.state is opt.state


@pytest.mark.parametrize("when", ["pre", "post"])
def test_what_a_load_hook_raises_comes_through_and_changes_nothing(when):
    model, opt = accelerated(5)
    before, weights = copy.deepcopy(opt.consolidate_state_dict()), flat(model)
    _, other = accelerated(8)
    register = getattr(opt, f"register_load_state_dict_{when}_hook")

    def raises(opt, *_):
        opt.param_groups[0]["lr"] = 9.0
        raise KeyError("not there")

    handle = register(raises)
    with pytest.raises(KeyError, match="not there"):
        opt.load_state_dict(other.consolidate_state_dict())
    handle.remove()
    after = opt.consolidate_state_dict()
    assert_same_state(after, before)
    assert after["anderson"]["counters"] == before["anderson"]["counters"]
    history = after["anderson"]["history"]
    assert history["calls"] == 5
    for name in ("y", "r"):
        assert torch.equal(history["columns"][name], before["anderson"]["history"]["columns"][name])
    assert torch.equal(flat(model), weights)


def test_a_load_hook_that_returns_no_state_is_refused():
    _, opt = accelerated(2)
    state = opt.state_dict()
    handle = opt.register_load_state_dict_pre_hook(lambda *_: [1])
    with pytest.raises(CheckpointError):
        opt.load_state_dict(state)
    handle.remove()
    opt.load_state_dict(state)


def test_isinstance_and_issubclass():
    model = network()
    plain = momentum(model)
    opt = AndersonOptimizer(plain, anderson=AndersonConfig(**TEXTBOOK))
    assert isinstance(opt, AndersonOptimizer)
    assert isinstance(copy.deepcopy(opt), AndersonOptimizer)
    assert issubclass(type(opt), AndersonOptimizer)
    assert isinstance(opt, torch.optim.SGD)
    for other in (plain, None, model):
        assert not isinstance(other, AndersonOptimizer)
        assert not isinstance(other, DistributedAndersonOptimizer)
    assert not isinstance(opt, DistributedAndersonOptimizer)
    assert not issubclass(torch.optim.SGD, AndersonOptimizer)
    for constructor in (AndersonOptimizer, DistributedAndersonOptimizer):
        parameters = inspect.signature(constructor).parameters
        assert next(iter(parameters)) == "optimizer"
        assert parameters["anderson"].kind is inspect.Parameter.KEYWORD_ONLY
        assert inspect.getdoc(constructor)
        assert pickle.loads(pickle.dumps(constructor)) is constructor
        with pytest.raises(TypeError, match="'optimizer'"):
            constructor()
