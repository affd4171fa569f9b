"""What a run goes on from: bit for bit on as many ranks, to rounding on others."""

import copy
import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    CheckpointError,
    ConfigError,
    NeumannOptimizer,
    checkpoint,
)
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator
from aadl_hvd.core.acceptance import LossWatch
from aadl_hvd.stats import Stats

STEPS, P = 40, 3


def network():
    torch.manual_seed(7)
    layers = torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    return torch.nn.Sequential(*layers)


START = network()  # n = 32; simulated ranks are threads, and share torch's random numbers
GENERATOR = torch.Generator().manual_seed(1)
DATA = torch.randn(STEPS + 20, 2, 16, 3, generator=GENERATOR)
TARGETS = torch.randn(STEPS + 20, 2, 16, 2, generator=GENERATOR)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Neumann": lambda p: NeumannOptimizer(p, lr=0.01, steps_per_epoch=10),
}


class Run:
    """A model, its optimizer on simulated ranks, and the number of steps taken."""

    def __init__(self, comm, config=None, optimizer="SGD", passes=1, groups=1, noisy=False):
        self.model = copy.deepcopy(START)
        base = OPTIMIZERS[optimizer](self.model.parameters())
        config = AndersonConfig(**({"frequency": P, "noise_gate": None} | (config or {})))
        self.opt = AndersonOptimizer(base, anderson=config, backward_passes_per_step=passes)
        group = comm.shard_group(groups) if comm is not None and groups > 1 else None
        if comm is not None:
            self.opt.anderson = Accelerator(config, comm, group)
        self.passes, self.noisy, self.k = passes, noisy, 0

    def train(self, until, observe=False):
        """Observed losses are bad once after step 20, so that a point on trial is rejected."""
        while self.k < until:
            self.k += 1
            self.opt.zero_grad()
            for i in range(self.passes):
                k = self.k if self.noisy else 0
                loss = (self.model(DATA[k, i]) - TARGETS[k, i]).square().mean()
                loss.backward()
            if observe:
                first = not self.opt.anderson.stats.rejected["loss"]
                bad = self.k > 20 and first and self._verdict_due()
                self.opt.observe(loss.detach() * (3.0 if bad else 1.0))
            self.opt.step()
        return self

    def _verdict_due(self):
        anderson = self.opt.anderson
        loaded = anderson._pending  # what the first step after a load will go by
        if loaded is not None:
            return loaded["replicated"]["losses"]["verdict_due"]
        return anderson._losses.verdict_due

    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()

    def resumed(self, run, state):
        """Goes on from the weights of another run, and its optimizer's state."""
        self.model.load_state_dict(copy.deepcopy(run))
        self.opt.load_state_dict(copy.deepcopy(state))  # torch keeps its tensors as they are
        return self

    def outcome(self):
        stats = self.opt.anderson.stats
        averages = {}
        for kind in self.opt.anderson.config.averages:
            with self.opt.averaged_weights(which=kind):
                averages[kind] = self.weights()
        state = self.opt.state_dict()
        state = {key: state[key] for key in ("state", "param_groups")}
        part = self.opt.sharded_state_dict()["anderson"]["history"]
        part = {name: part[name] for name in ("replicated", "own", "rows")}
        return self.weights(), averages, state, stats.counters(), stats.measured(), part


