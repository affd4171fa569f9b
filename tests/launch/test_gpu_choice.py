"""Which GPU a rank takes, where its launcher shows it all of its node and where only its own."""

import runpy
import sys
import types
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models import demo, training  # noqa: E402
from models.errors import UserError  # noqa: E402

pytestmark = pytest.mark.ranks  # Horovod is initialised in this process

EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if "torch.cuda.set_device" in path.read_text()
)
# GPUs that a rank sees, its local rank, which of those it sees it takes
SIGHTS = {
    "all of the node": (6, 4, 4),
    "its own": (1, 4, 0),
    "those of its socket": (3, 4, 1),
}


class TakenError(Exception):
    pass


@pytest.fixture
def rank(monkeypatch):
    """rank(gpus, local_rank): this process, with GPUs; taking one raises TakenError."""

    def take(index):
        raise TakenError(index)

    def rank(gpus, local_rank):
        hvd.init()
        for name, answer in {
            "is_available": lambda: gpus > 0,
            "device_count": lambda: gpus,
            "get_device_properties": lambda index: types.SimpleNamespace(uuid=index),
            "set_device": take,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(hvd, "local_rank", lambda: local_rank)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))  # as torchrun does

    return rank


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(rank, name, sight):
    gpus, local_rank, index = SIGHTS[sight]
    rank(gpus, local_rank)
    program = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="example")
    with pytest.raises(TakenError, match=f"^{index}$"):
        program["main"]([])


@pytest.mark.parametrize("sight", SIGHTS)
def test_training_program(rank, sight):
    gpus, local_rank, index = SIGHTS[sight]
    rank(gpus, local_rank)
    with pytest.raises(TakenError, match=f"^{index}$"):
        training._device(types.SimpleNamespace(device="cuda"))


def test_training_program_without_a_gpu(rank):
    rank(0, 1)
    assert training._device(types.SimpleNamespace(device="auto")) == torch.device("cpu")
    with pytest.raises(UserError, match="sees no GPU"):
        training._device(types.SimpleNamespace(device="cuda"))


def test_two_ranks_do_not_share_a_gpu(rank, monkeypatch):
    rank(2, 2)
    monkeypatch.setattr(training, "gather", lambda own: [own, own])
    monkeypatch.setattr(hvd, "rank", lambda: 1)
    with pytest.raises(UserError, match="local rank 2 has no GPU of its own, it sees 2"):
        training._device(types.SimpleNamespace(device="cuda"))


@pytest.mark.parametrize(
    ("gpus", "ranks", "device", "said"),
    [
        (0, 2, "cpu", "on the processor"),
        (1, 2, "cpu", "on the processor, since there is one GPU for them"),
        (2, 3, "cpu", "on the processor, since there are 2 GPUs for them"),
        (2, 2, "cuda", "a GPU each"),
    ],
)
def test_demo_shares_no_gpu(monkeypatch, gpus, ranks, device, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert demo._device(ranks) == (device, said)


def test_all_examples_that_use_a_gpu_are_tried():
    assert EXAMPLES == [
        "digits", "digits_amp", "digits_ddp", "digits_schedule", "images", "synthetic_benchmark"
    ]  # fmt: skip
