"""The training problems: their mathematics, and that ranks' shares make up the whole."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate

from models.errors import UserError
from models.problems import PROBLEMS, build
from models.problems import burgers2d as two
from models.problems import burgers100d as hundred
from models.problems.admissions import FEATURES, HEADER, read_admissions
from models.problems.digits_mlp import split_digits


@pytest.fixture(scope="module")
def admissions_csv(tmp_path_factory):
    """A file like the published one, with invented students."""
    path = tmp_path_factory.mktemp("data") / "admissions.csv"
    write_admissions(path, np.random.default_rng(0).uniform(0, 1, (500, 8)))
    return path


def write_admissions(path, table, header=HEADER):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([number + 1, *row] for number, row in enumerate(table))


@pytest.fixture
def make(admissions_csv):
    def make(name, **arguments):
        options = {"csv": admissions_csv} if name == "admissions" else {}
        if name == "burgers100d":
            options["collocation"] = 64
        return build(name, **options | arguments)

    return make


def flat_gradient(problem, model, step):
    model.zero_grad()
    loss = problem.loss(model, step)
    loss.backward()
    pieces = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(pieces).double()


# All problems


# Batch norm sees a rank's own share.
WITHOUT_BATCH_NORM = [name for name in PROBLEMS if not name.startswith("digits_resnet")]


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_the_ranks_mean_is_the_global_loss(make, name):
    whole = make(name, seed=1)
    model = whole.make_model()
    for step in (0, 1, 40):
        expected, expected_gradient = flat_gradient(whole, model, step)
        for ranks in (2, 3):  # 3 leaves remainders: of 500, of 100, of 400
            found = [
                flat_gradient(make(name, seed=1, rank=rank, ranks=ranks), model, step)
                for rank in range(ranks)
            ]
            gradient = sum(g for _, g in found) / ranks
            assert np.mean([loss for loss, _ in found]) == pytest.approx(expected, rel=1e-5)
            error = (gradient - expected_gradient).norm() / expected_gradient.norm()
            assert error < 1e-4


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_seed_decides_everything(make, name):
    def trained(seed):
        problem = make(name, seed=seed, rank=0, ranks=2)
        torch.rand(1)  # where torch's own generator stands must not matter
        model = problem.make_model()
        optimizer = problem.make_optimizer(model)
        losses = []
        for step in range(2):
            for group in optimizer.param_groups:
                group["lr"] = problem.learning_rate(step) or group["lr"]
            optimizer.zero_grad()
            loss = problem.loss(model, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert trained(3) == trained(3)
    assert trained(3) != trained(4)


@pytest.mark.parametrize("name", PROBLEMS)
def test_measuring_changes_nothing(make, name):
    problem = make(name)
    model = problem.make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = problem.metrics(model)
    assert problem.metrics(model) == found
    assert {"training_loss"} <= set(found) and all(map(math.isfinite, found.values()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_full_batch_loss_is_the_training_loss(make, name):
    problem = make(name)
    smaller = any(batch in name for batch in ("-500-", "-100-", "-32-")) or name == "admissions"
    assert problem.full_batch != smaller
    if smaller:
        return
    model = problem.make_model()
    expected = problem.metrics(model)["training_loss"]
    assert problem.loss(model, 0).item() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_sees_each_image_once(make):
    problem = make("digits_mlp-100-sgd", seed=2)
    pixels = problem.train[0]
    for epoch in range(2):
        seen = torch.cat([problem._batch(epoch * 14 + i)[0] for i in range(14)])
        assert len(torch.unique(seen, dim=0)) == len(seen) == 1400 <= len(pixels)
    again = make("digits_mlp-100-sgd", seed=2)
    assert torch.equal(again._batch(30)[0], problem._batch(30)[0])
    assert not torch.equal(problem._batch(0)[0], problem._batch(14)[0])


def test_the_split_of_digits():
    train, validation = split_digits(5)
    assert len(train[0]) == 1497 and len(validation[0]) == 300
    assert train[0].min() == 0 and train[0].max() == 1
    assert not torch.equal(split_digits(6)[0][1], train[1])


def test_no_problem_without_a_share():
    with pytest.raises(ValueError, match="rank"):
        build("quadratic", rank=2, ranks=2)
    with pytest.raises(ValueError, match="batch"):
        build("digits_mlp-32-nesterov", rank=0, ranks=33)


def test_the_quadratic_is_as_ill_conditioned_as_it_says(make):
    A = make("quadratic").train[0]
    eigenvalues = torch.linalg.eigvalsh(A.T @ A / len(A))
    assert eigenvalues[-1] == pytest.approx(1)
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(1e4)


def test_learning_rates(make):
    assert [make("burgers2d").learning_rate(k) for k in (0, 499, 500, 1000)] == pytest.approx(
        [0.01, 0.01, 0.002, 0.0004]
    )
    assert make("burgers100d").learning_rate(1000) == pytest.approx(0.025)
    admissions = make("admissions")
    assert [admissions.learning_rate(k) for k in (9_999, 10_000)] == [0.02, 4e-3]


def test_settings_of_the_paper(make):
    assert make("admissions").paper.relaxation == 0.1
    assert make("burgers2d").paper.frequency == 10
    assert make("burgers100d").paper.history_depth == 20
    assert make("digits_resnet-full").paper.store_every == 5
    other = make("quadratic").paper
    assert (other.history_depth, other.frequency, other.store_every) == (10, 5, 1)
    assert (other.relaxation, other.average_window, other.average_threshold) == (1.0, 5, 0.1)
    assert (other.residual, other.safeguard) == ("step", "residual")


# Burgers in one dimension


def double_model(cls, *arguments):
    torch.manual_seed(0)
    model = cls(*arguments).double()
    for layer in model.layers:
        torch.nn.init.normal_(layer.bias, std=0.5)
    return model


@pytest.mark.parametrize("activation", two.ACTIVATIONS)
def test_derivatives_are_those_of_nested_autograd(activation):
    model = double_model(two.TaylorMLP, [2, 20, 20, 20, 1], activation)
    points = (2 * torch.rand(9, 2, dtype=torch.double) - 1).requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    by_xx = torch.zeros_like(u)
    if activation == "tanh":
        by_xx = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)[0][:, 0]
    expected = u, first[:, 0], first[:, 1], by_xx
    found = model.derivatives(points.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    same_gradients(model, expected, found)


def same_gradients(model, expected, found):
    """Of a loss that uses all four, by the parameters."""

    def gradients(of):
        loss = (of[2] + of[0] * of[1] - 0.3 * of[3]).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)

    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-10, atol=1e-12)


def quadrature(x, t):
    """The same solution from the integrals over y themselves, adaptively and in long doubles."""
    nu = two.VISCOSITY

    def exponent(y):
        return -math.cos(math.pi * y) / (2 * math.pi * nu) - (x - y) ** 2 / (4 * nu * t)

    y = np.linspace(x - 3, x + 3, 60_001)
    largest = max(map(exponent, y))
    weight = np.exp([exponent(v) - largest for v in y])
    peaks = y[weight > 1e-3]
    edges = [peaks.min() - 0.3, *np.linspace(peaks.min(), peaks.max(), 12), peaks.max() + 0.3]

    def total(factor):
        pieces = itertools.pairwise(edges)
        return sum(
            integrate.quad(
                lambda v: factor(v) * math.exp(exponent(v) - largest), *piece, epsabs=1e-15
            )[0]
            for piece in pieces
        )

    return total(lambda v: (x - v) / t) / total(lambda v: 1.0)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("x", [-0.9, -0.02, -1e-3, 0.0, 0.005, 0.1, 0.5])
def test_exact_solution_against_the_integrals_themselves(x, t):
    assert float(two.exact_solution(x, t)) == pytest.approx(quadrature(x, t), abs=2e-9)


def test_exact_solution_begins_and_ends_where_it_must():
    x = np.linspace(-1, 1, 101)
    np.testing.assert_allclose(two.exact_solution(x, 0.0), -np.sin(np.pi * x), atol=1e-14)
    near = two.exact_solution(x, 1e-6)
    np.testing.assert_allclose(near, -np.sin(np.pi * x), atol=1e-5)
    t = np.linspace(0, 1, 11)
    for edge in (-1.0, 0.0, 1.0):
        np.testing.assert_allclose(two.exact_solution(edge, t), 0, atol=1e-12)
    # The shock: the published slope at x = 0 is largest at t = 1.6037/pi, -152.00516.
    h = 1e-5
    slope = float(two.exact_solution(h, 1.6037 / math.pi)) / h
    assert slope == pytest.approx(-152.00516, rel=1e-4)


def test_exact_solution_satisfies_the_equation():
    x, t = np.meshgrid(np.array([-0.8, -0.3, -0.01, 0.004, 0.02, 0.6]), np.array([0.1, 0.5, 0.97]))

    def u(dx, dt):
        return two.exact_solution(x + dx, t + dt)

    h = 2e-4
    by_t = (u(0, h) - u(0, -h)) / (2 * h)
    by_x = (8 * (u(h, 0) - u(-h, 0)) - (u(2 * h, 0) - u(-2 * h, 0))) / (12 * h)
    by_xx = (16 * (u(h, 0) + u(-h, 0)) - (u(2 * h, 0) + u(-2 * h, 0)) - 30 * u(0, 0)) / (12 * h * h)
    residual = by_t + u(0, 0) * by_x - two.VISCOSITY * by_xx
    scale = np.abs(u(0, 0) * by_x) + np.abs(two.VISCOSITY * by_xx) + 1
    assert np.abs(residual / scale).max() < 1e-4


def test_enough_nodes():
    x, t = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(0, 1, 11))
    reference = two.exact_solution(x, t, nodes=200)
    assert np.abs(two.exact_solution(x, t) - reference).max() < 1e-12
    assert np.abs(two.exact_solution(x, t, nodes=50) - reference).max() > 1e-9
    with pytest.raises(ValueError, match="nodes"):
        two.exact_solution(x, t, nodes=32)


def test_points_of_burgers2d(make):
    problem = make("burgers2d", seed=1)
    (points, values), inner = problem._train
    assert len(points) == 320 and len(inner) == 3200
    assert len(problem._validation[0][0]) == 80 and len(problem._validation[1]) == 800
    initial, boundary = points[:, 1] == 0, points[:, 0].abs() == 1
    assert (initial ^ boundary).all()
    assert 130 < initial.sum() < 190
    torch.testing.assert_close(values[initial], -torch.sin(math.pi * points[initial, 0]))
    assert (values[boundary] == 0).all()
    assert (inner[:, 0].abs() < 1).all() and (inner[:, 1] > 0).all() and (inner[:, 1] < 1).all()


def test_points_stay_unless_they_are_drawn_anew(make):
    fixed, fresh = make("burgers2d"), make("burgers2d", resample=5)
    model = fixed.make_model()
    with torch.no_grad():
        assert fixed.loss(model, 0) == fixed.loss(model, 7) == fresh.loss(model, 4)
        assert fresh.loss(model, 4) != fresh.loss(model, 5)
        assert fresh.loss(model, 9) == fresh.loss(model, 5)
    assert fixed.full_batch and not fresh.full_batch
    with pytest.raises(ValueError, match="resample"):
        make("burgers2d", resample=0)


def test_what_relu_cannot_see():
    model = double_model(two.TaylorMLP, [2, 20, 20, 1], "relu")
    assert (model.derivatives(torch.rand(5, 2, dtype=torch.double))[3] == 0).all()
    with pytest.raises(ValueError, match="activation"):
        two.TaylorMLP([2, 3, 1], "gelu")


# Burgers in 99 dimensions


def test_laplacian_is_that_of_autograd():
    model = double_model(hundred.LaplacianMLP, [100, 50, 50, 50, 50, 1])
    points = (2 * torch.rand(3, 100, dtype=torch.double) - 1).requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(first[:, a].sum(), points, create_graph=True)[0][:, a]
        for a in range(hundred.SPACE)
    )
    expected = u, first[:, :-1].sum(dim=1), first[:, -1], laplacian
    found = model.derivatives(points.detach())
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    same_gradients(model, expected, found)


@pytest.mark.parametrize("reach", [1.0, 0.2])
def test_forcing_is_the_equation_of_the_solution(reach):
    random = np.random.default_rng(0)
    x, t = random.uniform(-reach, reach, (3, hundred.SPACE)), random.uniform(0, 1, 3)
    points = torch.from_numpy(x).requires_grad_()
    time = torch.from_numpy(t).requires_grad_()
    u = torch.exp(-time) * (points - 1).prod(dim=1) * (points + 1).prod(dim=1)
    by_x, by_t = torch.autograd.grad(u.sum(), (points, time), create_graph=True)
    laplacian = sum(
        torch.autograd.grad(by_x[:, a].sum(), points, retain_graph=True)[0][:, a]
        for a in range(hundred.SPACE)
    )
    expected = by_t + u * by_x.sum(dim=1) - hundred.VISCOSITY * laplacian
    np.testing.assert_allclose(hundred.forcing(x, t), expected.detach().numpy(), rtol=1e-11)
    np.testing.assert_allclose(hundred.exact_solution(x, t), u.detach().numpy(), rtol=1e-12)


def test_forcing_on_the_boundary():
    """There u is 0 and one factor is: a division would give nan."""
    x = np.full((1, hundred.SPACE), 0.1)
    x[0, 7] = 1.0
    expected = -hundred.VISCOSITY * 2 * (0.1**2 - 1) ** 98
    assert hundred.forcing(x, np.zeros(1)) == pytest.approx([expected])
    x[0, 8] = -1.0
    assert hundred.forcing(x, np.zeros(1)) == 0


def test_the_solution_in_99_dimensions_is_next_to_nothing():
    x = np.random.default_rng(0).uniform(-1, 1, (1000, hundred.SPACE))
    size = np.log(np.abs(hundred.exact_solution(x, np.zeros(1000))))
    assert size.mean() == pytest.approx(99 * (2 * math.log(2) - 2), abs=1)


def test_points_of_burgers100d():
    problem = build("burgers100d", seed=1, collocation=100)
    (points, values), (inner, forcing) = problem._train
    assert len(points) == 320 and len(inner) == len(forcing) == 80
    initial, boundary = points[:, -1] == 0, (points[:, :-1].abs() == 1).sum(dim=1) == 1
    assert (initial ^ boundary).all()
    assert (values[boundary] == 0).all() and (values[initial] != 0).all()


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_chunks_make_no_difference(monkeypatch, chunk):
    expected = build("burgers100d", collocation=100)
    model = expected.make_model()
    loss, gradient = flat_gradient(expected, model, 0)
    monkeypatch.setattr(hundred, "CHUNK", chunk)
    found, other = flat_gradient(build("burgers100d", collocation=100), model, 0)
    assert found == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    assert loss == pytest.approx(expected.metrics(model)["training_loss"], rel=1e-4)
    with torch.no_grad():
        assert expected.loss(model, 0).item() == pytest.approx(loss)


# Graduate admissions


def test_admissions_leave_the_serial_number_out(tmp_path):
    table = np.random.default_rng(0).uniform(0, 1, (500, 8))
    blanks = [f"{name} " if name in ("LOR", "Chance of Admit") else name for name in HEADER]
    write_admissions(tmp_path / "data.csv", table, blanks)  # as some copies have it
    features, chances = read_admissions(tmp_path / "data.csv")
    np.testing.assert_array_equal(features, table[:, :7])
    np.testing.assert_array_equal(chances, table[:, 7])
    assert len(FEATURES) == 7


def test_admissions_are_standardised_by_the_training_part(make):
    problem = make("admissions", seed=3)
    torch.testing.assert_close(problem.train[0].mean(dim=0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        problem.train[0].std(dim=0, correction=0), torch.ones(7), atol=1e-5, rtol=0
    )
    assert len(problem.train[0]) == 400 and len(problem.validation[0]) == 100
    assert problem.validation[0].mean(dim=0).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:401], "400 students, must be 500"),
        (lambda lines: [lines[0].replace("CGPA", "GPA"), *lines[1:]], "no column CGPA"),
        (lambda lines: [",".join(reversed(lines[0].split(","))), *lines[1:]], "another order"),
        (lambda lines: [*lines[:3], lines[3].replace(",", ";"), *lines[4:]], "line 4: must be 9"),
        (lambda lines: [*lines[:3], "1,2,3,4,5,6,7,8,nan", *lines[4:]], "not finite"),
        (lambda lines: [], "the header is missing"),
    ],
)
def test_admissions_that_are_others(admissions_csv, tmp_path, damage, message):
    lines = admissions_csv.read_text().splitlines()
    other = tmp_path / "other.csv"
    other.write_text("\n".join(damage(lines)))
    with pytest.raises(UserError, match=message):
        read_admissions(other)


def test_admissions_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_admissions(tmp_path / "nothing.csv")
