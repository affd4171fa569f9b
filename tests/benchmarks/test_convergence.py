"""The convergence benchmark: its reference of AADL, its figures, and a small run on real ranks."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import run_command

import benchmarks.convergence.__main__ as convergence
from benchmarks.convergence import summary
from benchmarks.convergence.aadl import Aadl, extrapolate
from benchmarks.convergence.plan import USUAL_CONTENDERS, make_plan, parse_seeds, parser
from benchmarks.convergence.results import Results, plain
from models.errors import UserError
from models.problems import PROBLEMS

main = convergence.main


# The reference of AADL


def by_hand(X, beta):
    """Anderson's point by its definition: weights of the iterates that sum up to 1."""
    points, images = X[:, :-1], X[:, 1:]
    residuals = images - points
    # min || residuals @ alpha || with sum(alpha) = 1, by Lagrange's conditions.
    count = points.shape[1]
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = 2 * residuals.T @ residuals
    system[:count, count] = system[count, :count] = 1
    alpha = np.linalg.solve(system, np.eye(count + 1)[count])[:count]
    return points @ alpha + beta * residuals @ alpha


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_extrapolation_against_its_definition(count, beta):
    X = np.random.default_rng(count).standard_normal((12, count))
    found = extrapolate(torch.from_numpy(X), beta).numpy()
    np.testing.assert_allclose(found, by_hand(X, beta), rtol=1e-9)


def test_extrapolation_of_a_linear_map_is_its_fixed_point():
    random = np.random.default_rng(0)
    Q = np.linalg.qr(random.standard_normal((4, 4)))[0]
    A, b = (Q * [0.9, 0.5, -0.3, 0.1]) @ Q.T, random.standard_normal(4)
    X = [random.standard_normal(4)]
    for _ in range(5):
        X.append(A @ X[-1] + b)
    found = extrapolate(torch.from_numpy(np.stack(X, axis=1)), 1.0).numpy()
    np.testing.assert_allclose(found, np.linalg.solve(np.eye(4) - A, b), rtol=1e-8)


@pytest.mark.parametrize(
    ("depth", "frequency", "store_every", "wait"), [(4, 3, 1, 1), (5, 1, 1, 1), (4, 4, 2, 0)]
)
def test_schedule_against_a_plain_loop(depth, frequency, store_every, wait):
    """SGD on a noisy quadratic: history, counters, and the accelerated point's place in it.

    The noise keeps the columns apart, so that both solutions agree to rounding.
    """
    random = np.random.default_rng(1)
    H = np.diag(np.geomspace(0.05, 1, 8))
    start, noise = random.standard_normal(8), random.standard_normal((20, 8))

    w, history, stored, since = start.copy(), [], 0, 0
    expected = []
    for k in range(20):
        w = w - 0.7 * (H @ w - noise[k])
        stored += 1
        if stored >= store_every:
            stored, history = 0, [*history, w][-depth:]
        since += 1
        if since > wait and since % frequency == 0:
            since = 0
            if len(history) >= 3:
                w = by_hand(np.stack(history, axis=1), 0.4)
                history[-1] = w
        expected.append(w)

    p = torch.nn.Parameter(torch.from_numpy(start.copy()))
    opt = torch.optim.SGD([p], lr=0.7)
    aadl = Aadl(
        opt,
        history_depth=depth,
        frequency=frequency,
        store_every=store_every,
        relaxation=0.4,
        wait=wait,
    )
    found = []
    for k in range(20):
        p.grad = torch.from_numpy(H) @ p.detach() - torch.from_numpy(noise[k])
        opt.step()
        aadl.after_step()
        found.append(p.detach().numpy().copy())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert aadl.accelerated > 2


def test_groups_are_accelerated_apart():
    def run(groups):
        opt = torch.optim.SGD([{"params": group} for group in groups], lr=0.5)
        aadl = Aadl(opt, history_depth=4, frequency=3, store_every=1, relaxation=1.0)
        for _ in range(9):
            for group in groups:
                for p in group:
                    p.grad = torch.linspace(0.1, 1, p.numel(), dtype=p.dtype) * p.detach()
            opt.step()
            aadl.after_step()
        return [p.detach() for group in groups for p in group]

    def parameters(*seeds):
        return [
            torch.nn.Parameter(
                torch.randn(6, dtype=torch.double, generator=torch.Generator().manual_seed(s))
            )
            for s in seeds
        ]

    both = run([parameters(1), parameters(2)])
    alone = [*run([parameters(1)]), *run([parameters(2)])]
    torch.testing.assert_close(both, alone)
    assert not torch.allclose(run([parameters(1, 2)])[0], both[0])


# Figures from runs


