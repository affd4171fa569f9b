"""What users of Horovod's optimizer do, with acceleration firing: loops, arguments, rollback.

Equal, to rounding, to `AndersonOptimizer` in one process with gradients reduced by hand; and the
replicas are equal bit for bit.
"""

import dataclasses

import horovod.torch as hvd
import pytest
import torch
from accelerated import (
    ALWAYS,
    DOUBLE,
    SETTINGS,
    STEPS,
    built,
    double_network,
    first_layer_frozen,
    plain,
    wrapped,
)
from training import (
    HandMade,
    assert_replicas_equal,
    assert_same_bits,
    batches,
    compare_with_hand_made,
    flat,
    full_batch,
    loss_of,
    network,
    round_gradients,
    train,
    unless_brief,
)


def clipping(model, opt):
    for x, y in batches(STEPS, DOUBLE):
        opt.zero_grad()
        loss_of(model, x, y).backward()
        opt.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with opt.skip_synchronize():
            opt.step()


def closures(model, opt):
    for x, y in batches(STEPS, DOUBLE):

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        assert opt.step(closure).requires_grad  # what Horovod returns: the loss of this rank


def scaler(model, opt):
    """Gradients overflow on one rank in one step, on all ranks in another; both are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner = getattr(opt, "inner", opt)
    for step, (x, y) in enumerate(batches(STEPS + 2, DOUBLE)):
        opt.zero_grad()
        bad = (step == 2 and hvd.rank() == hvd.size() - 1) or step == 5
        scaler.scale(loss_of(model, x, y) * (float("inf") if bad else 1.0)).backward()
        opt.synchronize()
        scaler.unscale_(inner)
        with opt.skip_synchronize():
            scaler.step(inner if inner is not opt else opt)
        scaler.update()
    assert scaler.get_scale() == 1024.0 / 4


def scaler_without_unscale(model, opt):
    """GradScaler.step unscales by itself; a fused optimizer must not do it in its kernel."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner = getattr(opt, "inner", opt)
    for x, y in batches(STEPS, DOUBLE):
        opt.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        opt.synchronize()
        with opt.skip_synchronize():
            scaler.step(inner)
        scaler.update()


def schedules(model, opt):
    """A schedule, and groups' learning rates in another ratio from then on."""
    inner = getattr(opt, "inner", opt)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 2, 0.5)
    for step, batch in enumerate(batches(STEPS, DOUBLE)):
        train(model, opt, [batch])
        scheduler.step()
        if step == 2:
            inner.param_groups[0]["lr"] *= 1.5


def autocast(model, opt):
    for x, y in batches(STEPS, DOUBLE):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            opt.zero_grad()
            loss_of(model, x, y).backward()
            opt.step()


def unused(model, opt):
    """The last layer is used on rank 0 only; a parameter of no rank at all has no gradient."""
    model.register_parameter("unused", model.unused if hasattr(model, "unused") else None)
    for x, y in batches(STEPS, DOUBLE):
        opt.zero_grad()
        out = model(x) if hvd.rank() == 0 else model[:2](x)[:, :2]
        (out - y).square().mean().backward()
        opt.step()


def added_group(model, opt):
    """A new head after four steps."""
    inner = getattr(opt, "inner", opt)
    plain(model, opt, 4)
    torch.manual_seed(0)
    head = torch.nn.Linear(2, 2).to(DOUBLE)
    model.add_module("head", head)
    inner.add_param_group({"params": list(head.parameters()), "lr": 0.05})
    plain(model, opt)


def unfrozen(model, opt):
    """Frozen from before the wrapping on: see `first_layer_frozen`."""
    plain(model, opt, 4)
    model[0].weight.requires_grad_(True)
    plain(model, opt)


def frozen(model, opt):
    plain(model, opt, 4)
    for p in model[0].parameters():
        p.requires_grad_(False)
        p.grad = None
    plain(model, opt)


def zeroed_in_place(model, opt):
    for batch in batches(STEPS, DOUBLE):
        opt.zero_grad(set_to_none=False)
        loss_of(model, *batch).backward()
        opt.step()


