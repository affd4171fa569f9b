"""`core.collectives` lists every collective of a step: compared with what steps really send."""

import contextlib
import functools
import warnings

import numpy as np
import pytest
import torch
from problems import PLAIN, TEXTBOOK, Problem, flat, parameters_of

from aadl_hvd import AndersonConfig
from aadl_hvd.comm.base import Communicator
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import gram
from aadl_hvd.core.collectives import LISTED, Collectives

M, N, SIZE = 3, 23, 3
# What a rank sends, for the settings below: n = 23 in blocks of 8, no averages.
NUMBERS = {
    "agree": {9},
    "loss_verdict": {4},
    "residual_verdict": {2},
    "reduction": {(M + 1) * M + 21},
    "block": {260},
    "jump": {12},
    "growth": {16},
    "product": {M},
    "coefficients": {M},
    "slope": {1},
    "closure_loss": {1},
    "update": {N},
    "weights": {8},
    "jump_later": {8},
    "average_spread": {3},
    "all_objects": {0},
    "from_one_rank": {N},
}


class Recorder(Communicator):
    """A communicator that notes (kind, length) of every operation."""

    def __init__(self, comm, found):
        self.comm, self.found = comm, found
        self.rank, self.size = comm.rank, comm.size

    def allreduce(self, values, op="sum"):
        self.found.append(({"sum": "allreduce", "max": "maximum"}[op], len(values)))
        return self.comm.allreduce(values, op)

    def broadcast(self, values):
        self.found.append(("broadcast", len(values)))
        return self.comm.broadcast(values)

    def gather_by_pieces(self, block):
        self.found.append(("gather", len(block)))
        return self.comm.gather_by_pieces(block)

    def gather_later(self, block):
        self.found.append(("gather", len(block)))
        return self.comm.gather_later(block)

    def allgather(self, block):
        self.found.append(("gather", len(block)))
        return self.comm.allgather(block)

    def sum_tensor(self, tensor):
        self.found.append(("sum", len(tensor)))
        return self.comm.sum_tensor(tensor)

    def allgather_object(self, item):
        self.found.append(("object", 0))
        return self.comm.allgather_object(item)

    def _other(self, *_):
        raise AssertionError("an operation that is in no list")

    send = all_to_all = _other
    _allreduce_sum = _allreduce_max = _broadcast = _allgather = _sum_tensor = _other


def listed_calls(collectives, found):
    """Has an instance note the names of the listed methods that are called."""

    def noting(name, method):
        @functools.wraps(method)
        def call(*args):
            found.append(name)
            return method(*args)

        return call

    for name in LISTED:
        setattr(collectives, name, noting(name, getattr(collectives, name)))


CASES = {
    "observed": {},
    "columns, closure": {"layout": "columns", "safeguard": "loss"},
    "paper": {"safeguard": "residual", "residual": "step", "average_window": 2},
    "drift": {},
    "resync": {"on_desync": "resync"},
    "subspace": {"method": "subspace"},
    "overlap": {"method": "subspace", "overlap": True},
}


STEPS = dict.fromkeys(CASES, 14) | {"subspace": 40, "overlap": 40}


def steps_of(case, comm):
    """What a rank sent in a few steps: by the communicator, and by the list."""
    problem = Problem(PLAIN)
    settings = {**TEXTBOOK, "history_depth": M, "frequency": 2, "safeguard": "none"}
    config = AndersonConfig(**(settings | CASES[case]))
    sent, names = [], []
    opt = problem.optimizer(config, Recorder(comm, sent))
    listed_calls(opt.anderson._collectives, names)
    for k in range(STEPS[case]):
        if case == "resync" and k == 9 and comm.rank == 1:
            with torch.no_grad():
                parameters_of(opt)[0].add_(1.0)

        def closure(k=k):
            problem.set_gradient(opt, problem.gradient(k, flat(opt)))
            return float(problem.loss(k, flat(opt)))

        if case == "observed":
            opt.observe(float(k))  # it rises: points are rejected
        closure()
        step = functools.partial(opt.step, *([closure] if config.safeguard == "loss" else []))
        ignored = contextlib.nullcontext()
        if case == "resync":
            ignored = warnings.catch_warnings(action="ignore")
        with ignored:
            step()
    return sent, names


@pytest.fixture
def no_drift(monkeypatch):
    """R^T r is carried forward in four acceleration steps, and not in the next one."""
    monkeypatch.setattr(gram, "DRIFT", 1e9)
    calls, multiply = [], gram.Gram._multiply

    def counted(self, *args):
        calls.append(None)
        if len(calls) > 4 * SIZE:
            gram.DRIFT = 0.0
        return multiply(self, *args)

    monkeypatch.setattr(gram.Gram, "_multiply", counted)


@pytest.mark.parametrize("case", list(CASES))
def test_a_step_sends_what_is_listed(case, request):
    if case == "drift":
        request.getfixturevalue("no_drift")
    everybody = run_ranks(SIZE, functools.partial(steps_of, case))
    for sent, names in everybody:
        assert [kind for kind, _ in sent] == [LISTED[name].kind for name in names]
        for (_, numbers), name in zip(sent, names, strict=True):
            assert numbers in NUMBERS[name], name
        assert names == everybody[0][1], "ranks entered different collectives"
    wanted = {
        "observed": {"agree", "reduction", "coefficients", "slope", "weights", "loss_verdict"},
        "columns, closure": {"closure_loss", "update"},
        "paper": {"residual_verdict", "average_spread", "weights"},
        "drift": {"product"},
        "resync": {"all_objects", "from_one_rank"},
        "subspace": {"agree", "block", "jump", "growth", "weights"},
        "overlap": {"agree", "block", "jump", "growth", "jump_later"},
    }[case]
    assert wanted <= {*everybody[0][1]}


def test_every_listed_collective_is_one_of_the_class():
    assert {*LISTED} == {*NUMBERS}
    assert all(hasattr(Collectives, name) for name in LISTED)
    kinds = {"allreduce", "maximum", "broadcast", "gather", "sum", "object"}
    assert {entry.kind for entry in LISTED.values()} <= kinds
    assert np.all([entry.when and entry.numbers for entry in LISTED.values()])
