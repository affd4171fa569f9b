"""A plain training loop in which something happens to the last rank: FAULT [OPTIMIZER].

Steps are counted from 1 and every second one is accelerated. What happens, happens in step 11.
"""

import os
import signal
import sys
import time

import horovod.torch as hvd
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

STEPS, FAULTY = 24, 11
fault = sys.argv[1]
name = sys.argv[2] if len(sys.argv) > 2 else "anderson"

hvd.init()
LAST = hvd.rank() == hvd.size() - 1


def here(what, step):
    """Whether it is this that happens, and now and here; says when."""
    happens = fault == what and LAST and step == FAULTY
    if happens:
        print(f"FAULT at {time.time():.3f}", flush=True)
    return happens


class NoMoreImages(Exception):
    pass


class Images(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(100 + hvd.rank())
        x, y = torch.randn(12, 3, generator=generator), torch.randn(12, 2, generator=generator)
        for step in range(1, STEPS + 1):
            if here("loader", step) or here("loader observed", step):
                raise NoMoreImages("image 7 is damaged")
            if here("ends", step) or here("ends observed", step):
                return
            yield x, y


torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
opt = torch.optim.SGD(model.parameters(), lr=0.05)
if name == "horovod":
    opt = hvd.DistributedOptimizer(opt, named_parameters=model.named_parameters())
else:
    config = AndersonConfig(
        frequency=2,
        noise_gate=None,
        safeguard="loss" if fault == "second closure" else "none",
    )
    opt = DistributedAndersonOptimizer(opt, model.named_parameters(), anderson=config)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
scaler = torch.amp.GradScaler("cpu", enabled="scaler" in fault, init_scale=2.0**10)
evaluations = 0


def kill(*_):
    if LAST:
        print(f"FAULT at {time.time():.3f}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def train():
    step = 0
    for x, y in torch.utils.data.DataLoader(Images(), batch_size=None):
        step += 1

        def closure(step=step, x=x, y=y):
            global evaluations
            evaluations += 1
            if here("closure", step) or (here("second closure", step + 1) and evaluations % 3 == 2):
                raise NoMoreImages("closure")
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        if "closure" in fault:
            evaluations = 0
            opt.step(closure)
            continue
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        if here("nan", step):
            loss = loss * float("nan")
        if here("scaler", step) or here("scaler alone", step):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if here("between", step + 1):
            raise NoMoreImages("between backward and step")
        if "observed" in fault:
            opt.observe(loss)
        if fault == "scaler alone":
            scaler.step(opt)
            scaler.update()
            continue
        opt.synchronize()  # from here on others wait in the next reduction of our own
        if here("raises", step + 1):
            raise NoMoreImages("before step")
        if here("leaves", step + 1):
            sys.exit(0)
        if here("exit 0", step + 1):
            os._exit(0)
        if here("exit 1", step + 1):
            os._exit(1)
        if here("kill", step + 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if here("shutdown", step + 1):
            hvd.shutdown()
            return step
        if here("skip", step + 1):
            continue
        if fault == "kill amid" and step + 1 == FAULTY:
            opt.anderson._gather_point = kill
        if here("slow", step + 1):
            time.sleep(5)
        scaler.unscale_(opt)
        with opt.skip_synchronize():
            scaler.step(opt)
        scaler.update()
        if fault == "averaged alone" and hvd.rank() == 0 and step == FAULTY:
            print(f"FAULT at {time.time():.3f}", flush=True)
            with opt.averaged_weights():
                pass
    return step


try:
    steps = train()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if fault in ("nan", "scaler", "slow"):
        equal = len({w.numpy().tobytes() for w in hvd.allgather(flat[None])}) == 1
        print(f"rank {hvd.rank()} did {steps} steps, replicas equal: {equal}", flush=True)
finally:
    print(f"rank {hvd.rank()} ends at {time.time():.3f}", flush=True)
if name != "horovod":
    print(opt.anderson.stats.counters())
