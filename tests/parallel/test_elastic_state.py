"""The elastic state on ranks that stay; tests/elastic lets them come and go."""

import copy
import datetime
import logging

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from horovod.common.exceptions import HostsUpdatedInterrupt
from training import (
    assert_replicas_equal,
    assert_same_bits,
    flat,
    full_batch,
    network,
    round_gradients,
    train,
)

import aadl_hvd
from aadl_hvd import AndersonConfig, ConfigError, DistributedAndersonOptimizer, UnsupportedError
from aadl_hvd.engines import horovod_elastic

pytestmark = pytest.mark.timeout(60)

SETTINGS = {
    "default": {},
    "columns": {"layout": "columns", "noise_gate": None, "safeguard": "none"},
    "undo": {"safeguard": "residual", "residual": "step", "average_window": 3, "noise_gate": None},
}
ANY_STEP = {"safeguard": "none", "noise_gate": None}  # is accelerated
DATA = full_batch(40)
needs_two_ranks = pytest.mark.skipif(hvd.size() == 1, reason="needs two ranks")


def elastic_job(monkeypatch):
    """What Horovod's launcher says in an elastic job: this rank may be a new one."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")


def make(settings=None, adam=False):
    model = network()
    if hvd.size() > 2:  # where Horovod alone differs from itself in the last bit
        round_gradients(model)
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    opt = DistributedAndersonOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(frequency=3, **(settings or {})),
    )
    return model, opt


def make_state(settings=None, adam=False, **more):
    model, opt = make(settings, adam)
    return aadl_hvd.elastic.TorchState(model=model, optimizer=opt, batch=0, **more)


def part_of(state):
    return state.optimizer.sharded_state_dict()["anderson"]["history"]


def everything(state, own=True):
    found = state.optimizer.state_dict() | {"part": part_of(state), "batch": state.batch}
    if not own:  # what a rank knows of its own gradients alone is no use among others
        found["part"]["own"] = {}
    return copy.deepcopy(found | {"weights": flat(state.model)})


@pytest.mark.parametrize("settings", SETTINGS)
def test_restore_puts_back_what_this_rank_had(settings):
    """Twice, for what was put back is trained on; and each its own part, not another's."""
    state = make_state(SETTINGS[settings])
    state.sync()
    train(state.model, state.optimizer, DATA[:20])
    state.batch = 20
    state.commit()
    before = everything(state)
    parts = hvd.allgather_object(before["part"])
    if hvd.size() > 1 and settings != "columns":
        shares = {tuple(part["sharding"]["rows"]) for part in parts}
        assert len(shares) == hvd.size(), "ranks hold the same: nothing is tested"
    ends = []
    for in_sync in (False, False, True):
        train(state.model, state.optimizer, DATA[20:35])
        state.batch = 35
        ends.append(everything(state)["weights"])
        state.restore()
        assert_same_bits(everything(state), before, "restored")
        if in_sync:
            state.sync()
            before["part"]["own"] = {}
            assert_same_bits(everything(state, own=False), before, "in sync")
    train(state.model, state.optimizer, DATA[20:35])
    if settings != "default":  # there what this rank knew of its own noise is forgotten
        assert torch.equal(flat(state.model), ends[0])
    assert (
        state.optimizer.anderson.stats.accelerated > before["anderson"]["counters"]["accelerated"]
    )
    assert_replicas_equal(state.model)


def test_hooks_that_lay_something_around_the_state():
    state = make_state(ANY_STEP)
    opt = state.optimizer
    opt.register_state_dict_post_hook(lambda opt, state: {"all of it": state})
    opt.register_load_state_dict_pre_hook(lambda opt, state: state["all of it"])
    state.sync()
    train(state.model, opt, DATA[:20])
    state.commit()
    before, weights = copy.deepcopy(part_of(state)), flat(state.model)
    train(state.model, opt, DATA[20:30])
    state.restore()
    assert_same_bits(part_of(state), before, "restored")
    assert torch.equal(flat(state.model), weights)
    state.sync()
    assert opt.anderson.stats.resets["ranks"] == 0
    train(state.model, opt, DATA[20:30])
    assert opt.anderson.columns > 0
    assert_replicas_equal(state.model)


def test_restore_in_the_middle_of_a_backward_pass():
    """As after a rank was lost there: reductions that were begun are not waited for."""
    state = make_state(SETTINGS["undo"])
    state.sync()
    train(state.model, state.optimizer, DATA[:20])
    state.commit()
    before = everything(state)
    train(state.model, state.optimizer, DATA[20:30])
    end = flat(state.model)
    state.restore()
    x, y = DATA[0]
    state.optimizer.zero_grad()
    (state.model(x) - y).square().mean().backward()
    state.optimizer.synchronize()
    state.optimizer._handles.update(dict.fromkeys(state.model.parameters(), (None, None)))
    state.restore()
    assert_same_bits(everything(state), before, "restored")
    train(state.model, state.optimizer, DATA[20:30])
    assert torch.equal(flat(state.model), end)


