"""Trains on some ranks through faults: STATE RECORD STEPS SEED MARKS ENDING.

STATE: checkpoint, taken up where it exists. RECORD: JSON lines of memory and open files, and at the
end of the weights. MARKS: folder in which a fault that ends a run leaves its mark, so that it does
not come again when its step does. ENDING: 0 leaves out the faults that end a run.
"""

import hashlib
import json
import math
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import horovod.torch as hvd
import psutil
import torch

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
from aadl_hvd.checkpoint import load, save
from models.preemption import EXIT_CODE, SIGNALS, StopRequest
from tests.soak.plan import ENDS, EVERY, faults_of

MEASURE = 100  # steps between two looks at memory


def main():
    state, record, folder = (Path(sys.argv[i]) for i in (1, 2, 5))
    steps, seed = int(sys.argv[3]), int(sys.argv[4])
    hvd.init()
    stop = StopRequest()
    stop.listen()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    truth = torch.randn(16, 4)
    factor = 1.0  # of all gradients in this step

    for p in model.parameters():  # before Horovod reduces them, which is while backward() runs
        p.register_hook(lambda gradient: gradient * factor)
    opt = DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(history_depth=8, average_window=None),
    )
    generator = torch.Generator().manual_seed(hvd.rank())
    x = torch.randn(64, 16, generator=generator)  # all of this rank's data: a full batch
    y = torch.tanh(x @ truth)
    step = 0
    if state.exists():
        saved = load(state)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        step = saved["step"]
    plan = faults_of(steps, seed)
    if sys.argv[6] == "0":
        plan = {at: fault for at, fault in plan.items() if fault not in ENDS}
    process = psutil.Process()
    victim = seed % hvd.size()

    while step < steps:
        step += 1
        fault = plan.get(step)
        mark = folder / f"{step}"
        if fault in ENDS:
            fault = None if mark.exists() else fault
            hvd.barrier()  # all have looked before one leaves a mark
        here = hvd.rank() == (victim + step) % hvd.size()
        if fault in ENDS and here:
            mark.write_text(fault)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "leave":
                return 0
            if fault == "raise":
                raise RuntimeError(f"fault of step {step}")
            if fault == "signal":
                os.kill(os.getpid(), random.Random(step).choice(SIGNALS))

        factor = {"inf on all": math.inf, "nan on all": math.nan, "zero gradients": 0.0}.get(
            fault, math.nan if fault == "nan on one" and here else 1.0
        )

        def closure(fault=fault, here=here, step=step):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            if fault == "nan loss on one" and here:
                loss = loss * math.nan
            loss.backward()
            if fault == "raise in closure" and here:
                raise RuntimeError(f"fault of step {step}")
            return loss

        before = [p.detach().clone() for p in model.parameters()]
        momenta = {p: e["momentum_buffer"].clone() for p, e in opt.state.items() if e}
        loss = closure()
        opt.synchronize()
        # As torch.amp.GradScaler, which sees reduced gradients: all ranks skip, or none does.
        finite = all(p.grad.isfinite().all() for p in model.parameters())
        if finite and fault != "scaler skips":
            opt.observe(loss)
            with opt.skip_synchronize():
                opt.step()
        elif step % 2:  # a loop that finds out too late, and puts back what it had
            with opt.skip_synchronize():
                opt.step()
            with torch.no_grad():
                for p, old in zip(model.parameters(), before, strict=True):
                    p.copy_(old)
                    if p in momenta:
                        opt.state[p]["momentum_buffer"].copy_(momenta[p])
                    else:
                        opt.state[p].clear()

        stopping = bool(hvd.allreduce(torch.tensor(float(stop())), op=hvd.Sum, name="stop"))
        if step % EVERY == 0 or stopping or step == steps:
            whole = opt.consolidate_state_dict(to=0)
            if hvd.rank() == 0:
                save(state, {"model": model.state_dict(), "optimizer": whole, "step": step})
            hvd.barrier()
        if step % MEASURE == 0:
            found = {
                "step": step,
                "rank": hvd.rank(),
                "pid": process.pid,
                "rss": process.memory_info().rss,
                "files": process.num_fds(),
                "loss": float(loss),
            }
            with open(record, "a") as file:
                file.write(json.dumps(found) + "\n")
        if stopping:
            hvd.shutdown()
            return EXIT_CODE

    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    digests = hvd.allgather_object(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    if hvd.rank() == 0:
        stats = opt.anderson.stats
        end = {
            "digests": digests,
            "finite": bool(weights.isfinite().all()),
            "accelerated": stats.accelerated,
            "steps": stats.steps,
            "rejected": stats.rejected,
            "resets": stats.resets,
        }
        with open(record, "a") as file:
            file.write(json.dumps(end) + "\n")
    hvd.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
