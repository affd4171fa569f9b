"""Runs that are saved and go on, for the tests of checkpoints."""

import copy

import torch

from aadl_hvd import AndersonConfig, AndersonOptimizer, NeumannOptimizer, checkpoint
from aadl_hvd.core.accelerator import Accelerator

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
    "slow SGD": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, nesterov=True),
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
            self.opt.anderson = self.opt.anderson_engine.accelerator = Accelerator(
                config, comm, group
            )
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
            return loaded.losses.verdict_due
        return anderson._acceptance.losses.verdict_due

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
        del part["sharding"]
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


def through_a_file(state, folder):
    checkpoint.save(folder / "state.pt", state)
    return checkpoint.load(folder / "state.pt")


# Where in a state_dict, and what stands there in place of what was saved; GONE: nothing.
GONE = object()
GROUP = "param_groups", 0


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