def a_run(problem="quadratic", contender="base", seed=0, final=1.0, **changes):
    values = [4.0, 3.0, 2.0, final]
    run = {
        "problem": problem,
        "contender": contender,
        "seed": seed,
        "steps": 8,
        "full_batch": True,
        "diverged": None,
        "seconds_per_step": 0.5,
        "final": {"training_loss": final, "objective": None if final is None else final + 1.0},
        "averaged_final": None,
        "anderson": None,
        "marks": [0, 4, 8],
        "metrics": {"training_loss": [4.0, 2.0, final]},
        "averaged_metrics": None,
        "loss": {"stride": 2, "values": values},
    }
    return run | changes


def rows_of(*runs):
    keyed = {(run["problem"], run["contender"], run["seed"]): run for run in runs}
    return {row.contender: row for row in summary.summarise(keyed)}


def test_means_bands_and_ratios():
    rows = rows_of(
        a_run(seed=0, final=1.0),
        a_run(seed=1, final=2.0),
        a_run(contender="aadl", seed=0, final=3.0),
        a_run(contender="aadl", seed=1, final=1.0),
    )
    row = rows["aadl"]
    assert row.final["training_loss"].value == 2.0
    # Two values 1 and 3: deviation sqrt 2, and Student's t for 1 degree of freedom is 12.706.
    assert row.final["training_loss"].band == pytest.approx(12.706, rel=1e-4)
    assert row.mean_of_ratios == pytest.approx((3 + 0.5) / 2)
    assert row.ratio_of_means == pytest.approx(4 / 3)
    assert row.worst_ratio == 3
    assert row.objective_ratio == pytest.approx((2 * 2 / 3) ** 0.5)
    assert row.worst_objective_ratio == 2
    assert rows["base"].mean_of_ratios == rows["base"].worst_ratio == 1


def test_steps_to_the_bases_loss():
    rows = rows_of(a_run(final=2.0), a_run(contender="aadl", final=0.5))
    assert rows["base"].steps_to_base == 4
    assert rows["aadl"].steps_to_base == 4 and rows["aadl"].reached == 1
    rows = rows_of(a_run(final=0.1), a_run(contender="aadl", final=0.5))
    assert rows["aadl"].steps_to_base is None and rows["aadl"].reached == 0
    assert rows["base"].steps_to_base == 6
    small = a_run(contender="aadl", final=0.05, full_batch=False)
    assert rows_of(a_run(final=0.1), small)["aadl"].steps_to_base == 8


def test_what_diverged_is_not_dropped():
    lost = a_run(contender="aadl", seed=1, final=None, diverged=8)
    lost["metrics"]["training_loss"][-1] = None
    rows = rows_of(a_run(), a_run(seed=1), a_run(contender="aadl", final=0.5), lost)
    row = rows["aadl"]
    assert row.seeds == 2 and row.diverged == 1
    assert row.mean_of_ratios == row.ratio_of_means == row.worst_ratio == math.inf
    assert row.objective_ratio == row.worst_objective_ratio == math.inf
    table = summary.markdown([row], {})
    assert "2, 1 diverged" in table and "not finite" in table and "∞" in table


def test_averaged_weights_are_a_row_of_their_own():
    ours = a_run(
        contender="default",
        final=0.5,
        averaged_final={"training_loss": 0.25, "objective": 1.25},
        averaged_metrics={"training_loss": [4.0, 0.9, 0.25]},
    )
    rows = rows_of(a_run(), ours)
    assert rows["default"].worst_ratio == 0.5
    assert rows[summary.AVERAGED].worst_ratio == 0.25
    assert rows[summary.AVERAGED].steps_to_base == 4


def test_without_the_base_there_are_no_ratios():
    row = rows_of(a_run(contender="aadl"))["aadl"]
    assert row.mean_of_ratios is None and row.steps_to_base is None
    assert row.objective_ratio is None
    assert "| 1 | - | - | - | 2 | - | - | - | 500.00 | - |" in summary.markdown([row], {})


# The file