@pytest.mark.parametrize("adam", [False, True])
@needs_two_ranks
def test_a_new_rank_among_old_ones(adam, monkeypatch, caplog):
    """It starts where rank 0 is, bit for bit; what was lost with the one before it is gone."""
    elastic_job(monkeypatch)
    state = make_state(ANY_STEP, adam)
    state.sync()
    train(state.model, state.optimizer, DATA[:20])
    state.commit()
    before = everything(state)
    if hvd.rank() == hvd.size() - 1:
        torch.manual_seed(99)
        state = make_state(ANY_STEP, adam)  # waits for nobody
        with torch.no_grad():
            for p in state.model.parameters():
                p.normal_()
    with caplog.at_level(logging.INFO, "aadl_hvd"):
        state.sync()
    said = [(r.levelname, r.message) for r in caplog.records if r.name == "aadl_hvd"]
    last = hvd.size() - 1
    assert said == (
        []
        if hvd.rank()
        else [
            (
                "WARNING",
                f"elastic: {hvd.size()} ranks, {hvd.size()} before, after step 20: the history "
                f"is reset, the shard of rank {last} of {hvd.size()} that shared it is lost",
            )
        ]
    )
    after = everything(state)
    for name in ("weights", "state", "param_groups", "batch"):
        assert_same_bits(after[name], before[name], name)
    stats = state.optimizer.anderson.stats
    assert stats.resets["ranks"] == 1
    assert stats.steps == after["part"]["calls"] == 20  # says what steps are next
    assert state.optimizer.anderson.columns == 0
    train(state.model, state.optimizer, DATA[20:])
    assert stats.accelerated > before["anderson"]["counters"]["accelerated"]
    assert_replicas_equal(state.model)


@pytest.mark.parametrize("settings", ["columns", "undo"])
@needs_two_ranks
def test_the_history_outlives_a_host_whose_end_is_known(settings, monkeypatch, caplog):
    """As if nothing had happened, bit for bit."""
    elastic_job(monkeypatch)
    monkeypatch.setenv("HOROVOD_HOSTNAME", f"host{hvd.rank()}")
    state = make_state(SETTINGS[settings])
    state.sync()
    train(state.model, state.optimizer, DATA[:20])
    state.commit()
    state.on_hosts_updated(1.0, 2)  # removed
    monkeypatch.setattr(state, "_last_updated_timestamp", 0)
    with pytest.raises(HostsUpdatedInterrupt) as interrupt:
        state.commit()
    assert not interrupt.value.skip_sync
    if hvd.rank() == hvd.size() - 1:
        state = make_state(SETTINGS[settings])
    with caplog.at_level(logging.INFO, "aadl_hvd"):
        state.sync()
    if hvd.rank() == 0:
        assert "the history goes on" in caplog.text
    train(state.model, state.optimizer, DATA[20:])

    undisturbed = make_state(SETTINGS[settings])
    undisturbed.sync()
    train(undisturbed.model, undisturbed.optimizer, DATA)
    assert torch.equal(flat(state.model), flat(undisturbed.model))
    found, expected = state.optimizer.anderson.stats, undisturbed.optimizer.anderson.stats
    assert found.counters() == expected.counters()
    assert found.accelerated > 5


def test_parts_are_handed_to_other_hosts():
    """To different ranks, where there are as many."""

    def chosen(hosts):
        return [horovod_elastic._elsewhere(hosts, rank) for rank in range(len(hosts))]

    assert chosen("aabb") == [2, 3, 0, 1]
    assert chosen("abc") == [1, 2, 0]
    assert chosen("aaab") == [3, 3, 3, 0]
    assert chosen("aaabbcc") == [3, 4, 5, 5, 6, 0, 1]
    assert chosen("aa") == [None, None]
    assert chosen("a") == [None]


@needs_two_ranks
def test_a_part_that_cannot_be_handed_over_holds_nobody_up(monkeypatch, caplog):
    """The others are in the same collective; and numbers of NumPy's are handed over."""
    state = make_state(SETTINGS["default"])
    state.sync()
    train(state.model, state.optimizer, DATA[:8])
    monkeypatch.setenv("HOROVOD_HOSTNAME", f"host{hvd.rank()}")
    handler, whole = state._handlers["optimizer"], horovod_elastic._shard

    def part(optimizer):
        entry = datetime.date(2026, 1, 1) if hvd.rank() == 1 else np.float64(0.5)
        return whole(optimizer) | {"entry": entry}

    monkeypatch.setattr(horovod_elastic, "_shard", part)
    with caplog.at_level(logging.WARNING, "aadl_hvd"):
        handler.hand_over()
    found = [(part["entry"], part["sharding"]["rank"]) for part in handler._handed]
    before = (hvd.rank() - 1) % hvd.size()
    assert found == ([] if before == 1 else [(0.5, before)])
    assert ("shard['entry'], of type datetime.date" in caplog.text) == (hvd.rank() == 1)


