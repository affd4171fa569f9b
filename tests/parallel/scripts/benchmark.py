"""In the style of Horovod's synthetic benchmark: one fixed batch, timed."""

import timeit

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F

hvd.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
optimizer = hvd.DistributedOptimizer(
    optimizer, model.named_parameters(), hvd.Compression.none, 1, hvd.Average
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
torch.manual_seed(hvd.rank())
data, target = torch.randn(32, 6), torch.randint(4, (32,))
history = []


def benchmark_step():
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data), target)
    loss.backward()
    optimizer.step()
    history.append(hvd.allreduce(loss.detach(), name="loss").item())


timeit.timeit(benchmark_step, number=2)
speeds = [32 * 3 / timeit.timeit(benchmark_step, number=3) for _ in range(4)]
img_sec_mean, img_sec_conf = np.mean(speeds), 1.96 * np.std(speeds)
