"""State that differs between ranks must neither hang a step nor let the replicas drift."""

import horovod.torch as hvd
import pytest
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"safeguard": "residual", "residual": "step"},
        {"average_window": 3},
        {"layout": "columns", "safeguard": "residual", "average_window": 3},
    ],
)
def test_checkpoint_loaded_on_rank_0_alone_and_broadcast(settings):
    """As Horovod's own examples resume: only rank 0 calls load_state_dict."""
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = DistributedAndersonOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(frequency=2, **settings),
    )
    x, y = torch.randn(20, 5), torch.randn(20, 3)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    train(9)
    saved = optimizer.state_dict()
    if hvd.rank() == 0:
        optimizer.load_state_dict(saved)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    accelerated = optimizer.anderson.stats.accelerated
    train(20)

    stats = optimizer.anderson.stats
    assert stats.resets["desynchronized"] == 1, stats
    assert stats.accelerated > accelerated, stats
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert all(torch.equal(weights, other) for other in hvd.allgather_object(weights))
