"""Real ranks, each with its part of the data: both layouts are the textbook's and agree."""

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from problems import TEXTBOOK, Group, Problem, counts, flat, parameters_of
from reference import anderson

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

STEPS = 14
# Few tensors: each costs Horovod a negotiation a step. n = 23.
GROUPS = (
    Group(shapes=((4, 3),), lr=0.1, weight_decay=0.02),
    Group(shapes=((11,),), lr=0.4),
)


class Regression(Problem):
    """1/2N |X w - y_k|^2, the N rows of X and y_k split over the ranks; y_k changes with k."""

    N = 36  # divisible by 2, 3 and 4

    def __init__(self, groups=GROUPS, noise=1.0):
        super().__init__(groups)
        random = np.random.default_rng(7)
        self.X = random.standard_normal((self.N, self.n))
        self.y = random.standard_normal(self.N) + noise * random.standard_normal((200, self.N))

    def gradient(self, k, w):
        return self.X.T @ (self.X @ w - self.y[k % 200]) / self.N

    def run_here(self, config, steps, dtype):
        groups = [
            {"params": tensors, "lr": group.lr, "weight_decay": group.weight_decay}
            for tensors, group in zip(self.parameters(dtype), self.groups, strict=True)
        ]
        names = [(f"{i}.{j}", p) for i, g in enumerate(groups) for j, p in enumerate(g["params"])]
        opt = DistributedAndersonOptimizer(
            torch.optim.SGD(groups, lr=1.0), named_parameters=names, anderson=config
        )
        mine = slice(hvd.rank(), None, hvd.size())
        X, y = (torch.from_numpy(part).to(dtype) for part in (self.X[mine], self.y[:, mine]))
        path = [flat(opt)]
        for k in range(steps):
            opt.zero_grad()
            w = torch.cat([p.reshape(-1) for p in parameters_of(opt)])
            (0.5 * (X @ w - y[k % 200]).square().mean()).backward()
            opt.step()
            path.append(flat(opt))
        return np.array(path), opt


def assert_same_on_all_ranks(path, count, name):
    gathered = hvd.allgather(torch.from_numpy(path)[None], name=f"path.{name}")
    for rank in range(hvd.size()):
        assert torch.equal(gathered[rank], torch.from_numpy(path)), f"rank {rank} has other bits"
    assert hvd.allgather_object(count) == [count] * hvd.size()


CASES = {
    "default": {"history_depth": 5, "safeguard": "descent", "residual": "gradient"},
    "all of it": {
        "history_depth": 4,
        "frequency": 3,
        "store_every": 2,
        "relaxation": 0.6,
        "mixing": 0.8,
        "warmup_steps": 2,
        "safeguard": "residual",
        "residual": "step",
        "average_window": 3,
        "average_threshold": 0.5,
    },
    "fewer columns than ranks": {"history_depth": 1, "frequency": 2, "safeguard": "none"},
    "often": {"history_depth": 4, "frequency": 1, "safeguard": "none"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_layouts_are_the_textbook_s(name, dtype):
    problem = Regression()
    paths = {}
    for layout in ("rows", "columns"):
        config = AndersonConfig(**TEXTBOOK | CASES[name], layout=layout)
        path, opt = problem.run_here(config, STEPS, dtype)
        assert_same_on_all_ranks(path, counts(opt), "layouts")
        paths[layout] = path
        expected = anderson(
            problem.sgd,
            problem.start,
            STEPS,
            m=config.history_depth,
            p=config.frequency,
            q=config.store_every,
            beta=config.relaxation,
            mixing=config.mixing,
            warmup=config.warmup_steps,
            residual=problem.residual if config.residual == "gradient" else None,
            scaling=problem.scaling if config.residual == "gradient" else None,
            state=np.zeros(problem.n),
            safeguard=config.safeguard,
            window=config.average_window,
            threshold=config.average_threshold,
        )
        assert expected.counts["accelerated"] > 1
        assert counts(opt) == expected.counts
        near = 1e-11 if dtype == torch.float64 else 2e-5
        size = np.abs(expected.path).max()
        assert np.abs(path - expected.path).max() < near * size
        if layout == "rows" and config.average_window is None:
            rows = -(-problem.n // hvd.size())
            width = torch.finfo(dtype).bits // 8
            assert opt.anderson.history_bytes <= width * rows * (2 * config.history_depth + 4)
    assert np.abs(paths["rows"] - paths["columns"]).max() < near * size


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_replicas_bitwise_equal_after_100_steps(layout):
    problem = Regression(noise=0.01)
    config = AndersonConfig(**TEXTBOOK, layout=layout, average_window=4)
    path, opt = problem.run_here(config, 100, torch.float32)
    assert counts(opt)["accelerated"] > 10
    assert counts(opt)["averaged"] > 10
    assert_same_on_all_ranks(path, counts(opt), "replicas")