def assert_same(found, expected):
    """Nested containers of tensors and numbers, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found.nan_to_num(1e30), expected.nan_to_num(1e30))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected or (found != found and expected != expected)


def everybodys(comm, item):
    """A copy of an object of every rank, made before any of them goes on."""
    return comm.allgather_object(copy.deepcopy(item))


def through_a_file(state, folder):
    checkpoint.save(folder / "state.pt", state)
    return checkpoint.load(folder / "state.pt")


SETTINGS = {
    "default": {},
    "columns": {"layout": "columns"},
    "store every 2nd": {"store_every": 2, "layout": "columns", "history_depth": 4},
    "warm-up": {"warmup_steps": 15},
    "residual": {"safeguard": "residual", "residual": "step", "mixing": 1.0},
    "residual, columns": {"safeguard": "residual", "layout": "columns"},
    "window": {"average_window": 4, "average_threshold": 1e-3},
    "averages": {"averages": (0.5, 0.7, 0.9), "layout": "columns"},
    "bfloat16": {"history_dtype": "bfloat16"},
    "bfloat16, columns": {"history_dtype": "bfloat16", "layout": "columns"},
    "ridge": {"regularization": 1e-8},
    "gate": {"noise_gate": 0.01},
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("observe", [False, True], ids=["", "observe"])
def test_resume_is_bitwise(name, ranks, observe, tmp_path):
    """At every step of a period: with a verdict due, and without; whole, and part by part."""
    noisy = {"noisy": True, "passes": 2} if name == "gate" else {}

    def program(comm):
        run = Run(comm, SETTINGS[name], **noisy)
        saved = []
        for k in range(20, 20 + P + 1):
            run.train(k, observe)
            part = copy.deepcopy({**run.opt.state_dict(), **run.opt.sharded_state_dict()})
            to = k % ranks
            whole = run.opt.consolidate_state_dict(to)
            assert (whole is not None) == (comm.rank == to)
            whole = everybodys(comm, whole)[to]
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
    assert counters["accelerated"] >= 2, counters
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
        whole = everybodys(comm, run.opt.consolidate_state_dict(3))[3]
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

    def before(comm):
        run = Run(comm, settings | {"layout": layouts[0]}, noisy=True).train(22)
        state = copy.deepcopy({**run.opt.state_dict(), **run.opt.sharded_state_dict()})
        weights = copy.deepcopy(run.model.state_dict())
        return state, weights, run.train(25).weights()

    saved = run_ranks(sizes[0], before)
    state, weights, expected = saved[0]
    merged = checkpoint.merge_shards([state for state, *_ in reversed(saved)])
    assert merged["anderson"]["history"]["replicated"]["columns"] == 6
    assert merged["anderson"]["history"]["replicated"]["gram"]["fresh"], "no column is fresh"

    def after(comm):
        run = Run(comm, settings | {"layout": layouts[1]}, noisy=True)
        run.resumed(weights, state | merged)
        run.k = 22
        part = run.opt.sharded_state_dict()  # before the first step: what was loaded
        whole = everybodys(comm, run.opt.consolidate_state_dict(0))[0]
        return part, whole, copy.deepcopy(run.opt.sharded_state_dict()), run.train(25).weights()

    results = run_ranks(sizes[1], after)
    for which in (0, 2):
        found, there = whole_of([r[which] for r in results]), merged["anderson"]["history"]
        for name in ("y", "r"):
            assert_same(found["columns"][name].float(), there["columns"][name].float())
        assert_same(found["columns"]["weights"], there["columns"]["weights"])
        assert_same(found["rows"], there["rows"])
        same = found["replicated"], there["replicated"]
        assert_same(*({k: v for k, v in s.items() if k != "last"} for s in same))
    assert_same(results[0][1]["anderson"]["history"]["rows"], merged["anderson"]["history"]["rows"])
    for *_, path in results:
        assert torch.equal(path, results[0][-1])
        torch.testing.assert_close(path, expected, rtol=1e-4, atol=1e-5)


def test_another_depth_keeps_the_newest_columns():
    run = Run(None, {"history_depth": 6, "average_window": 5, "averages": (0.9, 0.8)}).train(25)
    state = run.opt.consolidate_state_dict()
    history = state["anderson"]["history"]
    for depth, window in ((4, 3), (9, 8)):
        new = Run(None, {"history_depth": depth, "average_window": window, "averages": (0.8,)})
        new.resumed(run.model.state_dict(), copy.deepcopy(state))
        found = new.opt.sharded_state_dict()["anderson"]["history"]
        h = min(depth, 6)
        assert found["replicated"]["columns"] == h
        assert torch.equal(found["columns"]["y"], history["columns"]["y"][-h:])
        G = history["replicated"]["gram"]["matrix"][-h:, -h:]
        assert torch.equal(found["replicated"]["gram"]["matrix"], G)
        iterates = history["rows"]["iterates"]
        assert torch.equal(found["rows"]["iterates"], iterates[-min(window, 5) :])
        assert torch.equal(found["rows"]["average 0.8"], history["rows"]["average 0.8"])
        assert "average 0.9" not in found["rows"]
        new.k = 25
        accelerated = new.opt.anderson.stats.accelerated
        new.train(STEPS)
        assert new.opt.anderson.stats.accelerated > accelerated


# Who loads what


def test_history_of_one_rank_alone_resets_everywhere():
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
            base = everybodys(comm, run.opt.state_dict())[0]
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
        state = everybodys(comm, run.opt.consolidate_state_dict())[0]
        with run.opt.averaged_weights(which=0.9) as kind:
            assert kind == 0.9
            expected = run.weights()
        new = Run(comm).resumed(run.model.state_dict(), state)
        with new.opt.averaged_weights(which=0.9) as kind:
            assert kind == 0.9
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
            run.opt.anderson.agree(run.opt._anderson_problem)
            assert_same(run.train(STEPS).outcome(), expected)
            return run.weights()
        run.train(20 + P)
        assert run.opt.anderson.columns == 15
        run.train(STEPS)
        assert not run.opt.anderson.stats.resets["desynchronized"]
        return run.weights()

    weights = run_ranks(3, program)
    assert all(torch.equal(w, weights[0]) for w in weights)


def test_parts_of_different_moments_reset_everywhere():
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
            assert run.opt.anderson.consolidated is None
        for to in (2, -1, True, "0", comm.rank):
            with pytest.raises(ConfigError, match="Invalid to="):
                run.opt.consolidate_state_dict(to)

    run_ranks(2, program)


def test_a_rank_that_cannot_hand_out_its_part_is_an_error_on_all():
    def program(comm):
        run = Run(comm).train(10)
        if comm.rank == 2:
            run.opt.anderson.part = lambda problem: 1 / 0
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


# What does not fit


def damaged(state, change):
    state = copy.deepcopy(state)
    change(state["anderson"])
    return state


def without_a_column(columns):
    for name in ("index", "y", "r", "weights"):
        columns[name] = columns[name][:-1]


def test_what_does_not_fit_is_named_and_changes_nothing():
    run = Run(None).train(20)
    state = run.opt.consolidate_state_dict()
    other = copy.deepcopy(state)
    other["anderson"]["parameters"][1][0] = [7]
    dtype = copy.deepcopy(state)
    dtype["anderson"]["parameters"][2][1] = "bfloat16"
    fewer = copy.deepcopy(state)
    del fewer["anderson"]["parameters"][0]
    part = run_ranks(2, lambda comm: Run(comm).train(20).opt.sharded_state_dict())[1]
    torchs = copy.deepcopy(state)
    torchs["param_groups"].append(torchs["param_groups"][0] | {"params": []})
    cases = {
        r"parameter 1 had shape \(7,\), has \(5,\)": other,
        "parameter 2 was bfloat16, is float32": dtype,
        "3 parameters. Must have 4": fewer,
        r"rank 1 of 2, rows 16 to 31, and this rank needs 0 to 31": part,
        "different number of parameter groups": torchs,  # torch's own error
        "'format'.*=3. Must be at most 2": damaged(state, lambda a: a.update(format=3)),
        "'format'.*='x'": damaged(state, lambda a: a.update(format="x")),
        "damaged.*counters": damaged(state, lambda a: a.pop("counters")),
        "damaged": damaged(state, lambda a: a["history"].pop("rows")),
        "damaged.*contradict": damaged(
            state, lambda a: a["history"]["replicated"].update(stored=2)
        ),
        "n=33 numbers": damaged(state, lambda a: a["history"]["sharding"].update(n=33)),
        r"\[2, 5\].*Must be of shape \[2, 32\]": damaged(
            state, lambda a: a["history"]["rows"].update(pair=torch.zeros(2, 5))
        ),
        "lacks 1 col": damaged(state, lambda a: without_a_column(a["history"]["columns"])),
    }
    for section in ("replicated", "columns"):
        for name in state["anderson"]["history"][section]:
            cases[f"(damaged|Invalid).*{name}"] = damaged(
                state, lambda a, s=section, name=name: a["history"][s].pop(name)
            )
    before = copy.deepcopy((run.opt.sharded_state_dict(), run.outcome()))
    for message, bad in cases.items():
        with pytest.raises(CheckpointError, match=message):
            run.opt.load_state_dict(bad)
        assert_same((run.opt.sharded_state_dict(), run.outcome()), before)
    expected = run.train(30).outcome()
    again = Run(None).train(30)
    assert_same(again.outcome(), expected)


@pytest.mark.parametrize(
    ("settings", "change", "why"),
    [
        ({"residual": "step", "mixing": 1.0}, lambda run: None, "residual='step'"),
        ({}, lambda run: run.model[0].bias.requires_grad_(False), "requires_grad"),
    ],
)
def test_history_that_means_something_else_is_left_out(settings, change, why):
    state = Run(None).train(20).opt.consolidate_state_dict()
    run = Run(None, settings)
    change(run)
    with pytest.warns(UserWarning, match=why):
        run.opt.load_state_dict(copy.deepcopy(state))
    assert run.opt.anderson.columns == 0
    assert run.opt.anderson.stats.steps == 20
    run.train(15)
    assert run.opt.anderson.stats.accelerated > state["anderson"]["counters"]["accelerated"]


def test_part_alone_with_other_rates_is_left_out():
    """Columns of residual="step" hold for the ratio of the groups' learning rates."""

    def built(rate):
        model = copy.deepcopy(START)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": rate}]
        config = AndersonConfig(residual="step", mixing=1.0)
        return AndersonOptimizer(torch.optim.SGD(groups, lr=0.1), anderson=config)

    part = built(0.2).sharded_state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(0.2).load_state_dict(part)
    with pytest.warns(UserWarning, match="learning rates"):
        built(0.3).load_state_dict(part)


