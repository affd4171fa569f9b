"""A training that goes on from checkpoints, as examples/digits_ddp.py writes and loads them.

    program.py FOLDER [--keep EPOCH] [--die]

With --keep the checkpoint of an epoch is copied to FOLDER/kept. With --die rank 1 kills itself in
the middle of an epoch, in its first life, when the others wait for it in a reduction of the
acceleration. In the end each rank writes its weights to FOLDER. The ranks share each batch, so
that their number changes nothing but rounding.
"""

import argparse
import json
import os
import runpy
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from training import network, sgd, train, weights, wrapped

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_ddp.py"
EPOCHS, STEPS = 5, 9
DEATH = 3 * STEPS + 4  # steps taken before; the next is an acceleration step

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--keep", type=int)
parser.add_argument("--die", action="store_true")
args = parser.parse_args()
example = runpy.run_path(str(EXAMPLE), run_name="example")
died = args.folder / "died"
folder, life = args.folder / "checkpoints", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
torch.set_num_threads(1)
dist.init_process_group("gloo")  # with torch's timeout, half an hour
rank, size = dist.get_rank(), dist.get_world_size()

model = wrapped()
# DDP orders its buckets anew in its first backward pass, and three ranks then add up a sum in
# another order. Now, so that what follows has the same bits in every life.
train(model, sgd(model), 1)
model.module.load_state_dict(network().state_dict())
anderson = AndersonConfig(method="residual", noise_gate=None, history_depth=4, averages=())
opt = DistributedAndersonOptimizer(sgd(model), anderson=anderson)
stats = opt.anderson.stats


if args.die and life == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all have their say before torchrun ends them


def die(*_):
    if args.die and stats.steps == DEATH and rank == 1 and life == 0:
        died.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


opt.register_step_pre_hook(die)


def say(**what):
    os.write(1, (json.dumps(what | {"rank": rank, "size": size, "life": life}) + "\n").encode())


def train_on(done):
    for epoch in range(done + 1, EPOCHS + 1):
        for step in range((epoch - 1) * STEPS, epoch * STEPS):
            train(model, opt, 1, first=step)
            if step == done * STEPS:
                say(first=step, columns=opt.anderson.columns, resets=sum(stats.resets.values()))
        example["save"](folder, epoch, model, opt)
        if rank == 0 and epoch == args.keep:
            shutil.copytree(folder, args.folder / "kept" / folder.name)


try:
    train_on(example["load"](folder, model, opt))
except Exception as error:
    say(error=f"{type(error).__name__}: {error}", after=time.time() - float(died.read_text()))
    raise
torch.save(weights(model), args.folder / f"weights{rank}.pt")
say(steps=stats.steps, accelerated=stats.accelerated, resets=sum(stats.resets.values()))
dist.destroy_process_group()
