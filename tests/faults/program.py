"""A plain training loop in which something befalls the last rank: FAULT [STEP].

Every second step is accelerated, and what happens, happens in or just before one. Prints what it
was when it happened, and what became of the training.
"""

import os
import signal
import sys
import time
import traceback

import horovod.torch as hvd
import numpy as np
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
from aadl_hvd.comm import mpi

STEPS = 16
FAULT = sys.argv[1]
AT = int(sys.argv[2]) if len(sys.argv) > 2 else 10

if FAULT == "raises amid the gathering":
    mpi.MpiCommunicator.piece = 4  # of 26 weights
hvd.init()
RANK, LAST = hvd.rank(), hvd.rank() == hvd.size() - 1


def say(kind, error, trace):
    """The error in one line, and when: launchers forward the lines of ranks in any order."""
    words = " ".join(traceback.format_exception_only(error)).replace("\n", " ")
    sys.stderr.write(f"rank {RANK} says at {time.time():.6f}: {words}\n")
    sys.__excepthook__(kind, error, trace)


sys.excepthook = say


class DamagedImage(Exception):
    pass


def here(what, step):
    """Whether it is this that happens, now and on this rank."""
    happens = what == FAULT and step == AT and LAST
    if happens:
        print(f"rank {hvd.rank()}: {what} at {time.time():.3f}", flush=True)
    return happens


class Images(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(100 + hvd.rank())
        x, y = torch.randn(12, 3, generator=generator), torch.randn(12, 2, generator=generator)
        for step in range(1, STEPS + 1):
            if here("loader raises", step):
                raise DamagedImage("image 7")
            if here("data ends", step):
                time.sleep(1)  # others are in their reduction: else Horovod's end may be their news
                return
            yield x, y


def raise_error(*_):
    raise DamagedImage("image 7")


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
opt = DistributedAndersonOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.05),
    model.named_parameters(),
    anderson=AndersonConfig(frequency=2, noise_gate=None, safeguard="none"),
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
scaler = torch.amp.GradScaler("cpu", enabled="scaler" in FAULT, init_scale=2.0**10)


def one_step(step, x, y):
    """Zeroes gradients, computes and reduces them, takes the step."""

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        if here("closure raises", step):
            raise DamagedImage("image 7")
        if here("loss is NaN", step):
            loss = loss * float("nan")
        if here("scaler", step) or here("scaler alone", step):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        return loss

    if "closure" in FAULT:
        opt.step(closure)
        return
    closure()
    if here("raises after backward", step):
        raise DamagedImage("image 7")
    # Not as Horovod's documentation has it. In every step it would change gradients on their way.
    if FAULT == "scaler alone" and step == AT:
        scaler.step(opt)
        scaler.update()
        return
    opt.synchronize()  # from here on other ranks wait in the next reduction of the acceleration
    if here("raises", step):
        raise DamagedImage("image 7")
    if here("leaves", step):
        sys.exit(0)
    if here("exits", step):
        os._exit(0)
    if here("is killed", step):
        kill_itself()
    if here("is killed amid the step", step):
        opt.anderson._shard.publish = kill_itself
    if here("raises amid the gathering", step):
        opt.anderson_engine.problem.write = raise_error
    if here("shuts down", step):
        hvd.shutdown()
        time.sleep(2)
        sys.exit(0)
    if here("skips", step):
        return
    if here("mixes", step):
        opt.anderson.comm.broadcast(np.zeros(3))
    if here("is late", step):
        time.sleep(2.5)
    scaler.unscale_(opt)
    with opt.skip_synchronize():
        scaler.step(opt)
    scaler.update()
    if FAULT.endswith(" alone") and step == AT and hvd.rank() == 0:
        print(f"rank 0: {FAULT} at {time.time():.3f}", flush=True)
        if FAULT == "averages alone":
            with opt.averaged_weights():
                pass
        if FAULT == "consolidates alone":
            opt.consolidate_state_dict()
    if here("adds a group", step):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    if here("joins", step):
        hvd.join()
    if here("another rate", step):
        opt.param_groups[0]["lr"] = 0.07


step = 0
try:
    for x, y in torch.utils.data.DataLoader(Images(), batch_size=None):
        step += 1
        good = [p.detach().clone() for p in model.parameters()]
        one_step(step, x, y)
        if not all(p.isfinite().all() for p in model.parameters()):
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), good)
finally:
    print(f"rank {hvd.rank() if hvd.is_initialized() else 'X'} ends at {time.time():.3f}")
    sys.stdout.flush()
if step < STEPS:
    sys.exit(0)
weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
equal = len({w.numpy().tobytes() for w in hvd.allgather(weights[None])}) == 1
accelerated = opt.anderson.stats.accelerated
if hvd.rank() == 0:
    print(f"{step} steps, {accelerated} accelerated, replicas are {'' if equal else 'not '}equal")