# Where in a state_dict, and what stands there in place of what was saved; GONE: nothing.
GONE = object()
HISTORY = "anderson", "history"
SAME, ROWS, COLUMNS = ((*HISTORY, name) for name in ("replicated", "rows", "columns"))
GROUP = "param_groups", 0
COUNTERS, OWN = ("anderson", "counters"), (*HISTORY, "own", "0")
NONSENSE = {
    **{(name,): [GONE, None, 5, "x"] for name in ("state", "param_groups")},
    ("anderson",): [5, torch.zeros(0), "x", None],
    HISTORY: [5, torch.zeros(0), "x"],
    ("anderson", "settings"): [5, torch.zeros(0), "x", [[math.nan], [0.05]]],
    ("state", 0): [None, 5, "x", []],
    ("state", 0, "momentum_buffer"): [
        *("x", 5, torch.zeros(7), torch.zeros(5, 3).to_sparse(), torch.full((5, 3), math.nan)),
        *(torch.zeros(5, 3, device="meta"), torch.zeros(1, 5, 3)),
    ],
    (*GROUP, "params"): [GONE, [3, 2, 1, 0], [0, 1, 2], [0, 1, 2, 2], [0.0, 1, 2, 3]],
    (*GROUP, "lr"): [GONE, None, "x", math.nan, math.inf, -1, 10**30, True, torch.zeros(0)],
    (*GROUP, "momentum"): [GONE, None, "x", math.nan, math.inf, True],
    (*GROUP, "weight_decay"): [GONE, None, "x", math.nan, math.inf, True],
    (*GROUP, "nesterov"): [torch.zeros(0), []],
    ("anderson", "format"): [True, 0, 1.0],
    ("anderson", "measured", "noise_variance"): [None, "x"],
    (*COUNTERS, "steps"): [math.inf, math.nan, -1, "3", True, 1.0, 10**30],
    (*COUNTERS, "rejected", "descent"): [None, "x", -1],
    (*SAME, "calls"): [math.nan, -(10**9), "x", 1.0],
    (*SAME, "stored"): [math.nan, math.inf, 12.0, 3, 0],
    (*SAME, "last"): [2, "x", True, 1.0],
    (*SAME, "noise"): ["x", math.nan, 2],
    (*SAME, "pushed"): [2, "x"],
    (*SAME, "averages"): [None, {}],
    **{(*SAME, "averages", name): [GONE] for name in ("kinds", "every", "gains", "measured")},
    (*SAME, "averages", "count"): [GONE, -1, None],
    (*SAME, "averages", "gains"): [[0.0], [math.nan] * 4],
    (*SAME, "backoff"): [[], [10**9, 10**9, 0.0], [0, 4, math.nan], [math.inf, 4, 0.0], [0, 0, 0]],
    (*SAME, "losses"): [{}, None],
    (*SAME, "losses", "verdict_due"): [1, None],
    (*SAME, "gram", "fresh"): [[9], [-1], [0, 0], ["x"], None],
    (*SAME, "gram", "matrix"): [
        *(torch.full((4, 4), math.nan).double(), torch.ones(4, 4), -torch.ones(4, 4).double()),
        torch.ones(4, 4).double().triu(),
    ],
    (*ROWS, "average 0.9"): [GONE, torch.zeros(1, 1, 2, 32), torch.full((1, 2, 32), math.nan)],
    (*ROWS, "pair"): [GONE, torch.zeros(2, 31), torch.zeros(2, 32).long(), None],
    (*ROWS, "unheard of"): [torch.zeros(32)],
    (*COLUMNS, "index"): [[3, 2, 1, 0], [0, 1, 2, 3.0], [0, True, 2, 3], [0, 0, 2, 3]],
    (*COLUMNS, "y"): [
        *(torch.zeros(4, 32, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64)),
        *(torch.zeros(4, 32).to_sparse(), torch.zeros(4, 32, device="meta")),
        torch.zeros(4, 32).double(),
    ],
    (*COLUMNS, "r"): [torch.zeros(4, 31), torch.zeros(4, 33), torch.zeros(3, 32)],
    (*COLUMNS, "weights"): [torch.zeros(3).double(), torch.zeros(4), None],
    (*COLUMNS, "scales"): ["x", torch.zeros(2, 4)],
    (*COLUMNS, "products"): ["x", torch.zeros(4, 9).double()],
    **{(*HISTORY, name): [None, "x", -1] for name in ("undo", "ranks", "own")},
    OWN: ["x", {}, 5],
    (*OWN, "noise"): [None, {}, "x"],
    (*OWN, "noise", "call"): [None, "x", math.nan],
    (*OWN, "noise", "changes"): [[(1, 2)], [1], None],
    (*OWN, "losses", "variances"): ["x", [math.nan], [-1.0]],
    (*OWN, "losses", "last_difference"): ["x", []],
}


