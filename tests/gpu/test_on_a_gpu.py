"""Real ranks on a real GPU: the same weights as on the processor, equal on all ranks, resumed.

tests/unit/test_gpu_paths.py watches a pretended GPU, tests/unit/test_kernels.py the kernels.
"""

import pytest
import torch
from launching import ROOT, start

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


def passed(ranks, controller, *words):
    code, output = start(PROGRAM, *words, ranks=ranks, controller=controller, limit=300)
    assert code == 0, output[-6000:]
    assert output.count("has passed") == ranks, output[-6000:]
