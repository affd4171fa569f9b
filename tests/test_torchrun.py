"""torchrun: the example for it, a worker that is killed, restarts, fewer workers afterwards."""

import importlib.util
import json
import os

import pytest
import torch
from launching import ROOT, start, torchrun
from torchrun import forms

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(330)]

PROGRAM = ROOT / "tests" / "torchrun" / "program.py"


def run(program, *arguments, ranks, **more):
    """The exit code, the output, and the lines of JSON in it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ddp")])
    code, output = torchrun(program, *arguments, ranks=ranks, limit=150, PYTHONPATH=path, **more)
    print(output)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return code, output, [json.loads(line) for line in lines]


def weights(folder, ranks):
    """Those of all ranks, which have the same bits."""
    first, *others = (torch.load(folder / f"weights{rank}.pt") for rank in range(ranks))
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a training on three ranks; it keeps the checkpoint of the third epoch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, said = run(PROGRAM, folder, "--keep", 3, ranks=3)
    assert code == 0
    assert all(line["accelerated"] > 20 for line in said if "accelerated" in line)
    return folder


def assert_went_on(said, ranks, life):
    """All ranks began with the third epoch's history, and accelerated until the end."""
    said = [line for line in said if line["life"] == life]
    begun = [line for line in said if "columns" in line]
    ended = [line for line in said if "steps" in line]
    assert len(begun) == len(ended) == ranks
    assert all(line["first"] == 27 and line["columns"] == 4 for line in begun)
    assert all(line["steps"] == 45 and line["accelerated"] > 20 for line in ended)
    assert all(line["resets"] == 0 for line in said)


def test_example(tmp_path):
    code, output, _ = run(ROOT / "tests" / "torchrun" / "example.py", tmp_path, ranks=2)
    assert code == 0, output[-6000:]
    assert "goes on after epoch 2" in output
    assert "24 steps: " in output and "24 steps of the base optimizer alone" in output


def test_short_examples():
    """Each on two ranks, in one launch; those of packages that are missing are left out."""
    needs = {"digits_lightning": "lightning", "digits_accelerate": "accelerate"}
    missing = [name for name in needs if importlib.util.find_spec(needs[name]) is None]
    names = ["digits_ddp_short", "digits_fsdp", *(name for name in needs if name not in missing)]
    for name in (*names, *missing):
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60
    code, output, _ = run(ROOT / "tests" / "torchrun" / "friends.py", *names, ranks=2)
    assert code == 0, output[-6000:]
    if missing:
        pytest.skip(f"not installed: {', '.join(needs[name] for name in missing)}")


def test_one_training_in_four_forms(tmp_path):
    """Horovod, DDP and FSDP2 on two ranks, and one process with all data: the same weights."""
    program = ROOT / "tests" / "torchrun" / "forms.py"
    code, output, _ = run(program, tmp_path, "ddp", "fsdp2", ranks=2)
    assert code == 0, output[-6000:]
    code, output = start(str(program), str(tmp_path), "horovod", ranks=2)
    assert code == 0, output[-6000:]
    for method in forms.METHODS:
        expected, accelerated = forms.train("one", method)
        assert accelerated > 4
        for form in ("ddp", "fsdp2", "horovod"):
            found = [torch.load(tmp_path / f"{form}{rank}.pt")[method] for rank in (0, 1)]
            assert torch.equal(found[0][0], found[1][0]), (form, method)
            assert found[0][1] == found[1][1] == accelerated, (form, method)
            torch.testing.assert_close(found[0][0], expected, rtol=1e-9, atol=1e-9)


def test_a_worker_is_killed(undisturbed, tmp_path):
    """The others end with an error at once, and all go on from the last checkpoint."""
    code, output, said = run(
        *(PROGRAM, tmp_path, "--die"),
        ranks=3,
        # torchrun looks late, so that the others end by themselves.
        options=["--max-restarts", "1", "--monitor-interval", "3"],
        # Without, ranks find addresses of the first life in the store, and may wait for them.
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert code == 0
    errors = [line for line in said if "error" in line]
    assert [line["life"] for line in errors] == [0, 0]
    assert {line["rank"] for line in errors} == {0, 2}
    for line in errors:
        assert line["error"].startswith("CommunicationError: torch.distributed: ")
        assert line["after"] < 3, "seconds; the group's timeout is half an hour"
    assert "If another rank has left or was killed, its own output says why." in output
    assert_went_on(said, ranks=3, life=1)
    # Steps of the fourth epoch are made again: none is left out, none is made twice.
    assert torch.equal(weights(tmp_path, 3), weights(undisturbed, 3))


def test_goes_on_with_fewer_workers(undisturbed):
    folder = undisturbed / "kept"
    code, _, said = run(PROGRAM, folder, ranks=2)
    assert code == 0
    assert_went_on(said, ranks=2, life=0)
    found, expected = weights(folder, 2), weights(undisturbed, 3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