def changed(state, path, value):
    state = copy.deepcopy(state)
    *way, last = path
    place = state
    for key in way:
        place = place[key]
    if isinstance(place, tuple):
        there = () if value is GONE else (value,)
        return changed(state, way, (*place[:last], *there, *place[last + 1 :]))
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return state


def everything(run):
    return copy.deepcopy((run.opt.sharded_state_dict(), run.outcome()))


SMALL = {"history_depth": 4, "safeguard": "none"}  # all 4 columns are in use


@pytest.mark.parametrize("path", NONSENSE, ids=lambda path: ".".join(map(str, path)))
def test_nonsense_is_refused_and_changes_nothing(path):
    state = Run(None, SMALL).train(13).opt.consolidate_state_dict()
    run = Run(None, SMALL).train(9)
    before = everything(run)
    for value in NONSENSE[path]:
        with pytest.raises(CheckpointError, match="Invalid "):
            run.opt.load_state_dict(changed(state, path, value))
        assert_same(everything(run), before)
    assert_same(everything(run.train(15)), everything(Run(None, SMALL).train(15)))


def test_nonsense_on_one_of_two_ranks_is_no_wish():
    """It would come up in the first step, in a collective."""

    def program(comm):
        state = everybodys(comm, Run(comm, SMALL).train(13).opt.consolidate_state_dict())[0]
        run = Run(comm, SMALL).train(9)
        for path, values in NONSENSE.items():
            if comm.rank == 1:
                with pytest.raises(CheckpointError):
                    path = tuple("1" if key == "0" else key for key in path)
                    run.opt.load_state_dict(changed(state, path, values[0]))
                assert run.opt.anderson._pending is None
        return everything(run.train(15)), everything(Run(comm, SMALL).train(15))

    for found, expected in run_ranks(2, program):
        assert_same(found, expected)


