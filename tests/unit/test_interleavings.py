"""Any order of what a training loop may do, against the dense textbook: a stateful property test.

Steps, clipped steps, steps left out, other learning rates, new parameters, bad numbers, saving with
and without the history, loading into the same optimizer and into a new one: hypothesis draws the
order, on one rank and on several, and every weight after every command is the oracle's.
"""

import copy

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadl_hvd import AndersonConfig, AndersonOptimizer
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core.accelerator import Accelerator

SHAPES = ((4,), (2, 3), (3,), (5,))  # the last two join later
GROUPS = 2
LR = 0.2
START = np.random.default_rng(5).standard_normal(sum(int(np.prod(s)) for s in SHAPES))
CURVATURE = np.linspace(0.2, 1.0, len(START))


def noise(k):
    """Of a size that keeps the least squares well-conditioned."""
    return np.random.default_rng(1000 + k).standard_normal(len(START))


def length(groups):
    return sum(int(np.prod(shape)) for shape in SHAPES[:groups])


class Oracle:
    """Anderson acceleration of SGD with momentum, dense and from the formulas."""

    def __init__(self, m, p, q, momentum, safeguard):
        self.m, self.p, self.q, self.momentum, self.safeguard = m, p, q, momentum, safeguard
        self.groups, self.lr, self.k = GROUPS, LR, 0
        self.w = START[: length(GROUPS)].copy()
        self.v = np.zeros_like(self.w)
        self.forget()

    def forget(self):
        self.columns, self.last = [], None

    def grow(self):
        self.w = np.append(self.w, START[len(self.w) : length(self.groups + 1)])
        self.v = np.append(self.v, np.zeros(len(self.w) - len(self.v)))
        self.groups += 1
        self.forget()

    def step(self, g):
        self.k += 1
        w, r = self.w, -g
        self.v = self.momentum * self.v + g
        self.w = w - self.lr * self.v
        if self.k % self.q == 0:
            if self.last is not None:
                self.columns = [*self.columns, (w - self.last[0], r - self.last[1])][-self.m :]
            self.last = w, r
        if self.k % self.p or not self.columns:
            return
        W, R = (np.column_stack(side) for side in zip(*self.columns, strict=True))
        if not (np.isfinite(R).all() and np.isfinite(W).all() and np.isfinite(r).all()):
            return self.forget()
        gamma = np.linalg.lstsq(R, r)[0]
        move = -W @ gamma + self.lr / (1 - self.momentum) * (r - R @ gamma)
        if self.safeguard == "descent" and not move @ r > 0:
            kept = len(self.columns) // 2
            self.columns = self.columns[len(self.columns) - kept :]
            return
        self.w = w + move


class Training:
    """The same with the library, on one of several ranks."""

    def __init__(self, config, momentum, comm):
        self.config, self.momentum, self.comm = config, momentum, comm
        self.build(GROUPS)

    def build(self, groups):
        self.weights = []
        tensors = [self.weight(i) for i in range(groups)]
        opt = torch.optim.SGD(tensors[:GROUPS], lr=LR, momentum=self.momentum)
        for tensor in tensors[GROUPS:]:
            opt.add_param_group({"params": [tensor]})
        self.opt = AndersonOptimizer(opt, anderson=self.config)
        if self.comm is not None:
            self.opt.anderson = self.opt.anderson_engine.accelerator = Accelerator(
                self.config, self.comm
            )

    def weight(self, i):
        values = START[length(i) : length(i + 1)].reshape(SHAPES[i])
        self.weights.append(torch.nn.Parameter(torch.tensor(values)))
        return self.weights[-1]

    def grow(self):
        lr = self.opt.param_groups[0]["lr"]
        self.opt.add_param_group({"params": [self.weight(len(self.weights))], "lr": lr})

    def step(self, g):
        lo = 0
        for p in self.weights:
            p.grad = torch.tensor(g[lo : lo + p.numel()]).reshape(p.shape)
            lo += p.numel()
        self.opt.step()
        self.opt.zero_grad()

    def save(self, whole):
        state = self.opt.state_dict()
        if whole:
            state = self.opt.consolidate_state_dict()
            if self.comm is not None:
                state = self.comm.allgather_object(state)[0]
        return copy.deepcopy((state, [p.detach() for p in self.weights]))

    def load(self, saved, new):
        state, values = saved
        if new:
            self.build(len(values))
        with torch.no_grad():
            for p, value in zip(self.weights, values, strict=True):
                p.copy_(value)
        self.opt.load_state_dict(copy.deepcopy(state))
        if not new:
            self.opt.anderson.agree(self.opt.anderson_engine.problem)

    @property
    def w(self):
        return torch.cat([p.detach().reshape(-1) for p in self.weights]).numpy().copy()


