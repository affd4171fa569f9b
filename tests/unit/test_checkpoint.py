"""What a run goes on from: bit for bit on as many ranks, to rounding on others."""

import copy
import itertools

import pytest
import torch
from checkpointing import (
    DATA,
    OPTIMIZERS,
    START,
    STEPS,
    TARGETS,
    P,
    Run,
    assert_same,
    through_a_file,
)

from aadl_hvd import AndersonConfig, AndersonOptimizer, CheckpointError, ConfigError, checkpoint
from aadl_hvd.comm.simulated import run_ranks

LONG = pytest.mark.long
SETTINGS = {
    "default": {},
    "columns": {"layout": "columns"},
    "store every 2nd": {"store_every": 2, "layout": "columns", "history_depth": 4},
    "warm-up": {"warmup_steps": 15},
    "residual": {"safeguard": "residual", "residual": "step", "mixing": 1.0},
    "residual, columns": {"safeguard": "residual", "layout": "columns"},
    "window": {"average_window": 4, "average_threshold": 1e-3},
    "averages": {"averages": (0.5, 0.8, 0.9), "layout": "columns"},
    "bfloat16, columns": {"history_dtype": "bfloat16", "layout": "columns"},
    "bfloat16": {"history_dtype": "bfloat16"},
    "ridge": {"regularization": 1e-8},
    "gate": {"noise_gate": 0.01, "method": "residual"},
    "subspace": {"method": "subspace"},
    "subspace, bfloat16": {"method": "subspace", "history_dtype": "bfloat16"},
    "handed over": {"noise_gate": 1e9, "frequency": 1},
}


# Every setting on three ranks with observed losses; the defaults and columns in all ways.
RESUMED = [
    pytest.param(
        *(name, ranks, observe),
        id=f"{name}-{ranks}{'-observe' * observe}",
        marks=[] if (ranks, observe) == (3, True) or name in ("default", "columns") else LONG,
    )
    for name in SETTINGS
    for ranks in (1, 3)
    for observe in (False, True)
]


@pytest.mark.parametrize(("name", "ranks", "observe"), RESUMED)
def test_resume_is_bitwise(name, ranks, observe, tmp_path):
    """At every step of a period: with a verdict due, and without; whole, and part by part."""
    noisy = {"noisy": True, "passes": 2} if name in ("gate", "handed over") else {}
    if "subspace" in name or name == "handed over":
        noisy["optimizer"] = "slow SGD"

    def program(comm):
        run = Run(comm, SETTINGS[name], **noisy)
        saved = []
        for k in range(20, 20 + P + 1):
            run.train(k, observe)
            part = copy.deepcopy({**run.opt.state_dict(), **run.opt.sharded_state_dict()})
            to = k % ranks
            whole = run.opt.consolidate_state_dict(to)
            assert (whole is not None) == (comm.rank == to)
            whole = comm.allgather_object(whole)[to]
            saved.append((k, copy.deepcopy(run.model.state_dict()), part, whole))
        expected = run.train(STEPS, observe).outcome()
        folder = tmp_path / str(comm.rank)
        folder.mkdir()
        for k, weights, part, whole in saved:
            for state in (part, whole):
                new = Run(comm, SETTINGS[name], **noisy).resumed(
                    weights, through_a_file(state, folder)
                )
                new.k = k
                assert_same(new.train(STEPS, observe).outcome(), expected)
        return expected

    stats = run_ranks(ranks, program)[0]
    counters = stats[3]
    if name == "handed over":
        assert stats[5]["handover"]["subspace"]
        assert counters["rejected"]["noise"] >= 6
        assert stats[5]["subspace"]["blocks"]["stored"] >= 2
        return
    assert counters["accelerated"] >= 2, counters
    assert counters["jumps"] == ("optimizer" in noisy) * counters["accelerated"], counters
    assert not sum(counters["resets"].values()), counters
    if observe:
        assert counters["rejected"]["loss"] >= 1, counters
    if name == "window":
        assert counters["averaged"] >= 3, counters
    if name == "gate":
        assert counters["rejected"]["noise"] >= 1, counters


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("safeguard", ["descent", "residual"])
def test_resume_with_other_optimizers(name, safeguard):
    run = Run(None, {"safeguard": safeguard}, name).train(20)
    state = copy.deepcopy(run.opt.consolidate_state_dict())
    weights = copy.deepcopy(run.model.state_dict())
    expected = run.train(STEPS).outcome()
    new = Run(None, {"safeguard": safeguard}, name).resumed(weights, state)
    new.k = 20
    assert_same(new.train(STEPS).outcome(), expected)
    assert run.opt.anderson.stats.accelerated >= 3