def test_what_fails_while_it_is_taken_in_is_undone(monkeypatch):
    """Whatever the reason, also where most has been taken in."""
    settings = SMALL | {"safeguard": "residual", "average_window": 3, "history_dtype": "bfloat16"}
    state = Run(None, settings).train(13, True).opt.consolidate_state_dict()
    run = Run(None, settings).train(10, True)
    before = everything(run)
    raised = {
        RuntimeError: CheckpointError,
        ZeroDivisionError: CheckpointError,
        torch.cuda.OutOfMemoryError: torch.cuda.OutOfMemoryError,
        KeyboardInterrupt: KeyboardInterrupt,
    }
    for place in (LossWatch, Stats):
        for cause, seen in raised.items():
            with monkeypatch.context() as patch:
                name = "take" if place is LossWatch else "load_measured"
                calls = itertools.count(place is LossWatch)  # Stats rehearses before

                def fail(*arguments, cause=cause, calls=calls):
                    if next(calls):
                        raise cause("in the middle")

                patch.setattr(place, name, fail)
                with pytest.raises(seen):
                    run.opt.load_state_dict(copy.deepcopy(state))
            assert_same(everything(run), before)
    assert_same(everything(run.train(20, True)), everything(Run(None, settings).train(20, True)))


def paths_of(value, path=()):
    if path:
        yield path, value
    if isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from paths_of(value[key], (*path, key))


