"""Real ranks on a real GPU: the same weights as on the processor, equal on all ranks, resumed.

tests/unit/test_gpu_paths.py watches a pretended GPU, tests/unit/test_kernels.py the kernels.
"""

import pytest
import torch
from launching import ROOT, start

from aadl_hvd import AndersonConfig, AndersonOptimizer

pytestmark = pytest.mark.ranks

PROGRAM = str(ROOT / "tests" / "gpu" / "program.py")


@pytest.mark.timeout(330)
@pytest.mark.parametrize(("ranks", "controller"), [(1, "mpi"), (2, "mpi"), (2, "gloo")])
def test_training_on_a_gpu(ranks, controller):
    import horovod.torch as hvd

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if ranks > torch.cuda.device_count() and hvd.nccl_built():
        pytest.skip(f"NCCL needs a GPU for each rank: {ranks}")
    passed(ranks, controller)


def test_the_program_itself():
    """On the processor, where there may be no GPU."""
    passed(2, "mpi", "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_cuda_graphs_change_nothing(device, base, recwarn):
    """The same bits with graphs and without; on a processor there are none."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    runs = []
    for graphs in (True, False):
        random = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(5000, generator=random).to(device))
        curvature = torch.logspace(-2, 0, 5000, device=device)
        config = AndersonConfig(method="subspace", cuda_graphs=graphs)
        opt = AndersonOptimizer(getattr(torch.optim, base)([w], lr=0.05), anderson=config)
        for _ in range(260):  # the last graphs, of sums over 10 columns, are captured at about 200
            noise = torch.randn(5000, generator=random).to(device)
            w.grad = curvature * w.detach() + 1e-3 * noise
            opt.step()
        assert opt.anderson.stats.accelerated > 5
        used = graphs and device == "cuda"
        assert ("sums" in {key[0] for key in _replayed(opt)}) == used
        runs.append(w.detach().cpu())
    assert torch.equal(*runs)
    assert not [x for x in recwarn if "cuda_graphs" in str(x.message)]


def _replayed(opt):
    """Keys of the pieces that have a graph."""
    known = opt.anderson._shard.captures._known
    return [key for key, one in known.items() if one.graph is not None]


def passed(ranks, controller, *words):
    code, output = start(PROGRAM, *words, ranks=ranks, controller=controller, limit=300)
    assert code == 0, output[-6000:]
    assert output.count("has passed") == ranks, output[-6000:]
