"""With acceleration off, hooks see what Horovod's see, as often, and do what they do there.

Hooks of a rank by itself, and of checkpoints, are in tests/unit/test_hooks.py.
"""

import contextlib
import copy
import time
import warnings

import horovod.torch as hvd
import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from training import (
    assert_replicas_equal,
    assert_same_bits,
    batches,
    compare_with_horovod,
    flat,
    full_batch,
    loss_of,
    network,
    round_gradients,
    train,
    unless_brief,
)

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

STEPS = 4
OFTEN = AndersonConfig(frequency=2, history_depth=4, noise_gate=None, safeguard="none")


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


class Seen:
    """Notes what hooks see; the functions are hooks."""

    def __init__(self, model):
        self.model, self.events = model, []

    def note(self, name, args=(), kwargs=()):
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        weights = flat(self.model).clone()
        self.events.append((name, len(args), sorted(kwargs), gradients, weights))

    def clip(self, opt, args, kwargs):
        self.note("clip", args, kwargs)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)

    def clamp(self, opt, args, kwargs):
        self.note("clamp", args, kwargs)
        with torch.no_grad():
            for p in self.model.parameters():
                p.clamp_(-0.3, 0.3)

    def same_arguments(self, opt, args, kwargs):
        self.note("arguments", args, kwargs)
        return (opt, None), {}


def until_reduced(opt):
    """Horovod's own lets hooks change gradients while they are reduced: it does not repeat that."""
    for p, (handle, _) in opt._handles.items():
        if handle is None:  # too few passes: Horovod begins these in the step
            opt._handles[p] = opt._allreduce_grad_async(p)
    for handle, _ in opt._handles.values():
        while not hvd.poll(handle):
            time.sleep(1e-4)


