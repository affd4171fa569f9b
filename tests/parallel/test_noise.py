"""The noise of the mean gradient as real ranks measure it; also on one rank with micro-batches."""

import contextlib
import dataclasses

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from training import assert_replicas_equal, unless_brief

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
from aadl_hvd.core.noise import NoiseMeter
from aadl_hvd.optim import coordinates

DOUBLE = torch.float64
# Measures in every step and accelerates in none.
MEASURE = AndersonConfig(
    method="residual", frequency=1, history_depth=3, noise_gate=1e30, averages=()
)
ALONE = hvd.size() == 1
PASSES = 2 if ALONE else 1  # one rank needs micro-batches


@pytest.fixture
def measured(monkeypatch):
    """What NoiseMeter.variance has said, step by step."""
    found, original = [], NoiseMeter.variance
    monkeypatch.setattr(
        NoiseMeter,
        "variance",
        staticmethod(lambda *a: found.append(original(*a)) or found[-1]),
    )
    return found


class Regression:
    """Linear in a table of features and a dense layer; 200 samples, in mini-batches of 5."""

    BATCH, SAMPLES = 5, 200

    def __init__(self, sparse=False):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(self.SAMPLES, 6, generator=generator, dtype=DOUBLE)
        self.word = torch.randint(7, (self.SAMPLES,), generator=generator)
        self.y = torch.randn(self.SAMPLES, generator=generator, dtype=DOUBLE)
        torch.manual_seed(4)
        self.model = torch.nn.ModuleDict(
            {"table": torch.nn.Embedding(7, 3, sparse=sparse), "dense": torch.nn.Linear(6, 3)}
        ).double()
        self.generator = torch.Generator().manual_seed(10 + hvd.rank())

    def batch(self):
        return torch.randint(self.SAMPLES, (self.BATCH,), generator=self.generator)

    def loss(self, chosen, dense=True):
        out = self.model["table"](self.word[chosen])
        if dense:
            out = out + self.model["dense"](self.x[chosen])
        return (out.sum(dim=1) - self.y[chosen]).square().mean()

    def own_gradient(self, batches, **how):
        """Of this rank alone, over all parameters."""
        parameters = list(self.model.parameters())
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=DOUBLE)
        for chosen in batches:
            grads = torch.autograd.grad(self.loss(chosen, **how), parameters, allow_unused=True)
            pieces = [
                torch.zeros_like(p) if g is None else g.to_dense()
                for p, g in zip(parameters, grads, strict=True)
            ]
            total += torch.cat([g.reshape(-1) for g in pieces])
        return total

    def true_variance(self):
        """Of the gradient of one sample, drawn at random, at the weights in place."""
        return float(
            torch.stack([self.own_gradient([[i]]) for i in range(self.SAMPLES)])
            .var(dim=0, correction=0)
            .sum()
        )


def wrapped(problem, rate=1e-6, config=MEASURE, **arguments):
    arguments = {"backward_passes_per_step": PASSES} | arguments
    return DistributedAndersonOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=rate),
        named_parameters=problem.model.named_parameters(),
        anderson=config,
        **arguments,
    )


@pytest.mark.parametrize("passes", [PASSES, *unless_brief(2, 3)[1:]])
def test_it_is_the_true_variance(measured, passes):
    problem = Regression()
    opt = wrapped(problem, backward_passes_per_step=passes)
    steps = 200
    for _ in range(steps):
        opt.zero_grad()
        for _ in range(passes):
            problem.loss(problem.batch()).backward()
        opt.step()
    assert len(measured) == steps - 1 and None not in measured
    found = np.mean([variance for variance, _ in measured])
    expected = passes * problem.true_variance() / (problem.BATCH * hvd.size())
    assert found == pytest.approx(expected, rel=0.2)
    assert opt.anderson.stats.accelerated == 0


ARGUMENTS = {
    "Average": {},
    "Sum": {"op": hvd.Sum},
    "predivide": {"gradient_predivide_factor": 2.0},
    "fp16": {"compression": hvd.Compression.fp16},
    "groups": {"groups": 1},
    "two passes": {"backward_passes_per_step": 2},
    "clipping": {},
    "closures": {},
    "sparse": {},
    "sparse as dense": {"sparse_as_dense": True},
    "unused on some ranks": {},
    "unused on all ranks": {},
    "left out by GradScaler": {},
}


