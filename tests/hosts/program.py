"""A training that goes on from its checkpoints, with Horovod or torch.distributed.

    program.py horovod|torch FOLDER [--steps N] [--pause SECONDS] [--group node] [--timeout SECONDS]

It looks for a checkpoint in FOLDER and writes one there every `SAVE` steps. Rank 0 says each step
that it has begun. In the end each rank writes its weights to FOLDER. The ranks share each batch, so
that their number changes nothing but rounding.
"""

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer, checkpoint

sys.path.append(str(Path(__file__).parents[1] / "ddp"))  # a fork does not read PYTHONPATH
from training import mine, network, sgd, train, weights

SAVE = 20  # steps between two checkpoints

parser = argparse.ArgumentParser()
parser.add_argument("engine", choices=("horovod", "torch"))
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--group", default="world")
parser.add_argument("--timeout", type=float, default=1800.0)
args = parser.parse_args()
torch.set_num_threads(1)
settings = {"noise_gate": None, "history_depth": 4, "averages": (), "shard_group": args.group}
anderson = AndersonConfig(method="residual", **settings)
model = network()
if args.engine == "horovod":
    import horovod.torch as hvd

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    opt = DistributedAndersonOptimizer(
        sgd(model), named_parameters=model.named_parameters(), anderson=anderson
    )
else:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=args.timeout))
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(model)
    opt = DistributedAndersonOptimizer(sgd(model), anderson=anderson)
plain = getattr(model, "module", model)


def say(text):
    print(f"rank {rank} on {platform.node()}: {text}", flush=True)


last, done = args.folder / "last.pt", 0
if last.exists():
    saved = checkpoint.load(last)
    plain.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    done = saved["step"]
group = opt.anderson.comm.allgather_object((rank, opt.anderson._shard.sharding.size))
say(f"begins at step {done}; shares of {group[rank][1]} ranks")
try:
    for step in range(done, args.steps):
        if rank == 0:
            say(f"step {step} at {time.time():.3f}")
        train(model, opt, 1, part=mine(rank, size), first=step)
        if step == done:
            say(f"has {opt.anderson.columns} columns after a step")
        time.sleep(args.pause)
        if (step + 1) % SAVE == 0 and step + 1 < args.steps:
            state = opt.consolidate_state_dict()
            if rank == 0:
                state = {"step": step + 1, "model": plain.state_dict(), "optimizer": state}
                checkpoint.save(last, state)
except Exception as error:
    say(f"{type(error).__name__} at {time.time():.3f}: {error}")
    raise
torch.save(weights(plain), args.folder / f"weights{rank}.pt")
say(f"ends after {opt.anderson.stats.accelerated} accelerated steps")
