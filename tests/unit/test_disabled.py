"""AndersonConfig(enabled=False): the base optimizer, bit for bit, and nothing beside it."""

import copy
import pickle
import warnings

import pytest
import torch
from checkpointing import GONE, changed
from problems import TEXTBOOK
from test_optimizer import OPTIMIZERS, assert_same_state, data, flat, network, train

from aadl_hvd import AndersonConfig, AndersonOptimizer, CheckpointError, checkpoint
from aadl_hvd.core import memory

OFF = AndersonConfig(enabled=False)
ON = AndersonConfig(**TEXTBOOK, frequency=3, history_depth=4, safeguard="none", relaxation=0.3)
STEPS = 9
SETTINGS = {
    "defaults": {},
    "everything": {
        **{"residual": "step", "safeguard": "residual", "average_window": 3, "frequency": 1},
        **{"averages": (0.9, 0.6), "history_dtype": "bfloat16"},
    },
    "columns": {"layout": "columns"},
}


def trained(config, steps=STEPS, name="Nesterov"):
    model = network()
    opt = OPTIMIZERS[name](model.parameters())
    if config is not None:
        opt = AndersonOptimizer(opt, anderson=config)
    train(model, opt, data(steps))
    return model, opt


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bit_for_bit(name, settings):
    expected, plain = trained(None, name=name)
    model, opt = trained(AndersonConfig(enabled=False, **SETTINGS[settings]), name=name)
    assert torch.equal(flat(model), flat(expected))
    assert_same_state(opt.state_dict(), plain.state_dict())


def test_nothing_beside_it():
    """No memory, no samples, no hooks; only steps are counted, and the counters say why."""
    model = network()
    config = AndersonConfig(enabled=False, averages=(0.9, 0.6), average_window=3, noise_gate=1.0)
    opt = AndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), backward_passes_per_step=2, anderson=config
    )
    for p in model.parameters():
        assert not p._post_accumulate_grad_hooks
    for x, y in data(STEPS):
        opt.zero_grad()
        for _ in range(2):
            (model(x) - y).square().mean().backward()
        opt.observe(torch.tensor(1.0))
        opt.step()
    accelerator = opt.anderson
    assert accelerator.history_bytes == 0
    assert not accelerator.forecast(opt.anderson_engine.problem)
    assert accelerator.columns == 0 and accelerator.average_gains == {}
    assert opt.anderson_engine.problem.samples is None and not accelerator.measures_noise
    stats = accelerator.stats
    assert stats.steps == STEPS
    assert stats.stored == stats.accelerated == stats.averaged == 0
    assert not any(stats.rejected.values()) and not any(stats.seconds.values())
    assert "enabled=False" in str(stats) and "enabled=False" in repr(opt)
    assert accelerator.config.to_dict()["enabled"] is False


def test_there_is_always_room_for_it(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    AndersonOptimizer(torch.optim.SGD(network().parameters(), lr=0.1), anderson=OFF)


def test_no_closure_is_asked_for():
    expected, _ = trained(None)
    model, opt = trained(AndersonConfig(enabled=False, safeguard="loss"))
    assert torch.equal(flat(model), flat(expected))
    calls = []

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        calls.append(1)
        return loss

    assert opt.step(closure) > 0.0
    assert len(calls) == 1


@pytest.mark.parametrize("which", ["auto", None, 0.99])
def test_averaged_weights_are_the_weights(which):
    model, opt = trained(OFF)
    opt.sharded_state_dict()
    before = flat(model).clone()
    for loss in (None, lambda: flat(model).square().sum()):
        with opt.averaged_weights(loss, which=which) as chosen:
            assert chosen is None
            assert torch.equal(flat(model), before)
    assert torch.equal(flat(model), before)


def saved_by(opt, kind):
    if kind == "state_dict":
        return copy.deepcopy(opt.state_dict())
    if kind == "consolidated":
        return copy.deepcopy(opt.consolidate_state_dict())
    part = opt.sharded_state_dict()
    whole = checkpoint.merge_shards([part]) if kind == "merged" else part
    return copy.deepcopy(opt.state_dict()) | whole


KINDS = ["state_dict", "consolidated", "sharded", "merged"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_has_saved_loads_into_an_enabled_one(kind, tmp_path):
    """And that one trains on as a new one that loads the base optimizer's state."""
    model, opt = trained(OFF)
    checkpoint.save(tmp_path / "file", saved_by(opt, kind))
    ends = []
    for anderson in (True, False):
        again = copy.deepcopy(model)
        new = AndersonOptimizer(
            torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9, nesterov=True), anderson=ON
        )
        state = checkpoint.load(tmp_path / "file")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new.load_state_dict(
                state if anderson else {key: state[key] for key in ("state", "param_groups")}
            )
        assert new.anderson.stats.steps == (STEPS if anderson else 0)
        train(again, new, data(STEPS))
        assert new.anderson.stats.accelerated > 0
        ends.append(flat(again))
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["enabled", "disabled"])
def test_it_loads_what_was_saved(before, kind, recwarn):
    """A history is left out with a warning; weights and base optimizer go on as in plain torch."""
    model, opt = trained(ON if before == "enabled" else OFF)
    state = saved_by(opt, kind)
    plain_model, again = copy.deepcopy(model), copy.deepcopy(model)
    plain = OPTIMIZERS["Nesterov"](plain_model.parameters())
    plain.load_state_dict({key: copy.deepcopy(state[key]) for key in ("state", "param_groups")})
    new = AndersonOptimizer(OPTIMIZERS["Nesterov"](again.parameters()), anderson=OFF)
    recwarn.clear()
    new.load_state_dict(state)
    said = [str(warning.message) for warning in recwarn.list]
    lost = before == "enabled" and kind != "state_dict"
    expected = ["load_state_dict leaves out the history: enabled=False keeps none."]
    assert said == (expected if lost else [])
    assert new.anderson.stats.steps == STEPS and new.anderson.history_bytes == 0
    train(plain_model, plain, data(STEPS))
    train(again, new, data(STEPS))
    assert torch.equal(flat(again), flat(plain_model))


@pytest.mark.parametrize(
    "path",
    [(), ("columns",), ("columns", "stored"), ("columns", "y"), ("gram", "matrix"), ("calls",)],
)
@pytest.mark.parametrize("value", [GONE, "x", -1])
def test_a_damaged_history_is_no_hindrance(path, value):
    """It is left out as a sound one is; an enabled optimizer refuses it."""
    model, opt = trained(ON)
    sound = saved_by(opt, "consolidated")
    if value is GONE and not path:
        return  # no history at all is no damage
    state = changed(sound, ("anderson", "history", *path), value)
    with pytest.raises(CheckpointError):
        trained(ON)[1].load_state_dict(copy.deepcopy(state))
    again = copy.deepcopy(model)
    new = AndersonOptimizer(OPTIMIZERS["Nesterov"](again.parameters()), anderson=OFF)
    with pytest.warns(UserWarning, match="enabled=False keeps none"):
        new.load_state_dict(state)
    assert new.anderson.stats.steps == STEPS
    assert_same_state(new.state_dict(), opt.state_dict())


def test_a_copy_is_disabled_too():
    model, opt = trained(OFF)
    for copied in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        train(*copied, data(STEPS))
        assert copied[1].anderson.stats.steps == 2 * STEPS
        assert copied[1].anderson.stats.stored == 0