def mutations_of(value):
    yield from (GONE, None, "x", math.nan, math.inf, -1, 10**30, 10**9, 2, 0.5, True)
    yield from ([], {}, [[1]], torch.zeros(0))
    if isinstance(value, torch.Tensor):
        yield from (value[..., :-1] if value.dim() else torch.zeros(3), value.unsqueeze(0))
        yield from (value.to(torch.int64), value.to(torch.complex64), value.to(torch.bool))
        yield from (torch.full_like(value.float(), math.nan), value.to("meta"), value.double())
        yield torch.cat([value, value], -1) if value.dim() else torch.ones(1)
    elif isinstance(value, list):
        yield from (value + value[-1:], value[:-1], value[::-1], tuple(value))
    elif isinstance(value, int):
        yield from (value + 1, value - 1, float(value), 1000 * value + 7, not value, str(value))


WALKS = {
    "SGD": (SMALL, {}),
    "Adam, observed": (SMALL, {"optimizer": "Adam"}),
    "columns": (SMALL | {"layout": "columns", "history_dtype": "bfloat16"}, {}),
    "residual": (SMALL | {"safeguard": "residual", "average_window": 3}, {}),
    "gate": (SMALL | {"noise_gate": 0.01}, {"noisy": True, "passes": 2}),
}