@pytest.mark.skipif(ALONE, reason="about the gradients of several ranks")
@pytest.mark.parametrize("case", ARGUMENTS)
def test_formula(measured, case):
    """sigma^2 = (1/S) mean_i |d_i(k) - d_i(k-1)|^2 / (2 (1 - 1/S)), of gradients put together."""
    problem = Regression(sparse=case.startswith("sparse"))
    arguments = ARGUMENTS[case]
    passes, size = arguments.get("backward_passes_per_step", 1), hvd.size()
    opt = wrapped(problem, rate=1e-2, **arguments)
    deviations, expected = [], []
    for k in range(6):
        batches = [problem.batch() for _ in range(passes)]
        unused = case == "unused on all ranks" and k % 2 == 1
        unused = unused or (case == "unused on some ranks" and hvd.rank() == 0)
        everybody = torch.from_numpy(
            np.stack(hvd.allgather_object(problem.own_gradient(batches, dense=not unused).numpy()))
        )
        opt.zero_grad()

        def backward(batches=batches, unused=unused):
            for chosen in batches:
                loss = problem.loss(chosen, dense=not unused)
                loss.backward()
            return loss

        factor = size if case == "Sum" else 1.0
        if case == "closures":
            opt.step(backward)
        elif case == "clipping":
            backward()
            opt.synchronize()
            norm = torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 0.5 + 0.1 * k)
            factor = min(1.0, (0.5 + 0.1 * k) / (float(norm) + 1e-6))  # as torch has it
            with opt.skip_synchronize():
                opt.step()
        elif case == "left out by GradScaler" and k == 2:
            backward()
            opt.synchronize()  # and step() is not called
            opt._synchronized = False
            continue
        else:
            backward()
            opt.step()
        deviations.append(factor * (everybody - everybody.mean(dim=0)))
        if len(deviations) > 1:
            change = (deviations[-1] - deviations[-2]).square().sum() / size
            expected.append(float(change) / size / (2 * (1 - 1 / size)))
    near = 1e-2 if case == "fp16" else 1e-8
    np.testing.assert_allclose([variance for variance, _ in measured], expected, rtol=near)
    # The norm is that of the gradient the optimizer was given.
    final = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.to_dense().reshape(-1)
         for p in problem.model.parameters()]
    )  # fmt: skip
    assert measured[-1][1] == pytest.approx(float(final.double().square().sum()), rel=near)
    assert_replicas_equal(problem.model)


@pytest.mark.skipif(ALONE, reason="about the gradients of several ranks")
@pytest.mark.parametrize("layout", ["rows", "columns", "groups"])
def test_formula_of_a_sample_of_coordinates(measured, layout, shard_groups, monkeypatch):
    """sigma^2 of each rank's own coordinates, over their square, times that of all."""
    monkeypatch.setattr(coordinates, "TENSORS", 2)
    monkeypatch.setattr(coordinates, "NUMBERS", 20)
    monkeypatch.setattr(NoiseMeter, "ALIKE", 1.1)  # so few numbers may be alike by chance
    problem, size, settings = Regression(), hvd.size(), {"layout": layout}
    if layout == "groups":
        settings = {"shard_group": next(group for group in shard_groups if group.included())}
    opt = wrapped(problem, rate=1e-2, config=dataclasses.replace(MEASURE, **settings))
    sizes = [p.numel() for p in problem.model.parameters()]
    firsts = np.cumsum([0, *sizes])
    draws = [coordinates.draw(sizes, i, size) for i in range(size)]
    assert all(0 < sum(piece.count for piece in own) < sum(sizes) for own in draws)

    def weighted(vector, own):
        """The square of a vector, as it is estimated from some pieces."""
        parts = [vector[firsts[p.index] : firsts[p.index + 1]][p.start :: p.stride] for p in own]
        return sum(p.weight * part.square().sum() for p, part in zip(own, parts, strict=True))

    deviations, expected, squares = [], [], []
    for _ in range(6):
        chosen = problem.batch()
        everybody = torch.from_numpy(
            np.stack(hvd.allgather_object(problem.own_gradient([chosen]).numpy()))
        )
        opt.zero_grad()
        problem.loss(chosen).backward()
        opt.step()
        mean = everybody.mean(dim=0)
        deviations.append(everybody - mean)
        if len(deviations) > 1:
            changes = deviations[-1] - deviations[-2]
            of_sample = sum(map(weighted, changes, draws)) / size**2 / (2 * (1 - 1 / size))
            its_square = sum(weighted(mean, own) for own in draws) / size
            squares.append(float(mean.square().sum()))
            expected.append(float(of_sample / its_square) * squares[-1])
    np.testing.assert_allclose(measured, np.transpose([expected, squares]), rtol=1e-8)
    assert_replicas_equal(problem.model)


def test_a_fixed_partition_has_no_noise(measured):
    problem = Regression()
    opt = wrapped(problem, rate=1e-12)
    batches = [problem.batch() for _ in range(PASSES)]
    for _ in range(4):
        opt.zero_grad()
        for chosen in batches:
            problem.loss(chosen).backward()
        opt.step()
    assert len(measured) == 3
    assert all(variance < 1e-15 * squared for variance, squared in measured)