def test_resume_with_groups():
    """Each group holds a whole history; one group's is consolidated, all ranks' own is kept."""
    noisy = {"groups": 2, "noisy": True, "passes": 2}

    def program(comm):
        run = Run(comm, {"noise_gate": 0.01}, **noisy).train(20)
        part = copy.deepcopy({**run.opt.state_dict(), **run.opt.sharded_state_dict()})
        whole = comm.allgather_object(run.opt.consolidate_state_dict(3))[3]
        weights = copy.deepcopy(run.model.state_dict())
        expected = run.train(STEPS).outcome()
        for state in (part, whole):
            new = Run(comm, {"noise_gate": 0.01}, **noisy).resumed(weights, state)
            new.k = 20
            assert_same(new.train(STEPS).outcome(), expected)
        return part

    merged = checkpoint.merge_shards(run_ranks(4, program)[:2])
    assert merged["anderson"]["history"]["columns"]["y"].shape[1] == 32


def test_sharded_state_is_a_copy():
    """Training on does not change it, nor what was loaded from."""
    for observe, settings in itertools.product((False, True), ({}, {"safeguard": "residual"})):
        run = Run(None, settings).train(21, observe)
        state = run.opt.sharded_state_dict()
        before = copy.deepcopy(state)
        run.train(30, observe)
        assert_same(state, before)
        run.opt.load_state_dict(state)
        assert_same(
            run.opt.sharded_state_dict()["anderson"]["history"], before["anderson"]["history"]
        )
        run.train(40, observe)
        assert_same(state, before)


# Other numbers of ranks


def whole_of(states):
    return checkpoint.merge_shards(states)["anderson"]["history"]