COMMANDS = st.one_of(
    *[st.just("step")] * 5,
    st.just("clipped"),
    st.just("left out"),
    st.just("bad number"),
    st.just("grow"),
    st.tuples(st.just("rate"), st.sampled_from([0.5, 0.9, 1.5])),
    st.tuples(st.just("save"), st.booleans()),
    st.tuples(st.just("load"), st.booleans()),
)


def gradient(command, k, w):
    g = CURVATURE[: len(w)] * w + noise(k)[: len(w)]
    if command == "clipped":
        g *= min(1.0, 0.7 / np.linalg.norm(g))
    if command == "bad number":
        g[k % len(g)] = [np.nan, np.inf, -np.inf][k % 3]
    return g


def follow(commands, training, oracle):
    """Runs both; what they hold must be the same after every command."""
    saved = None
    for k, command in enumerate(commands):
        name, value = command if isinstance(command, tuple) else (command, None)
        if name in ("step", "clipped"):
            g = gradient(name, k, oracle.w)
            training.step(g)
            oracle.step(g)
        elif name == "bad number":  # found out too late: the user puts back what there was
            w, v = oracle.w.copy(), oracle.v.copy()
            momenta = copy.deepcopy(
                [training.opt.state[p].get("momentum_buffer") for p in training.weights]
            )
            values = [p.detach().clone() for p in training.weights]
            g = gradient(name, k, w)
            training.step(g)
            oracle.step(g)
            with torch.no_grad():
                for p, old, momentum in zip(training.weights, values, momenta, strict=True):
                    p.copy_(old)
                    training.opt.state[p]["momentum_buffer"] = momentum
            oracle.w, oracle.v = w, v
        elif name == "left out":
            training.opt.zero_grad()
        elif name == "grow":
            if oracle.groups < len(SHAPES):
                training.grow()
                oracle.grow()
        elif name == "rate":
            oracle.lr *= value
            for group in training.opt.param_groups:
                group["lr"] *= value
        elif name == "save":
            saved = training.save(whole=value), copy.deepcopy(oracle), value
        elif saved is not None and saved[1].groups == oracle.groups:
            state, then, whole = saved
            training.load(state, new=value)
            # Without the history the number of the step is this optimizer's own.
            k_here = 0 if value else oracle.k
            oracle.__dict__.update(copy.deepcopy(then).__dict__)
            if not whole:
                oracle.k = k_here
                oracle.forget()
        scale = np.abs(oracle.w).max()
        np.testing.assert_allclose(training.w, oracle.w, rtol=0, atol=1e-7 * scale, err_msg=name)
    return training.w, training.opt.anderson.stats.accelerated


@settings(max_examples=60, deadline=None)
@given(
    st.lists(COMMANDS, min_size=10, max_size=45),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(["none", "descent"]),
    st.sampled_from([(1, "rows"), (3, "rows"), (2, "columns")]),
)
def test_any_order_is_the_textbook_s(commands, p, q, momentum, safeguard, ranks):
    size, layout = ranks
    m = 3
    config = AndersonConfig(
        history_depth=m,
        frequency=p,
        store_every=q,
        mixing=1.0,
        averages=(),
        noise_gate=None,
        safeguard=safeguard,
        layout=layout,
    )

    def program(comm):
        training = Training(config, momentum, comm if size > 1 else None)
        return follow(commands, training, Oracle(m, p, q, momentum, safeguard))

    results = run_ranks(size, program)
    for weights, _ in results[1:]:
        assert np.array_equal(weights, results[0][0]), "replicas differ"


def test_the_commands_reach_what_they_are_for():
    """One order that has all of them, and accelerates before and after each."""
    steps = ["step"] * 6
    commands = []
    for command in (
        *("clipped", "left out", "bad number", ("rate", 0.5), "grow"),
        *(("save", True), ("load", False), ("load", True), ("save", False), ("load", True)),
    ):
        commands += [*steps, command]
    config = AndersonConfig(
        history_depth=3, frequency=2, mixing=1.0, averages=(), noise_gate=None, safeguard="none"
    )
    training = Training(config, 0.5, None)
    _, accelerated = follow([*commands, *steps], training, Oracle(3, 2, 1, 0.5, "none"))
    assert accelerated > 10
    assert training.opt.anderson.stats.resets["nonfinite"] >= 1
