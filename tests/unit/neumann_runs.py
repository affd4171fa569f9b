"""The paper's formulas of the Neumann optimizer, and short runs of it."""

import numpy as np
import torch

from aadl_hvd import NeumannOptimizer

SHAPES = [(3, 2), (4,), (2, 1, 2), ()]
COUNTERS = ("step", "t", "reset_at", "period")
# Resets at t = 1, 3, 7, 15, warm-up of 2 steps.
SHORT = {"steps_per_epoch": 2, "warmup_epochs": 1, "reset_epochs": 1}


def oracle(weights, gradients, lr, *, steps_per_epoch, variables="parameters", **settings):
    """The formulas for one vector w in float64; lr(step), resets by their closed form.

    Returns w, v, m, and w - mu m after every step.
    """
    o = {"alpha": 1e-7, "beta": 1e-5, "gamma": 0.99, "mu_min": 0.5, "mu_max": 0.9}
    o |= {"warmup_epochs": 5, "reset_epochs": 10, "weight_decay": 0.0} | settings
    sizes = [w.size for w in weights]
    w = np.concatenate([w.reshape(-1) for w in weights]).astype(np.float64)
    beta = o["beta"] * (w.size if variables == "parameters" else len(sizes))
    warmup = round(o["warmup_epochs"] * steps_per_epoch)
    first = max(1, round(o["reset_epochs"] * steps_per_epoch))
    resets = {1 + first * (2**j - 1) for j in range(20)}
    v, m, found = w.copy(), np.zeros_like(w), []
    for k, g in enumerate(gradients, start=1):
        g, eta, t, mu = g + o["weight_decay"] * w, lr(k), k - warmup, 0.0
        if t < 1:
            w = w - eta * g
        else:
            mu = min(max(1 - 1 / (1 + t), o["mu_min"]), o["mu_max"])
            if t in resets:
                m, d = -eta * g, g
            else:
                delta = w - v
                norm = np.linalg.norm(delta)
                d = g
                if norm > 0:
                    d = g + (o["alpha"] * norm**2 - beta / norm**2) * delta / norm
                m = mu * m - eta * d
            w = w + mu * m - eta * d
        v = w + o["gamma"] * (v - w)
        found.append((w, v, m, w - mu * m))
    return found


def problem(steps, dtype=torch.float64, seed=0):
    """Parameters and, for every step, one flat gradient."""
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=shape) for shape in SHAPES]
    n = sum(w.size for w in weights)
    return (
        [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights],
        list(generator.normal(size=(steps, n))),
    )


def set_gradients(parameters, flat):
    offset = 0
    for p in parameters:
        part = torch.as_tensor(flat[offset : offset + p.numel()])
        p.grad = part.reshape(p.shape).to(p.dtype)
        offset += p.numel()


def run(opt, parameters, gradients):
    for flat in gradients:
        set_gradients(parameters, flat)
        opt.step()


def joined(tensors):
    return np.concatenate([t.detach().double().numpy().reshape(-1) for t in tensors])


def state_of(opt, parameters, name):
    return joined([opt.state[p][name] for p in parameters])


def counters(opt, p):
    return tuple(opt.state[p][name] for name in COUNTERS)


def assert_same(found, expected):
    """State dicts, bit for bit."""
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert entry.keys() == found["state"][key].keys()
        for name, value in entry.items():
            other = found["state"][key][name]
            assert torch.equal(other, value) if torch.is_tensor(value) else other == value


def compare(steps, lr=0.05, rtol=1e-9, dtype=torch.float64, seed=0, **settings):
    parameters, gradients = problem(steps, dtype, seed)
    weights = [p.detach().double().numpy().copy() for p in parameters]
    opt = NeumannOptimizer(parameters, lr, **settings)
    for k, expected in enumerate(oracle(weights, gradients, lambda _: lr, **settings)):
        run(opt, parameters, gradients[k : k + 1])
        found = joined(parameters), *(state_of(opt, parameters, name) for name in "vm")
        for a, b in zip((*found, joined(opt.evaluated_parameters())), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=f"step {k + 1}")
    return opt, parameters