LOOPS = {
    "plain": plain,
    "clipping": clipping,
    "closures": closures,
    "GradScaler": scaler,
    "GradScaler alone": scaler_without_unscale,
    "schedules": schedules,
    "autocast": autocast,
    "added group": added_group,
    "unfrozen": unfrozen,
    "zeroed in place": zeroed_in_place,
    "unused on some ranks": unused,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", unless_brief("Nesterov", "SGD", "AdamW fused"))
def test_loops(loop, name):
    opt, model = compare_with_hand_made(
        first_layer_frozen if loop == "unfrozen" else double_network,
        lambda model: built(name, model.parameters()),
        LOOPS[loop],
        dataclasses.replace(ALWAYS, layout="columns" if name == "SGD" else "rows"),
        accelerated=2,
    )
    assert_replicas_equal(model)
    resets = {cause: count for cause, count in opt.anderson.stats.resets.items() if count}
    changed = {"schedules": {}, "added group": {"changed": 1}, "unfrozen": {"changed": 1}}
    assert resets == changed.get(loop, {})
    if loop == "GradScaler":
        assert opt.anderson.stats.steps == STEPS


ARGUMENTS = {
    "two backward passes": {"backward_passes_per_step": 2},
    "Sum": {"op": hvd.Sum},
    "predivide": {"gradient_predivide_factor": 3.0},
    "two groups": {"groups": 2},
    "groups as a list": lambda model: {"groups": [[model[0].weight, model[2].bias]]},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("loop", unless_brief("plain", "closures", "added group", "unfrozen"))
def test_arguments(arguments, loop):
    """Against hand-made gradients that mean the same."""
    factor = hvd.size() if arguments == "Sum" else 1
    passes = 2 if arguments == "two backward passes" else 1

    def run(model, opt):
        if isinstance(opt, HandMade) and factor != 1:
            synchronize = opt.synchronize

            def summed():
                synchronize()
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad *= factor

            opt.synchronize = summed
        if passes == 2:
            for batch in batches(STEPS, DOUBLE):
                opt.zero_grad()
                for _ in range(2):
                    loss_of(model, *batch).backward()
                opt.step()
        else:
            LOOPS[loop](model, opt)

    if passes == 2 and loop != "plain":
        pytest.skip("the other loops make one pass a step")
    given = ARGUMENTS[arguments]
    _, model = compare_with_hand_made(
        first_layer_frozen if loop == "unfrozen" else double_network,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5),
        run,
        ALWAYS,
        arguments=given if callable(given) else lambda model: given,
        accelerated=2,
    )
    assert_replicas_equal(model)


def test_frozen_on_the_way():
    """Horovod goes on reducing a frozen parameter, as zeros; it must stay out of the history."""
    model = double_network()
    opt = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    frozen(model, opt)
    assert opt.anderson.stats.resets["changed"] == 1
    assert opt.anderson.stats.accelerated >= 2
    assert_replicas_equal(model)


@pytest.mark.parametrize("layout", unless_brief("rows", "columns"))
@pytest.mark.parametrize("safeguard", ["none", "descent", "residual", "loss"])
@pytest.mark.parametrize("residual", unless_brief("gradient", "step"))
def test_every_residual_safeguard_and_layout(residual, safeguard, layout):
    settings = {"residual": residual, "safeguard": safeguard, "layout": layout}
    model = double_network()
    opt = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.3), **settings)
    losses = []
    for x, y in full_batch(3 * STEPS, DOUBLE):

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        losses.append(float(hvd.allreduce(closure_loss(opt, closure, safeguard), name="loss")))
    stats = opt.anderson.stats
    attempts = stats.accelerated + sum(stats.rejected.values())
    # The verdict of "residual" comes a step later; its step is counted as accelerated, too.
    attempts -= stats.rejected["residual"]
    assert stats.steps == 3 * STEPS
    assert attempts == 3 * STEPS // SETTINGS["frequency"]
    assert stats.accelerated > 0
    if safeguard != "none":
        assert losses[-1] < 0.9 * losses[0]
    assert_replicas_equal(model)
    momenta = [opt.state[p]["momentum_buffer"] for p in model.parameters()]
    everybody = hvd.allgather_object(momenta)
    for other in everybody:
        assert_same_bits(other, everybody[0], "momentum")


def closure_loss(opt, closure, safeguard):
    if safeguard == "loss":
        return opt.step(closure).detach()
    loss = closure()
    opt.step()
    return loss.detach()


@pytest.mark.parametrize("residual", unless_brief("gradient", "step"))
@pytest.mark.parametrize("name", unless_brief("Adam", "SGD", "momentum", "AdamW fused", "RMSprop"))
def test_rollback_is_exact(name, residual):
    """A step the next residual does not confirm: weights and state are those of the base step."""
    make = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.9),
    }[name]
    expected, model = network(), network()
    round_gradients(expected)
    round_gradients(model)
    data = batches(3)
    base = hvd.DistributedOptimizer(make(expected.parameters()), expected.named_parameters())
    train(expected, base, data)
    layout = "columns" if residual == "step" else "rows"
    settings = {"safeguard": "residual", "residual": residual, "layout": layout}
    opt = wrapped(model, make(model.parameters()), **settings)
    train(model, opt, data)
    assert opt.anderson.stats.accelerated == 1
    assert not torch.equal(flat(model), flat(expected))
    opt.zero_grad()
    trial = opt.anderson._trial
    trial.norm = 0.0  # no residual is smaller
    loss_of(model, *data[0]).backward()
    opt.step()
    assert opt.anderson.stats.rejected["residual"] == 1
    assert_same_bits(list(model.parameters()), list(expected.parameters()), "weights")
    assert_same_bits(opt.state_dict()["state"], base.state_dict()["state"], "state")
    assert_replicas_equal(model)
    train(model, opt, batches(2))  # and goes on
    assert opt.anderson.stats.steps == 6
    assert_replicas_equal(model)


@pytest.mark.parametrize("residual", ["gradient", "step"])
def test_loss_safeguard_decides_the_same_everywhere(residual):
    """The loss that counts is the mean over ranks; here rank 0 alone would like every point."""
    model = double_network()
    opt = wrapped(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
        safeguard="loss",
        residual=residual,
    )
    calls = []

    def closure(x, y):
        opt.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        calls.append(loss.item())
        # At the accelerated point, the third evaluation of a step: low on rank 0, high elsewhere.
        return loss + (len(calls) == 3) * (-1.0 if hvd.rank() == 0 else 100.0)

    for step, (x, y) in enumerate(full_batch(6, DOUBLE)):
        calls.clear()
        opt.step(lambda x=x, y=y: closure(x, y))
        assert len(calls) == (3 if step in (2, 5) else 1)
    assert opt.anderson.stats.rejected["loss"] == 2
    assert opt.anderson.stats.accelerated == 0
    assert_replicas_equal(model)
