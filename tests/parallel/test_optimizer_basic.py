import horovod.torch as hvd
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer


def test_isinstance_and_steps():
    model = torch.nn.Linear(3, 2)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = DistributedAndersonOptimizer(
        opt, named_parameters=model.named_parameters(), anderson=AndersonConfig(frequency=2)
    )
    assert isinstance(opt, torch.optim.SGD)
    for _ in range(6):
        opt.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        opt.step()
    assert opt.anderson.stats.stored == 6
