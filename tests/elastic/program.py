"""Training in which hosts leave and come: FOLDER, in which the file `hosts` says which there are.

The same full batch in every step, however many ranks share it: the loss goes on where it was.
Prints a line of JSON for every step, from rank 0, and one at the end, from every rank.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

import aadl_hvd
from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

FOLDER = Path(sys.argv[1])
AFTER = 16  # steps with each set of hosts
TIME_LIMIT = 60.0  # seconds that a change of hosts may take

logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
opt = DistributedAndersonOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-4),
    named_parameters=model.named_parameters(),
    anderson=AndersonConfig(frequency=3, history_depth=6),
)
state = aadl_hvd.elastic.TorchState(model=model, optimizer=opt, step=0, phase=0, since=0)
generator = torch.Generator().manual_seed(7)
X = torch.randn(60, 4, generator=generator)
Y = torch.sin(X).sum(dim=1, keepdim=True)


def say(**what):
    os.write(1, (json.dumps(what) + "\n").encode())  # whole lines, also when killed right after


def set_hosts(hosts):
    partial = FOLDER / "hosts.partial"
    partial.write_text("".join(f"{host}:1\n" for host in hosts))
    os.replace(partial, FOLDER / "hosts")


def change_hosts():
    """What happens to this set of hosts in the end; on every rank."""
    hosts = hvd.allgather_object(os.environ["HOROVOD_HOSTNAME"])
    if hvd.rank() == 0 and state.phase == 1:
        set_hosts([*hosts, "127.1"])  # the same machine by another name
    if hvd.rank() == 0 and state.phase == 2:
        set_hosts(hosts[:-1])


def kill_amid_the_step():
    """The last rank goes when its gradients are on their way, those of others as well."""
    if state.phase == 0 and hvd.rank() == hvd.size() - 1:

        def die(_):
            os.kill(os.getpid(), signal.SIGKILL)

        model[0].bias.register_post_accumulate_grad_hook(die)


@hvd.elastic.run
def train(state):
    size = hvd.size()
    expected = {0: 3, 1: 2, 2: 3, 3: 2}
    if state.since and size == expected.get(state.phase + 1):
        state.phase, state.since = state.phase + 1, 0
    stats = opt.anderson.stats
    changed = time.monotonic()
    while state.phase < 3 or state.since < AFTER:
        if state.since == AFTER:
            if state.phase == 0:
                kill_amid_the_step()
            else:
                change_hosts()
        x, y = X[hvd.rank() :: size], Y[hvd.rank() :: size]
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        state.step, state.since = state.step + 1, state.since + 1
        loss = float(hvd.allreduce(loss.detach(), name="loss"))
        if hvd.rank() == 0:
            say(
                step=state.step,
                phase=state.phase,
                size=size,
                loss=loss,
                stored=stats.stored,
                columns=opt.anderson.columns,
                accelerated=stats.accelerated,
                descent=stats.rejected["descent"],
                resets=stats.resets,
            )
        if state.since > AFTER:
            time.sleep(0.1)  # Horovod looks for hosts once a second
            assert time.monotonic() - changed < TIME_LIMIT, "no change of hosts"
        else:
            changed = time.monotonic()
        state.commit()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    say(
        end=hvd.rank(),
        size=size,
        weights=hashlib.sha256(weights).hexdigest(),
        accelerated=stats.accelerated,
        steps=stats.steps,
    )


train(state)
