"""Trains with both methods and says from where to where Horovod has nothing to negotiate.

Not collected by itself. Started with HOROVOD_LOG_LEVEL=trace, Horovod tells of each negotiation.
"""

import horovod.torch as hvd
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

SETTINGS = {
    "subspace": AndersonConfig(method="subspace"),
    "residual": AndersonConfig(
        method="residual", noise_gate=None, average_window=2, safeguard="residual", averages=()
    ),
}
WARM_UP, STEPS = 45, 80  # until then every collective has been there once

hvd.init()
for method, settings in SETTINGS.items():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    opt = DistributedAndersonOptimizer(opt, model.named_parameters(), anderson=settings)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(hvd.rank()))
    for step in range(STEPS):
        if step == WARM_UP:
            before = opt.anderson.stats.accelerated
            print(f"{method} begins", flush=True)
        opt.zero_grad()
        loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
        loss.backward()
        opt.observe(loss)
        opt.step()
    print(f"{method} ends, accelerated {opt.anderson.stats.accelerated - before} times", flush=True)
hvd.shutdown()
