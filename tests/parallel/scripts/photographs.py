"""In the style of Horovod's ImageNet example: accumulation, warm-up, schedule, clipping, resume."""

import horovod.torch as hvd
import torch
import torch.nn.functional as F

hvd.init()
BATCHES_PER_ALLREDUCE = 2
torch.manual_seed(hvd.rank())
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3, bias=False),
    torch.nn.BatchNorm2d(4),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(16, 5),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-5)
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=hvd.Compression.fp16,
    backward_passes_per_step=BATCHES_PER_ALLREDUCE,
    op=hvd.Average,
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)


def adjust_learning_rate(epoch, index, batches):
    progress = (epoch + index / batches) / 2
    factor = 1 / hvd.size() * (progress * (hvd.size() - 1) + 1) if progress < 1 else 1.0
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * hvd.size() * BATCHES_PER_ALLREDUCE * factor


generator = torch.Generator().manual_seed(hvd.rank())
labels = torch.randint(5, (3, 8 * BATCHES_PER_ALLREDUCE), generator=generator)
images = torch.randn(*labels.shape, 3, 8, 8, generator=generator) + labels[..., None, None, None]
history = []
for epoch in range(4):
    model.train()
    mean = torch.tensor(0.0)
    for index in range(len(labels)):
        adjust_learning_rate(epoch, index, len(labels))
        optimizer.zero_grad()
        for i in range(0, labels.shape[1], 8):
            output = model(images[index, i : i + 8])
            loss = F.cross_entropy(output, labels[index, i : i + 8])
            mean += loss.detach() / 6
            loss.div_(BATCHES_PER_ALLREDUCE)
            loss.backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    history.append(hvd.allreduce(mean, name="loss").item())
    if epoch == 1:  # a checkpoint of rank 0, loaded by rank 0 and broadcast, as on a restart
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if hvd.rank() == 0:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
