"""examples/digits_ddp.py on two ranks, several times in one launch: as it stands, plain, resumed.

example.py FOLDER
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training import assert_same_on_all, weights

import aadl_hvd
from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "digits_ddp.py")
FOLDER = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
# Once, for all the trainings.
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
dist.init_process_group = lambda *_, **__: None
made = []


def train(*arguments, wrap):
    """The weights after a training with the optimizer that `wrap(sgd, anderson)` makes."""
    aadl_hvd.DistributedAndersonOptimizer = wrap
    program = runpy.run_path(EXAMPLE, run_name="example")
    aadl_hvd.DistributedAndersonOptimizer = DistributedAndersonOptimizer
    return weights(program["main"](["--no-cuda", *arguments]))


def as_given(sgd, anderson):
    made.append(DistributedAndersonOptimizer(sgd, anderson=anderson))
    return made[-1]


def every_point_taken(sgd, anderson):
    settings = {"noise_gate": None, "safeguard": "none", "relaxation": 0.1, "averages": ()}
    return as_given(sgd, AndersonConfig(method="residual", **settings))


def not_ours(sgd, anderson):
    sgd.observe, sgd.anderson = (lambda loss: None), as_given(sgd, anderson).anderson
    return sgd


sys.argv = [EXAMPLE, "--no-cuda", "--epochs", "2"]
runpy.run_path(EXAMPLE, run_name="__main__")

plain = train("--epochs", "2", "--plain", wrap=as_given)
assert torch.equal(train("--epochs", "2", wrap=not_ours), plain), "--plain is not plain SGD"

whole = train("--epochs", "3", wrap=every_point_taken)
assert made[-1].anderson.stats.accelerated > 10
assert_same_on_all(whole)
part = train("--epochs", "2", "--checkpoint-dir", FOLDER, wrap=every_point_taken)
assert not torch.equal(part, plain), "nothing was accelerated"
rest = train("--epochs", "3", "--checkpoint-dir", FOLDER, wrap=every_point_taken)
assert torch.equal(rest, whole), "a resumed training goes elsewhere"
assert made[-1].anderson.stats.steps == 36, "it did not resume"
dist.barrier()  # rank 0 has renamed the folder
assert [path.name for path in Path(FOLDER).iterdir()] == ["epoch00003"]
destroy()
