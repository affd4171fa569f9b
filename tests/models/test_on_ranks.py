"""Runs on_ranks.py on two real ranks, on MPI and on Gloo."""

import horovod.torch as hvd
import pytest
from launching import ROOT, start


@pytest.mark.ranks
@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_on_two_ranks(controller):
    if not (hvd.mpi_built() if controller == "mpi" else hvd.gloo_built()):
        pytest.skip(f"this Horovod was built without {controller}")
    script = str(ROOT / "tests" / "models" / "on_ranks.py")
    code, output = start(script, ranks=2, controller=controller)
    assert code == 0, output[-6000:]
    assert "FAILED" not in output
    assert output.count("passed ") == 30, output