@pytest.mark.parametrize("of_rank_0", [True, False])
def test_a_part_that_cannot_be_read_is_a_lost_one(of_rank_0, monkeypatch, caplog):
    """As if its rank had left: no rank ends, and all begin their history anew."""
    state = make_state(ANY_STEP)
    state.sync()
    opt = state.optimizer
    train(state.model, opt, DATA[:20])
    accelerated, weights = opt.anderson.stats.accelerated, flat(state.model)
    assert opt.anderson.columns > 0
    whole, unread = horovod_elastic._shard, [{"gram": None}]
    damaged = 0 if of_rank_0 else hvd.size() - 1

    def part(optimizer):  # damaged once
        found = whole(optimizer)
        return found | unread.pop() if unread and hvd.rank() == damaged else found

    monkeypatch.setattr(horovod_elastic, "_shard", part)
    with caplog.at_level(logging.WARNING, "aadl_hvd"):
        state.sync()
    assert torch.equal(flat(state.model), weights)
    assert opt.anderson.columns == 0
    assert opt.anderson.stats.resets["ranks"] == 1
    assert ("the history is reset, the shard of rank" in caplog.text) == (hvd.rank() == 0)
    train(state.model, opt, DATA[20:])
    assert opt.anderson.stats.accelerated > accelerated
    assert_replicas_equal(state.model)


def test_horovods_own_state_does_the_same(monkeypatch):
    """`hvd.elastic.TorchState`, if nobody changed it: its handler forgets the history."""
    elastic_job(monkeypatch)
    model, opt = make(SETTINGS["undo"])
    state = hvd.elastic.TorchState(model=model, optimizer=opt, batch=0)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    handlers = hvd.elastic.TorchState(optimizer=plain)._handlers
    assert type(handlers["optimizer"]).__module__ == "horovod.torch.elastic.state"
    state.sync()
    train(model, opt, DATA[:20])
    state.commit()
    before = everything(state, own=False)
    train(model, opt, DATA[20:25])
    state.restore()
    state.sync()
    assert_same_bits(everything(state, own=False), before, "restored")


def test_before_the_ranks_have_met(monkeypatch):
    """An optimizer made in an elastic job waits for nobody, and says so if it has to."""
    elastic_job(monkeypatch)
    model, opt = make() if hvd.rank() == 0 else (None, None)  # on one rank alone
    if opt is not None:
        x, y = DATA[0]
        with opt.skip_synchronize(), pytest.raises(UnsupportedError, match="TorchState first"):
            (model(x) - y).square().mean()
            opt.step()
        state = opt.state_dict()
        opt.load_state_dict(state)
        aadl_hvd.elastic.TorchState(model=model, optimizer=opt).restore()
        assert opt.anderson.history_bytes == 0  # its share would be the whole


def test_a_checkpoint_loaded_before_the_ranks_meet(monkeypatch):
    """By rank 0 alone, as in Horovod's elastic examples: all go on from it, bit for bit."""
    state = make_state(SETTINGS["undo"])
    state.sync()
    train(state.model, state.optimizer, DATA[:20])
    weights = copy.deepcopy(state.model.state_dict())
    whole = copy.deepcopy(state.optimizer.consolidate_state_dict(to=0))
    train(state.model, state.optimizer, DATA[20:])
    end = flat(state.model)

    elastic_job(monkeypatch)
    again = make_state(SETTINGS["undo"])
    if hvd.rank() == 0:
        again.model.load_state_dict(weights)
        again.optimizer.load_state_dict(whole)
    again.sync()
    assert again.optimizer.anderson.stats.steps == 20
    train(again.model, again.optimizer, DATA[20:])
    assert torch.equal(flat(again.model), end)


def test_process_sets_end_with_the_ranks_they_were_made_for(monkeypatch, all_but_rank_0):
    elastic_job(monkeypatch)
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"process_set=.*Must be the global one"):
        DistributedAndersonOptimizer(sgd, process_set=all_but_rank_0)
    config = AndersonConfig(shard_group=all_but_rank_0)
    with pytest.raises(ConfigError, match=r"shard_group=.*Must be 'world' or 'node'"):
        DistributedAndersonOptimizer(sgd, anderson=config)