@contextlib.contextmanager
def everywhere(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stepping(passes=1, late=False, data=None):
    """A training loop; `late`: reductions are under way when step() is called on rank 0."""

    def loop(model, opt):
        found = batches(STEPS * passes) if data is None else data
        for first in range(0, len(found), passes):
            opt.zero_grad()
            for x, y in found[first : first + passes]:
                if late and hvd.rank() > 0:
                    time.sleep(0.02)
                loss_of(model, x, y).backward()
            if not hasattr(opt, "anderson"):
                until_reduced(opt)
            opt.step()

    return loop


def with_hooks(loop, *hooks):
    """Runs a loop with the hooks of these names: "pre clip", "everywhere post clamp", ..."""

    def run(model, opt):
        seen = Seen(model)
        register = {
            "pre": opt.register_step_pre_hook,
            "post": opt.register_step_post_hook,
            "everywhere pre": register_optimizer_step_pre_hook,
            "everywhere post": register_optimizer_step_post_hook,
        }
        handles = []
        for name in hooks:
            when, _, what = name.rpartition(" ")
            handles.append(register[when](getattr(seen, what)))
        with everywhere(*handles):
            loop(model, opt)
        count = len(seen.events)
        assert count
        loop(model, opt)
        assert len(seen.events) == count, "a hook that was removed has fired"
        return seen.events

    return run


HOOKS = {
    "pre": ("pre clip",),
    "everywhere": ("everywhere pre clip", "everywhere post clamp"),
    "both": ("post clamp", "pre clip", "pre same_arguments"),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_step_hooks(hooks, fp16, late):
    compression = hvd.Compression.fp16 if fp16 else hvd.Compression.none
    compare_with_horovod(
        network,
        momentum,
        with_hooks(stepping(late=late), *HOOKS[hooks]),
        arguments=lambda model: {"compression": compression},
    )


@pytest.mark.parametrize("kind", unless_brief("passes", "fewer passes", "groups", "Sum", "Adam"))
def test_step_hooks_with_other_arguments(kind):
    passes = 2 if "passes" in kind else 1
    loop = stepping(passes, data=batches(5) if kind == "fewer passes" else None)
    more = {"groups": {"groups": 2}, "Sum": {"op": hvd.Sum}}
    compare_with_horovod(
        network,
        (lambda model: torch.optim.Adam(model.parameters())) if kind == "Adam" else momentum,
        with_hooks(loop, "pre clip", "post clamp"),
        arguments=lambda model: {"backward_passes_per_step": passes} | more.get(kind, {}),
    )


def test_step_hooks_with_adasum():
    if hvd.size() != 2 or not hvd.mpi_enabled():
        pytest.skip("Adasum: MPI, 2^k ranks")

    def run(model, opt):
        seen = Seen(model)
        opt.register_step_pre_hook(seen.clip)
        opt.register_step_post_hook(seen.clamp)
        train(model, opt, batches(STEPS))
        return [int(name == "clip") for name, *_ in seen.events]

    compare_with_horovod(
        network,
        momentum,
        run,
        config=AndersonConfig(frequency=10**9, residual="step"),
        arguments=lambda model: {"op": hvd.Adasum},
        exact=False,
    )


def test_hook_that_reduces_by_itself():
    """And then all is reduced once more, by step(): of equal numbers, on 2^k ranks."""
    if hvd.size() & (hvd.size() - 1):
        pytest.skip("needs 2^k ranks, on which the mean of equal numbers is exact")

    def run(model, opt):
        def reduce(opt, args, kwargs):
            if not opt._synchronized:
                opt.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        opt.register_step_pre_hook(reduce)
        with pytest.warns(UserWarning, match="skip_synchronize"):
            stepping()(model, opt)

    compare_with_horovod(network, momentum, run)


def test_hooks_of_autograd():
    """On tensors, after their gradients are there, and on layers; in Horovod's order."""

    def run(model, opt):
        seen = Seen(model)
        for p in model.parameters():
            p.register_hook(lambda gradient: seen.events.append("tensor") or 0.5 * gradient)
            p.register_post_accumulate_grad_hook(lambda p: seen.events.append("there"))
        model[2].register_full_backward_hook(lambda *_: seen.events.append("layer"))
        opt.register_step_pre_hook(seen.clip)
        stepping()(model, opt)
        return seen.events

    compare_with_horovod(network, momentum, run)


@pytest.mark.skipif(hvd.size() == 1, reason="torch lists no event around one of the same name")
def test_names_in_a_profile():
    def run(model, opt):
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            stepping()(model, opt)
        return sorted(e.name for e in profile.function_events if e.name.startswith("Optimizer"))

    compare_with_horovod(network, momentum, run)


def test_hooks_from_before_the_wrapping_are_kept():
    found = []
    for before in (False, True):
        model = network()
        round_gradients(model)
        seen, opt = Seen(model), momentum(model)
        if before:
            opt.register_step_pre_hook(seen.clip)
        opt = DistributedAndersonOptimizer(opt, anderson=OFTEN)
        if not before:
            opt.register_step_pre_hook(seen.clip)
        stepping()(model, opt)
        found.append((seen.events, flat(model)))
    assert len(found[0][0]) == 2 * STEPS
    assert_same_bits(found[1], found[0])


def test_closure_from_a_hook():
    """Wherever it comes from, its gradients are reduced before they are used."""
    found = []
    for hooked in (False, True):
        model = network()
        opt = DistributedAndersonOptimizer(momentum(model), anderson=OFTEN)
        current = []

        def closure(model=model, opt=opt, current=current):
            opt.zero_grad()
            loss = loss_of(model, *current[-1])
            loss.backward()
            return loss

        handle = opt.register_step_pre_hook(lambda opt, args, kwargs, c=closure: ((opt, c), {}))
        if not hooked:
            handle.remove()
        for batch in full_batch(6):
            current.append(batch)
            opt.step() if hooked else opt.step(closure)
        handle.remove()
        assert opt.anderson.stats.accelerated == 3
        assert_replicas_equal(model)
        found.append(flat(model))
        with warnings.catch_warnings():  # of Horovod's: that synchronize() was called before
            warnings.simplefilter("error")
            train(model, opt, batches(1))
    assert torch.equal(*found)


@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_residuals_are_of_the_gradients_that_hooks_leave(residual):
    """And so is the noise measured in them; clamping twice is clamping once."""
    config = AndersonConfig(frequency=2, history_depth=4, safeguard="none", residual=residual)
    found = []
    for hooked in (False, True):
        model = network(torch.float64)
        opt = DistributedAndersonOptimizer(momentum(model), anderson=config)

        def clamp(*_, model=model):
            for p in model.parameters():
                p.grad.clamp_(-0.02, 0.02)

        if hooked:
            opt.register_step_pre_hook(clamp)
        for batch in full_batch(10, torch.float64):
            opt.zero_grad()
            loss_of(model, *batch).backward()
            if hooked:
                opt.step()
            else:
                opt.synchronize()
                clamp()
                with opt.skip_synchronize():
                    opt.step()
        assert opt.anderson.stats.accelerated + sum(opt.anderson.stats.rejected.values())
        assert_replicas_equal(model)
        found.append((flat(model), opt.anderson.stats.counters(), opt.anderson.stats.measured()))
    assert_same_bits(found[1], found[0])


def test_mask_in_a_post_hook_holds_for_accelerated_weights():
    model = network()
    opt = DistributedAndersonOptimizer(momentum(model), anderson=OFTEN)
    mask = (torch.arange(12) % 3 > 0).reshape(4, 3)

    def prune(*_):
        with torch.no_grad():
            model[0].weight.mul_(mask)

    opt.register_step_post_hook(prune)
    for batch in full_batch(8):
        train(model, opt, [batch])
        assert not model[0].weight[~mask].any()
    assert opt.anderson.stats.accelerated == 4
    assert_replicas_equal(model)


def test_consolidate_with_a_hook_that_raises_on_one_rank():
    """Hooks fire when nobody waits any more; all go on, and the history is still to be had."""
    model = network()
    opt = DistributedAndersonOptimizer(momentum(model), anderson=OFTEN)
    train(model, opt, full_batch(4))
    raising = opt.register_state_dict_post_hook(lambda *_: 1 / 0)
    if hvd.rank() == 0:
        with pytest.raises(ZeroDivisionError):
            opt.consolidate_state_dict()
    else:
        assert opt.consolidate_state_dict() is None
    raising.remove()
    part = opt.sharded_state_dict()
    if hvd.rank() == 0:
        assert opt.state_dict()["anderson"]["history"]["columns"]["stored"] == 4

    around = opt.register_state_dict_post_hook(lambda opt, state: {"all of it": state})
    state = hvd.broadcast_object(opt.consolidate_state_dict() or {})
    assert state.keys() == {"all of it"}
    around.remove()
    found = []
    weights = flat(model).clone()
    for parts in (False, True):
        torch.nn.utils.vector_to_parameters(weights.clone(), model.parameters())
        opt = DistributedAndersonOptimizer(momentum(model), anderson=OFTEN)
        opt.register_load_state_dict_pre_hook(lambda opt, state: state["all of it"])
        opt.load_state_dict(copy.deepcopy(state))
        if parts:  # fires no hook, or it would raise
            opt.load_state_dict(part)
        opt.anderson.agree(opt.anderson_engine.problem)
        assert opt.anderson.columns > 0
        assert opt.anderson.stats.steps == 4
        with torch.no_grad():
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        with opt.skip_synchronize():
            opt.step()
        found.append(flat(model).clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_hook_may_be_collective_where_ranks_make_unequal_passes(passes):
    """A rank that has begun no reduction begins all before the hook: the others wait for them."""
    model = network()
    opt = DistributedAndersonOptimizer(
        momentum(model),
        model.named_parameters(),
        backward_passes_per_step=passes,
        anderson=AndersonConfig(enabled=False),
    )
    norms = []

    def norm(*_):
        square = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        norms.append(hvd.allgather(torch.as_tensor(square).reshape(1), name="norm"))

    opt.register_step_pre_hook(norm)
    for step, (x, y) in enumerate(batches(3)):
        opt.zero_grad()
        for done in range(passes):
            if step == 1 and hvd.rank() == hvd.size() - 1 and done == passes - 1:
                break
            loss_of(model, x, y).backward()
        opt.step()
    assert len(norms) == 2 * 3
    assert all(torch.equal(found, found[:1].expand_as(found)) for found in norms)
    assert_replicas_equal(model)