@pytest.mark.parametrize("name", WALKS)
def test_damage_anywhere_is_refused_or_does_no_harm(name):
    """Every place in a state, changed at random: the state is what it was, or training goes on."""
    config, how = WALKS[name]
    observe = "observed" in name

    def fresh():
        return Run(None, config, **how).train(10, observe)

    saved = Run(None, config, **how).train(13, observe)
    state = saved.opt.consolidate_state_dict()
    weights = saved.model.state_dict()
    random = np.random.default_rng(list(WALKS).index(name))
    run, refused = fresh(), 0
    before = everything(run)
    for path, value in paths_of(state):
        if path[-1] == "capturable":  # torch itself says that there has to be a GPU
            continue
        found = list(mutations_of(value))
        for i in random.choice(len(found), 1):
            bad = changed(state, path, found[i])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run.opt.load_state_dict(bad)
            except CheckpointError:
                refused += 1
                assert_same(everything(run), before)
                continue
            run.model.load_state_dict(copy.deepcopy(weights))
            run.k = 13
            run.train(20, observe)
            everything(run)
            if path[0] != "param_groups":  # other settings may be bad ones
                assert run.weights().isfinite().all(), (path, found[i])
            run = fresh()
    assert refused > 60
    assert_same(everything(run.train(20, observe)), everything(fresh().train(20, observe)))


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


def test_missing_parts_are_named():
    parts = run_ranks(3, lambda comm: Run(comm).train(20).opt.sharded_state_dict())
    with pytest.raises(CheckpointError, match="rows 11 to 21 of 32 are missing"):
        checkpoint.merge_shards([parts[0], parts[2]])
    with pytest.raises(CheckpointError, match=r"parts=\[\]"):
        checkpoint.merge_shards([])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.merge_shards([{"anderson": {"history": {"own": {}, "rows": 3}}}])
    columns = {"layout": "columns", "history_depth": 4}
    parts = run_ranks(2, lambda comm: Run(comm, columns).train(20).opt.sharded_state_dict())
    with pytest.raises(CheckpointError, match=r"of column [01], counted from the oldest"):
        checkpoint.merge_shards(parts[:1])


def test_a_state_of_the_format_before():
    run = Run(None).train(20)
    state = run.opt.state_dict()
    new = {name: state["anderson"][name] for name in ("config", "counters")}
    state["anderson"] = new | {"format": 1}
    run.opt.load_state_dict(state)
    assert run.opt.anderson.stats.steps == 20
    assert run.opt.anderson.columns == 0


# Files


def test_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    state = {"x": torch.arange(5), "y": [1, (2.5, None)], "z": {"a": "b"}}
    checkpoint.save(path, state)
    assert_same(checkpoint.load(path), state)
    assert torch.load(path, weights_only=True)["y"] == state["y"], "plain torch reads it, too"

    def full(*arguments):
        arguments[1].write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(path, {"x": 1})
    assert_same(checkpoint.load(path), state)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_files_that_are_none(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="folder"):
        checkpoint.load(tmp_path)
    run = Run(None).train(20)
    checkpoint.save(path, run.opt.consolidate_state_dict())
    data = path.read_bytes()
    for end in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="cannot read"):
            checkpoint.load(path)
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(path)
    torch.save({"model": 1}, path)
    with pytest.raises(CheckpointError, match="not written by"):
        checkpoint.load(path)
    torch.save({"aadl_hvd_file": 99}, path)
    with pytest.raises(CheckpointError, match=r"format of .*=99"):
        checkpoint.load(path)
    torch.save(Run, path)  # a class: to load it would run code
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"x": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    place = data.index(np.arange(1000, dtype=np.float32).tobytes()) + 1234
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(path)


def test_torchs_distributed_checkpoint_takes_a_part(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    run = Run(None).train(20)
    part = run.opt.sharded_state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(part, checkpoint_id=tmp_path, no_dist=True)
        found = Run(None).train(20).opt.sharded_state_dict()
        for tensor in found["anderson"]["history"]["columns"].values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(math.nan)
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert_same(found, part)
