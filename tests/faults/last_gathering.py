"""Two groups of two ranks share a history each; the last rank is late in the run's last gathering.

The other group has its weights by then. Its ranks have nothing left to do, and exit.
"""

import time

import horovod.torch as hvd
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

STEPS = 8
groups = [hvd.ProcessSet([0, 1]), hvd.ProcessSet([2, 3])]
hvd.init(process_sets=groups)
mine = groups[hvd.rank() // 2]
torch.manual_seed(7)
model = torch.nn.Linear(3, 2)
opt = DistributedAndersonOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.05),
    model.named_parameters(),
    anderson=AndersonConfig(
        method="residual", frequency=2, noise_gate=None, safeguard="none", shard_group=mine
    ),
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
comm = opt.anderson.group.comm
start_gathering = comm._start_gathering


def late(*arguments):
    print(f"rank {hvd.rank()} is late", flush=True)
    time.sleep(1)
    return start_gathering(*arguments)


x, y = torch.randn(12, 3), torch.randn(12, 2)
for step in range(1, STEPS + 1):
    opt.zero_grad()
    (model(x) - y).square().mean().backward()
    if step == STEPS and hvd.rank() == 3:
        comm._start_gathering = late
    opt.step()
print(
    f"rank {hvd.rank()} ends after {opt.anderson.stats.accelerated} accelerated steps", flush=True
)
