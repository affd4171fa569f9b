"""In the style of Horovod's first example: a small convolutional network, synthetic digits."""

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch.utils.data.distributed import DistributedSampler


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, kernel_size=5)
        self.drop = torch.nn.Dropout2d(0.1)
        self.fc1 = torch.nn.Linear(4 * 16, 16)
        self.fc2 = torch.nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.drop(self.conv(x)), 2)).flatten(1)
        x = F.dropout(F.relu(self.fc1(x)), 0.1, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


hvd.init()
torch.manual_seed(42)
generator = torch.Generator().manual_seed(0)
labels = torch.randint(10, (96,), generator=generator)
prototypes = torch.randn(10, 1, 12, 12, generator=generator)
images = prototypes[labels] + 0.3 * torch.randn(96, 1, 12, 12, generator=generator)
dataset = torch.utils.data.TensorDataset(images, labels)
sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
loader = torch.utils.data.DataLoader(dataset, batch_size=16, sampler=sampler)

torch.manual_seed(hvd.rank())  # other weights on every rank, to be broadcast
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * hvd.size(), momentum=0.5)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=hvd.Compression.none,
    op=hvd.Average,
    gradient_predivide_factor=1.0,
)
history = []
for epoch in range(5):
    model.train()
    sampler.set_epoch(epoch)
    total = torch.tensor(0.0)
    for data, target in loader:
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        total += loss.detach() / len(loader)
    history.append(hvd.allreduce(total, name="avg_loss").item())
