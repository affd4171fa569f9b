"""Trains through Horovod on a GPU, which ranks share if they must, and compares with the processor.

python tests/gpu/program.py [cpu]: with "cpu" nothing is on a GPU; so the program itself is tried.
"""

import io
import sys

import horovod.torch as hvd
import torch
from torch import nn

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer, kernels

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda", 0)
CPU = torch.device("cpu")
STEPS = 24
SETTINGS = {
    "default": {},
    "columns": {"layout": "columns"},
    "step": {"residual": "step", "safeguard": "residual", "noise_gate": None},
    "moving average": {"average_window": 3},
    "node": {"shard_group": "node"},
}


class Net(nn.Module):
    """Something of each kind: a convolution, a normalization, a matrix, a single number."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.out, self.scale = nn.Linear(6 * 36, 5), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.out(torch.tanh(self.norm(self.conv(x))).flatten(1))


class Run:
    """A network in training on this rank's part of fixed data; the same wherever it is."""

    def __init__(self, device, dtype=torch.float64, amp=False, **settings):
        torch.manual_seed(0)
        self.model = Net().to(dtype).to(device)
        self.x = torch.randn(24, 3, 8, 8, dtype=dtype)[hvd.rank() :: hvd.size()].to(device)
        self.y = torch.randn(24, 5, dtype=dtype)[hvd.rank() :: hvd.size()].to(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp)
        self.amp = amp
        self.optimizer = DistributedAndersonOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.5, weight_decay=1e-3),
            named_parameters=self.model.named_parameters(),
            anderson=AndersonConfig(history_depth=4, frequency=3, store_every=1, **settings),
        )
        self.losses = []

    @property
    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).cpu()

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.amp):
                loss = (self.model(self.x) - self.y).square().mean()
            self.optimizer.observe(loss.detach())
            self.losses.append(loss.detach())
            if not self.amp:
                loss.backward()
                self.optimizer.step()
                continue
            self.scaler.scale(loss).backward()
            self.optimizer.synchronize()
            self.scaler.unscale_(self.optimizer)
            with self.optimizer.skip_synchronize():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        return self

    def saved(self):
        file = io.BytesIO()
        state = self.optimizer.state_dict() | self.optimizer.sharded_state_dict()
        torch.save([self.model.state_dict(), state], file)
        return file.getvalue()

    def load(self, saved):
        model, optimizer = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return self


def same_on_all_ranks(run):
    assert all(torch.equal(run.weights, other) for other in hvd.allgather_object(run.weights))


def main():
    hvd.init()
    torch.backends.cudnn.deterministic = True  # or the network's own gradients differ by rounding
    for name, settings in SETTINGS.items():
        here, there = Run(CPU, **settings).train(STEPS), Run(DEVICE, **settings).train(STEPS)
        stats = there.optimizer.anderson.stats
        assert stats.accelerated == here.optimizer.anderson.stats.accelerated > 0, (name, stats)
        torch.testing.assert_close(there.weights, here.weights, rtol=1e-6, atol=1e-9)
        same_on_all_ranks(there)
        print(f"{name}: {stats.accelerated} accelerated, as on the processor")

    run = Run(DEVICE, torch.float32, history_dtype="bfloat16").train(STEPS)
    assert run.optimizer.anderson.stats.accelerated and run.losses[-1] < run.losses[0]
    same_on_all_ranks(run)
    print(f"history in bfloat16: {run.losses[0]:.3g} to {run.losses[-1]:.3g}")

    run = Run(DEVICE, torch.float32, amp=True).train(STEPS)
    assert run.optimizer.anderson.stats.accelerated and run.losses[-1] < run.losses[0]
    same_on_all_ranks(run)
    print(f"mixed precision: {run.losses[0]:.3g} to {run.losses[-1]:.3g}")

    for settings in ({}, {"layout": "columns", "history_dtype": "bfloat16"}):
        first = Run(DEVICE, torch.float32, **settings).train(STEPS // 2)
        saved = first.saved()
        second = Run(DEVICE, torch.float32, **settings).load(saved).train(STEPS // 2)
        assert torch.equal(first.train(STEPS // 2).weights, second.weights), settings
        assert second.optimizer.anderson.stats.accelerated > 0
        print(f"resumed bit for bit: {settings}")

    usable = kernels.usable(DEVICE)
    assert usable == (DEVICE.type == "cuda"), "Triton does not work here"
    assert run.optimizer.anderson._fused == usable
    print(f"rank {hvd.rank()} of {hvd.size()} has passed, Triton {usable}, NCCL {hvd.nccl_built()}")


if __name__ == "__main__":
    main()