@pytest.mark.parametrize("layouts", list(itertools.product(("rows", "columns"), repeat=2)))
@pytest.mark.parametrize("sizes", [(1, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_resharding(layouts, sizes, dtype):
    """The whole is the same before and after; the next steps are the same to rounding."""
    settings = {
        **{"history_dtype": dtype, "store_every": 2, "history_depth": 6},
        **{"averages": (0.9, 0.8), "safeguard": "none", "relaxation": 0.3},
        "regularization": 1e-3,  # a well-conditioned problem: rounding stays rounding
    }
    near = {"rtol": 1e-4, "atol": 1e-5}

    def before(comm):
        run = Run(comm, settings | {"layout": layouts[0]}, noisy=True).train(22)
        state = copy.deepcopy({**run.opt.state_dict(), **run.opt.sharded_state_dict()})
        weights = copy.deepcopy(run.model.state_dict())
        return state, weights, run.train(25).weights()

    saved = run_ranks(sizes[0], before)
    state, weights, expected = saved[0]
    merged = checkpoint.merge_shards([state for state, *_ in reversed(saved)])
    assert merged["anderson"]["history"]["columns"]["count"] == 6
    assert merged["anderson"]["history"]["gram"]["fresh"], "no column is fresh"

    def after(comm):
        run = Run(comm, settings | {"layout": layouts[1]}, noisy=True)
        run.resumed(weights, state | merged)
        run.k = 22
        part = run.opt.sharded_state_dict()  # before the first step: what was loaded
        whole = comm.allgather_object(run.opt.consolidate_state_dict(0))[0]
        return part, whole, copy.deepcopy(run.opt.sharded_state_dict()), run.train(25).weights()

    results = run_ranks(sizes[1], after)
    for which in (0, 2):
        found, there = whole_of([r[which] for r in results]), merged["anderson"]["history"]
        for name in ("y", "r"):
            assert_same(found["columns"][name].float(), there["columns"][name].float())
        assert_same(found["columns"]["weights"], there["columns"]["weights"])
        assert_same(found["columns"]["pair"], there["columns"]["pair"])
        for name in ("matrix", "fresh", "carried", "drift"):
            assert_same(found["gram"][name], there["gram"][name])
        for name in ("calls", "averages", "window", "noise", "losses", "backoff", "trial"):
            assert_same(found[name], there[name])
    for *_, path in results:
        assert torch.equal(path, results[0][-1])
        torch.testing.assert_close(path, expected, **near)


def test_averages_of_before_go_on_where_all_are_there():
    """As in a checkpoint of four, the default before; else all begin anew, without an error."""
    before = 0.9, 0.97, 0.99, 0.997
    run = Run(None, {"averages": before}).train(20)
    weights, state = copy.deepcopy((run.model.state_dict(), run.opt.consolidate_state_dict()))
    means = state["anderson"]["history"]["averages"]["means"]
    expected = run.train(30).outcome()[1]
    for averages in ((0.9, 0.99, 0.997), (0.997,), AndersonConfig().averages):
        new = Run(None, {"averages": averages}).resumed(weights, state)
        new.k = 20
        found = new.opt.sharded_state_dict()["anderson"]["history"]["averages"]
        if set(averages) <= set(before):
            kept = [before.index(decay) for decay in averages]
            assert found["count"] == 20 // P and torch.equal(found["means"], means[kept])
            for decay, mean in new.train(30).outcome()[1].items():
                torch.testing.assert_close(mean, expected[decay])
        else:
            assert found["count"] == 0 and found["means"] is None
            assert set(new.train(30).outcome()[1]) == set(averages)
        assert new.opt.anderson.stats.accelerated


def test_another_depth_keeps_the_newest_columns():
    run = Run(None, {"history_depth": 6, "average_window": 5, "averages": (0.9, 0.8)}).train(25)
    state = run.opt.consolidate_state_dict()
    history = state["anderson"]["history"]
    for depth, window in ((4, 3), (9, 8)):
        new = Run(None, {"history_depth": depth, "average_window": window, "averages": (0.8,)})
        new.resumed(run.model.state_dict(), copy.deepcopy(state))
        found = new.opt.sharded_state_dict()["anderson"]["history"]
        h = min(depth, 6)
        assert found["columns"]["count"] == h
        assert torch.equal(found["columns"]["y"], history["columns"]["y"][-h:])
        G = history["gram"]["matrix"][-h:, -h:]
        assert torch.equal(found["gram"]["matrix"], G)
        iterates = history["window"]["iterates"]
        assert torch.equal(found["window"]["iterates"], iterates[-min(window, 5) :])
        assert found["averages"]["decays"] == [0.8]
        assert torch.equal(found["averages"]["means"][0], history["averages"]["means"][1])
        new.k = 25
        accelerated = new.opt.anderson.stats.accelerated
        new.train(STEPS)
        assert new.opt.anderson.stats.accelerated > accelerated


# Who loads what


def test_history_of_one_rank_alone_restarts_everywhere():
    """Horovod's usual resume: nobody waits, and the replicas stay equal."""
    whole = Run(None).train(20).opt.consolidate_state_dict()
    for when, settings in itertools.product(
        (0, 7, 9), ({}, {"safeguard": "residual", "average_window": 3}, {"layout": "columns"})
    ):

        def program(comm, when=when, settings=settings):
            run = Run(comm, settings).train(when, True)
            if comm.rank == 1:
                run.opt.load_state_dict(copy.deepcopy(whole))
                # its base state and its weights are then broadcast: here it takes the others'
            base = comm.allgather_object(run.opt.state_dict())[0]
            torch.optim.SGD.load_state_dict(run.opt, base)
            run.train(STEPS, True)
            return run.weights(), run.opt.anderson.stats

        results = run_ranks(3, program)
        for weights, stats in results:
            assert torch.equal(weights, results[0][0])
            assert stats.resets["desynchronized"] == 1
        assert results[0][1].accelerated >= 3


def test_loaded_averages_are_there_before_the_first_step():
    def program(comm):
        run = Run(comm).train(20)
        state = comm.allgather_object(run.opt.consolidate_state_dict())[0]
        with run.opt.averaged_weights(which=0.99) as kind:
            assert kind == 0.99
            expected = run.weights()
        new = Run(comm).resumed(run.model.state_dict(), state)
        with new.opt.averaged_weights(which=0.99) as kind:
            assert kind == 0.99
            assert torch.equal(new.weights(), expected)

    run_ranks(2, program)


@pytest.mark.parametrize("agree", [False, True])
def test_loaded_in_the_middle_of_a_run_on_all_ranks(agree):
    """In force at once if asked for; else in the next accelerated step."""

    def program(comm):
        run = Run(comm, {"safeguard": "none", "relaxation": 0.3}).train(20)
        part = copy.deepcopy({**run.opt.state_dict(), **run.opt.sharded_state_dict()})
        weights = copy.deepcopy(run.model.state_dict())
        assert run.opt.anderson.columns == 15
        expected = run.train(STEPS).outcome()
        run.k = 20
        run.resumed(weights, part)
        assert run.opt.anderson.columns == 0
        if agree:
            run.opt.anderson.agree(run.opt.anderson_engine.problem)
            assert_same(run.train(STEPS).outcome(), expected)
            return run.weights()
        run.train(20 + P)
        assert run.opt.anderson.columns == 15
        run.train(STEPS)
        assert not run.opt.anderson.stats.resets["desynchronized"]
        return run.weights()

    weights = run_ranks(3, program)
    assert all(torch.equal(w, weights[0]) for w in weights)


def test_parts_of_different_moments_restart_everywhere():
    def program(comm):
        run = Run(comm).train(20 + comm.rank // 2)
        return copy.deepcopy(run.opt.sharded_state_dict()), copy.deepcopy(run.model.state_dict())

    # Ranks that do not wait for each other: taken from two runs of two.
    early = run_ranks(2, lambda comm: Run(comm).train(20).opt.sharded_state_dict())
    late = run_ranks(2, lambda comm: Run(comm).train(21).opt.sharded_state_dict())
    with pytest.raises(CheckpointError, match="after step 20 of one run and after step 21"):
        checkpoint.merge_shards([early[0], late[1]])

    def resumed(comm):
        run = Run(comm)
        run.opt.load_state_dict((early, late)[comm.rank][comm.rank])
        run.train(20)
        return run.opt.anderson.stats.resets["desynchronized"], run.weights()

    results = run_ranks(2, resumed)
    assert [count for count, _ in results] == [1, 1]
    assert torch.equal(results[0][1], results[1][1])


def test_consolidated_until_the_next_step():
    def program(comm):
        run = Run(comm).train(10)

        def held():
            return "history" in run.opt.state_dict()["anderson"]

        for event in ("step", "reset", "load", "group"):
            run.opt.consolidate_state_dict(1)
            assert held() == (comm.rank == 1)
            if event == "step":
                run.train(run.k + 1)
            elif event == "reset":
                run.opt.anderson.reset()
            elif event == "load":
                run.opt.load_state_dict(run.opt.state_dict())
            else:
                run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
            assert not held()
            assert run.opt.anderson.full_state is None
        for to in (2, -1, True, "0", comm.rank):
            with pytest.raises(ConfigError, match="Invalid to="):
                run.opt.consolidate_state_dict(to)

    run_ranks(2, program)


def test_a_rank_that_cannot_hand_out_its_part_is_an_error_on_all():
    def program(comm):
        run = Run(comm).train(10)
        if comm.rank == 2:
            run.opt.anderson.shard_state = lambda problem: 1 / 0
        with pytest.raises(CheckpointError, match=r"Rank 2 could not.*ZeroDivisionError"):
            run.opt.consolidate_state_dict(0)
        run.train(20)  # and all are still in step
        return run.weights()

    weights = run_ranks(3, program)
    assert all(torch.equal(w, weights[0]) for w in weights)


# What is in the model


def test_unused_late_and_tied_parameters():
    def built():
        model = copy.deepcopy(START)
        model.tied = model[0].weight
        model.unused = torch.nn.Parameter(torch.ones(3))
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        opt = AndersonOptimizer(base, anderson=AndersonConfig(frequency=P, noise_gate=None))
        return model, opt, torch.nn.Parameter(torch.ones(2))

    def train(model, opt, late, first, last):
        for k in range(first, last):
            opt.zero_grad()
            loss = (model(DATA[0, 0]) - TARGETS[0, 0]).square().mean()
            (loss + (late - 2).square().sum() * 0.01).backward()
            opt.step()
            if k == 5:
                opt.add_param_group({"params": [late], "lr": 0.02})

    model, opt, late = built()
    train(model, opt, late, 0, 20)
    state = copy.deepcopy(opt.consolidate_state_dict())
    weights = copy.deepcopy((model.state_dict(), late))
    train(model, opt, late, 20, 40)
    new, resumed, other = built()
    resumed.add_param_group({"params": [other], "lr": 0.02})
    new.load_state_dict(weights[0])
    other.data.copy_(weights[1])
    resumed.load_state_dict(state)
    train(new, resumed, other, 20, 40)
    assert resumed.anderson.stats.counters() == opt.anderson.stats.counters()
    assert resumed.anderson.stats.accelerated >= 3
    assert_same(new.state_dict(), dict(model.state_dict()) | {})
    assert torch.equal(late, other)
    assert torch.equal(new.unused, torch.ones(3))