def test_frozen_and_added_parameters(measured):
    problem = Regression()
    config = AndersonConfig(frequency=1, history_depth=3, noise_gate=1e30)
    problem.model["dense"].bias.requires_grad_(False)
    opt = wrapped(problem, config=config)
    extra = torch.nn.Parameter(torch.zeros(3, dtype=DOUBLE))

    def run(steps):
        for _ in range(steps):
            opt.zero_grad()
            for _ in range(PASSES):
                (problem.loss(problem.batch()) + (extra * 0.5).sum()).backward()
            opt.step()

    run(3)
    assert len(measured) == 2 and None not in measured
    opt.add_param_group({"params": [extra]})
    problem.model["dense"].bias.requires_grad_(True)
    run(5)
    problem.model["dense"].weight.requires_grad_(False)
    problem.model["dense"].weight.grad = None
    run(5)
    assert measured[-1] is not None
    assert sum(found is None for found in measured) <= 2
    assert_replicas_equal(problem.model)


@pytest.mark.skipif(ALONE, reason="about a part of the ranks")
def test_one_rank_in_a_process_set_with_micro_batches(measured, all_but_rank_0):
    """Two ranks: each is by itself; with three, two of them measure together."""
    problem = Regression()
    opt = wrapped(problem, backward_passes_per_step=3, process_set=all_but_rank_0)
    for _ in range(60):
        opt.zero_grad()
        for _ in range(3):
            problem.loss(problem.batch()).backward()
        opt.step()
    assert len(measured) == 59 and None not in measured
    alone = hvd.rank() == 0 or hvd.size() == 2
    expected = 3 * problem.true_variance() / problem.BATCH / (1 if alone else hvd.size() - 1)
    found = np.mean([variance for variance, _ in measured])
    assert found == pytest.approx(expected, rel=0.3)


def test_gate_on_digits():
    """Open on full batches split over ranks, shut on small ones."""
    data = load_digits()
    images, labels = torch.tensor(data.data / 16.0), torch.tensor(data.target)
    parts = torch.arange(len(labels)).chunk(hvd.size() * PASSES)
    mine = parts[hvd.rank() * PASSES : (hvd.rank() + 1) * PASSES]
    for batch in (None, 8):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10).double()
        generator = torch.Generator().manual_seed(hvd.rank())
        opt = DistributedAndersonOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.5 / PASSES),
            model.named_parameters(),
            backward_passes_per_step=PASSES,
            anderson=AndersonConfig(method="residual", safeguard="none"),
        )
        for _ in range(40):
            opt.zero_grad()
            for part in mine:
                if batch is not None:
                    part = torch.randint(len(labels), (batch,), generator=generator)
                torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            opt.step()
        stats = opt.anderson.stats
        if batch is None:
            assert stats.rejected["noise"] == 0 and stats.accelerated == 20
            assert stats.batch_factor < 0.5
        else:
            assert stats.rejected["noise"] >= 17
            assert stats.batch_factor > 1.0
        assert_replicas_equal(model)
        everybody = hvd.allgather_object((stats.noise_variance, stats.signal, stats.counters()))
        assert everybody.count(everybody[0]) == hvd.size()


def test_no_gate_and_adasum_take_no_samples():
    problem = Regression()
    opt = wrapped(problem, config=AndersonConfig(noise_gate=None))
    assert opt.anderson_engine.problem.samples is None
    if hvd.size() == 2 and hvd.mpi_enabled():
        config = AndersonConfig(residual="step")
        with contextlib.suppress(UserWarning):
            opt = wrapped(Regression(), config=config, op=hvd.Adasum)
        assert opt.anderson_engine.problem.samples is None


LOOPS = ["step", "synchronize first", "closure", "observed"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_every_attempt_has_samples(measured, p, loop):
    """Wherever in the step the gradients are reduced, and however far apart attempts are."""
    problem = Regression()
    config = AndersonConfig(frequency=p, history_depth=3, noise_gate=1e30, averages=())
    opt = wrapped(problem, config=config, backward_passes_per_step=PASSES)
    steps = 4 * p

    def evaluate():
        opt.zero_grad()
        for _ in range(PASSES):
            loss = problem.loss(problem.batch())
            loss.backward()
        return loss

    for _ in range(steps):
        if loop == "closure":
            opt.step(evaluate)
            continue
        loss = evaluate()
        if loop == "observed":
            opt.observe(loss)
        if loop == "synchronize first":
            opt.synchronize()
            with opt.skip_synchronize():
                opt.step()
        else:
            opt.step()
    attempts = 4 - (p == 1)  # with p = 1 the first has no two pairs yet, nor a step before it
    assert len(measured) >= attempts - 1
    known = [both for both in measured if both is not None]
    assert len(known) >= attempts - 1, measured
    assert all(variance > 0 for variance, _ in known)
    assert opt.anderson.stats.accelerated == 0