def test_results_are_merged(tmp_path):
    path = tmp_path / "results.json"
    first = Results(path)
    first.head = {"conditions": {"ranks": 2}}
    first.add(a_run(seed=0))
    first.add(a_run(seed=1))
    first.write()
    second = Results(path)
    second.add(a_run(seed=1, final=7.0))
    second.add(a_run(contender="aadl"))
    second.write()
    third = Results(path)
    assert len(third.runs) == 3
    assert third.runs["quadratic", "base", 1]["final"]["training_loss"] == 7.0
    assert third.head == first.head
    third.check({"ranks": 2})
    with pytest.raises(UserError, match="ranks = 2, and now it is 3"):
        third.check({"ranks": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 99, "runs": []}', "{}"])
def test_a_file_that_is_no_results(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="move it away"):
        Results(tmp_path / "results.json")


def test_plain_numbers():
    assert plain({"a": [1.23456789, math.nan, -math.inf], "b": 3}, 3) == {
        "a": [1.23, None, None],
        "b": 3,
    }


# The command line


def plan(*words):
    return make_plan(parser().parse_args(list(words)))


def test_seeds():
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7,0-1,7") == [0, 1, 7]


def test_families_and_lists():
    found = plan("--problems", "digits_resnet,quadratic", "--seeds", "2", "--contenders", "base")
    assert [run[0] for run in found.runs] == ["quadratic", "digits_resnet-32", "digits_resnet-full"]
    everything = plan()
    assert {run[0] for run in everything.runs} == set(PROBLEMS) - {"admissions"}
    assert {run[1] for run in everything.runs} == set(USUAL_CONTENDERS)
    assert {seed for problem, _, seed in everything.runs if problem == "quadratic"} == set(
        range(20)
    )
    assert len(set(everything.runs)) == len(everything.runs)


def test_options_reach_their_problems():
    found = plan("--problems", "burgers2d", "burgers100d", "--burgers100d-points", "100",
                 "--burgers2d-resample", "7", "--steps", "3")  # fmt: skip
    assert found.options["burgers100d"] == {"steps": 3, "collocation": 100}
    assert found.options["burgers2d"] == {"steps": 3, "resample": 7}
    assert found.conditions["burgers2d_resample"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--problems", "quadratics"], "no problem named 'quadratics'"),
        (["--contenders", "adam"], "no contender named 'adam'"),
        (["--seeds", "a-b"], "--seeds is 'a-b'"),
        (["--seeds", "3-1"], "--seeds is '3-1'"),
        (["--ranks", "0"], "--ranks is 0, must be at least 1"),
        (["--steps", "0"], "--steps is 0"),
        (["--cycle-time", "0"], "--cycle-time is 0"),
        (["--problems", "admissions"], "add --admissions-csv PATH"),
        (["--admissions-csv", "nowhere.csv"], "cannot be read"),
        (["--burgers2d-resample", "0"], "--burgers2d-resample is 0"),
        (["--burgers100d-points", "3"], "--burgers100d-points is 3"),
        (["--report"], "there are no results"),
    ],
)
def test_mistakes(words, message, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_what_is_there_is_kept_or_left_out(monkeypatch, tmp_path, capsys):
    asked = []

    def launch(plan, results, words):
        asked.append(plan.runs)
        results.head = {"conditions": plan.conditions}
        for problem, contender, seed in plan.runs:
            results.add(a_run(problem, contender, seed, final=float(len(asked))))
        results.write()
        return 0

    monkeypatch.setattr(convergence, "_launch", launch)
    monkeypatch.setattr(summary, "_about", lambda head: [])
    words = ["--out", str(tmp_path), "--problems", "quadratic", "--seeds"]
    assert main([*words, "0-1"]) == 0
    assert main([*words, "1-2", "--contenders", "base"]) == 0
    assert main([*words, "0-2", "--resume", "--contenders", "base,aadl"]) == 0
    assert asked[1] == [("quadratic", "base", 1), ("quadratic", "base", 2)]
    assert asked[2] == [("quadratic", "aadl", 2)]
    runs = Results(tmp_path / "results.json").runs
    finals = {key: run["final"]["training_loss"] for key, run in runs.items()}
    assert finals["quadratic", "base", 0] == finals["quadratic", "default", 1] == 1
    assert finals["quadratic", "base", 1] == 2 and finals["quadratic", "aadl", 2] == 3
    assert "| base | 3 |" in (tmp_path / "table.md").read_text()
    assert main([*words, "0", "--steps", "5"]) == 2
    assert "steps = None, and now it is 5: choose another --out" in capsys.readouterr().err


# On real ranks


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_a_quick_run_on_two_ranks(tmp_path):
    words = ["--quick", "--out", tmp_path, "--problems"]
    command = [sys.executable, "-m", "benchmarks.convergence", *words]
    command += ["quadratic", "digits_mlp-100-nesterov"]
    code, output, errors = run_command(command, limit=120, errors=subprocess.PIPE)
    assert code == 0, errors[-4000:]
    assert "20/20" in errors and "done" in errors
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["runs"]) == 2 * len(USUAL_CONTENDERS) * 2
    assert content["conditions"]["ranks"] == 2
    assert str(tmp_path) not in json.dumps(content)
    for run in content["runs"]:
        assert run["steps"] == run["marks"][-1] == 12 and run["diverged"] is None
        assert len(run["loss"]["values"]) == 12
        assert run["loss"]["values"][0] == pytest.approx(run["metrics"]["training_loss"][0], rel=1)
        assert (run["anderson"] is None) == (run["contender"] in ("base", "aadl"))
    # From the same weights on the same batches.
    begin = {run["metrics"]["training_loss"][0] for run in content["runs"] if run["seed"] == 0}
    assert len(begin) == 2
    table = (tmp_path / "table.md").read_text()
    assert table in output
    assert table.count("| base |") == table.count("| default |") == 2
    for name in ("quadratic", "digits_mlp-100-nesterov"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
