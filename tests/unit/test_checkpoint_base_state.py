"""The base optimizer's own state: every optimizer of torch, scheduled rates."""

import copy
import inspect
import math

import pytest
import torch
from checkpointing import DATA, GONE, GROUP, START, TARGETS, P, Run, assert_same, changed

from aadl_hvd import AndersonConfig, AndersonOptimizer, CheckpointError

# The base optimizer's own


def train_plainly(model, opt, steps):
    def closure():
        opt.zero_grad()
        loss = (model(DATA[0, 0]) - TARGETS[0, 0]).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)


def of_torch(cls, accelerated):
    """An optimizer of torch.optim, with all that it may keep, and the model it is for."""
    model = copy.deepcopy(START)
    parameters = list(model.parameters())
    if cls.__name__ == "Muon":
        parameters = [p for p in parameters if p.dim() == 2]
    extra = {"amsgrad": True, "momentum": 0.9, "centered": True}
    names = inspect.signature(cls).parameters
    opt = cls(parameters, lr=1e-3, **{k: v for k, v in extra.items() if k in names})
    settings = {"frequency": P, "noise_gate": None, "residual": "step", "mixing": 1.0}
    return model, AndersonOptimizer(
        opt, anderson=AndersonConfig(**settings)
    ) if accelerated else opt


TORCHS = [
    cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and name not in ("Optimizer", "SparseAdam")
]


@pytest.mark.parametrize("cls", TORCHS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_states_of_torchs_optimizers(cls, plain):
    """Their own states load; what they could not train on with does not."""
    model, opt = of_torch(cls, not plain)
    train_plainly(model, opt, 4)
    state = copy.deepcopy(opt.state_dict())
    new = of_torch(cls, True)[1]
    new.load_state_dict(copy.deepcopy(state))
    for name in ("state", "param_groups"):
        assert_same(new.state_dict()[name], state[name])
    foreign = copy.deepcopy(state)  # of another version
    for group in foreign["param_groups"]:
        group["unheard of"] = 3
        for name in ("foreach", "differentiable", "maximize", "capturable", "fused"):
            group.pop(name, None)
    for entry in foreign["state"].values():
        if isinstance(entry.get("step"), torch.Tensor):
            entry["step"] = entry["step"].reshape(1)
    model, fresh = of_torch(cls, True)
    fresh.load_state_dict(foreign)
    train_plainly(model, fresh, 4)

    model, opt = of_torch(cls, True)
    twin = of_torch(cls, True)
    for name, value in state["state"][0].items():
        bad = [] if cls is torch.optim.LBFGS else [GONE]  # whose state is known to itself alone
        if bad and isinstance(value, torch.Tensor):
            bad += ["x", torch.zeros(3, 7), value * math.nan, value.bool(), value.to("meta")]
        for damage in bad:
            try:
                opt.load_state_dict(changed(state, ("state", 0, name), damage))
                assert damage is GONE or damage.dtype == torch.bool, name  # cast by torch
            except CheckpointError:
                assert_same(opt.state_dict()["state"], twin[1].state_dict()["state"])
                continue
            train_plainly(model, opt, 4)
            model, opt = of_torch(cls, True)
    train_plainly(model, opt, 4)
    train_plainly(*twin, 4)
    assert_same(model.state_dict(), dict(twin[0].state_dict()))


def test_scheduled_rates_and_rates_in_tensors():
    """What a scheduler adds to a group may be there or not; a rate may be a tensor."""
    run, other = Run(None).train(10), Run(None)
    plain = copy.deepcopy(run.opt.state_dict())
    torch.optim.lr_scheduler.OneCycleLR(run.opt, 0.1, total_steps=100)
    scheduled = copy.deepcopy(run.opt.state_dict())
    run.opt.load_state_dict(plain)
    other.opt.load_state_dict(scheduled)
    assert other.opt.param_groups[0]["initial_lr"] == scheduled["param_groups"][0]["initial_lr"]
    other.opt.load_state_dict(changed(plain, (*GROUP, "lr"), torch.tensor(0.02)))
    other.train(10)
