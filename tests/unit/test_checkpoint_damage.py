"""What does not fit is refused and changes nothing; damage anywhere does no harm."""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from checkpointing import (
    GONE,
    GROUP,
    SMALL,
    START,
    Run,
    assert_same,
    changed,
    everything,
)

from aadl_hvd import AndersonConfig, AndersonOptimizer, CheckpointError
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.loss_check import LossCheck
from aadl_hvd.stats import Stats

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
        r"shard of rank 1 of 2, rows 16 to 31, and this rank needs 0 to 31": part,
        "different number of parameter groups": torchs,  # torch's own error
        r"format of .*: 7. Must be 6: .* a newer version": damaged(
            state, lambda a: a.update(format=7)
        ),
        "format of .*: 'x'": damaged(state, lambda a: a.update(format="x")),
        "damaged.*counters": damaged(state, lambda a: a.pop("counters")),
        "damaged": damaged(state, lambda a: a["history"].pop("trial")),
        "damaged.*contradict": damaged(state, lambda a: a["history"]["columns"].update(stored=2)),
        "n=33 numbers": damaged(state, lambda a: a["history"]["sharding"].update(n=33)),
        r"\[2, 5\].*Must be of shape \[2, 32\]": damaged(
            state, lambda a: a["history"]["columns"].update(pair=torch.zeros(2, 5))
        ),
        "lacks 1 col": damaged(state, lambda a: without_a_column(a["history"]["columns"])),
    }
    for section in ("columns", "gram", "averages", "losses", "backoff"):
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


def test_each_tensor_is_copied_once(monkeypatch):
    """A base step on trial, which two hold; a load that is refused puts it back."""
    run = Run(None).train(20, observe=True)
    anderson = run.opt.anderson
    while anderson._acceptance.losses.trial is None:
        run.train(run.k + 1, observe=True)
    assert anderson._acceptance.losses.trial is anderson._acceptance.base_rows()
    to, copied = torch.Tensor.to, []

    def counted(tensor, *args, **kwargs):
        copied.extend([tensor.data_ptr()] * (tensor.numel() > 0))
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", counted)
        put_back = anderson.backup()
    rows = anderson._acceptance.base_rows()
    before = rows.clone()
    assert rows.data_ptr() in copied
    assert len(copied) == len({*copied})
    anderson.reset()
    rows.zero_()
    put_back()
    assert anderson._acceptance.losses.trial is rows and torch.equal(rows, before)


HISTORY = "anderson", "history"
COLUMNS, GRAM, AVERAGES, BACKOFF = (
    (*HISTORY, name) for name in ("columns", "gram", "averages", "backoff")
)
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
    (*HISTORY, "calls"): [math.nan, -(10**9), "x", 1.0],
    (*COLUMNS, "stored"): [math.nan, math.inf, 12.0, 3, 0],
    (*COLUMNS, "last"): [2, "x", True, 1.0],
    (*HISTORY, "noise"): ["x", math.nan, 2],
    (*HISTORY, "noise", "share"): ["x", math.nan, 2],
    (*HISTORY, "window"): [2, "x", {}, {"pushed": 2, "iterates": torch.zeros(3, 32)}],
    AVERAGES: [None, {}],
    **{(*AVERAGES, name): [GONE] for name in ("decays", "every", "gains", "measured")},
    (*AVERAGES, "count"): [GONE, -1, None],
    (*AVERAGES, "gains"): [[0.0], [math.nan] * 4],
    BACKOFF: [[], None, {}],
    (*BACKOFF, "left_out"): [10**9, math.inf],
    (*BACKOFF, "following"): [10**9, 0],
    (*BACKOFF, "rejected"): [math.nan],
    (*HISTORY, "losses"): [{}, None],
    (*HISTORY, "losses", "verdict_due"): [1, None],
    (*GRAM, "fresh"): [[9], [-1], [0, 0], ["x"], None],
    (*GRAM, "matrix"): [
        *(torch.full((4, 4), math.nan).double(), torch.ones(4, 4), -torch.ones(4, 4).double()),
        torch.ones(4, 4).double().triu(),
    ],
    (*AVERAGES, "means"): [GONE, None, torch.zeros(2, 32), torch.full((1, 2, 32), math.nan)],
    (*COLUMNS, "pair"): [GONE, torch.zeros(2, 31), torch.zeros(2, 32).long(), None],
    (*HISTORY, "unheard of"): [torch.zeros(32)],
    (*COLUMNS, "index"): [[3, 2, 1, 0], [0, 1, 2, 3.0], [0, True, 2, 3], [0, 0, 2, 3]],
    (*COLUMNS, "y"): [
        *(torch.zeros(4, 32, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64)),
        *(torch.zeros(4, 32).to_sparse(), torch.zeros(4, 32, device="meta")),
        torch.zeros(4, 32).double(),
    ],
    (*COLUMNS, "r"): [torch.zeros(4, 31), torch.zeros(4, 33), torch.zeros(3, 32)],
    (*COLUMNS, "weights"): [torch.zeros(3).double(), torch.zeros(4), None],
    (*COLUMNS, "scales"): ["x", torch.zeros(2, 4)],
    (*GRAM, "products"): ["x", torch.zeros(4, 9).double()],
    **{(*HISTORY, name): [None, "x", -1] for name in ("ranks", "own")},
    (*HISTORY, "trial"): ["x", -1, {}, {"base": None, "residual": None, "loss": True}],
    OWN: ["x", {}, 5],
    (*OWN, "noise"): [None, {}, "x"],
    (*OWN, "noise", "call"): [None, "x", math.nan],
    (*OWN, "noise", "changes"): [[(1, 2)], [1], None],
    (*OWN, "losses", "variances"): ["x", [math.nan], [-1.0]],
    (*OWN, "losses", "last_difference"): ["x", []],
}


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


def test_nonsense_on_one_of_two_ranks_is_no_pending():
    """It would come up in the first step, in a collective."""

    def program(comm):
        state = comm.allgather_object(Run(comm, SMALL).train(13).opt.consolidate_state_dict())[0]
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
    for place in (LossCheck, Stats):
        for cause, seen in raised.items():
            with monkeypatch.context() as patch:
                name = "load_state" if place is LossCheck else "load_measured"
                calls = itertools.count(place is LossCheck)  # Stats rehearses before

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
