"""A training with FSDP2 that goes on from checkpoints of another number of ranks.

    sharded.py FOLDER METHOD STEPS [--copies COPIES]

The steps go on from the last ones that a folder has. The ranks share each batch, so that their
number changes nothing but rounding. With COPIES of the shards it is HSDP.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from training import data, mine, network, sgd

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

SETTINGS = {
    "residual": {"method": "residual", "noise_gate": None, "history_depth": 4},
    "subspace": {"method": "subspace"},
}

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("method", choices=SETTINGS)
parser.add_argument("steps", type=int)
parser.add_argument("--copies", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(1)
dist.init_process_group("gloo")
size = dist.get_world_size()
shape = (size,) if args.copies == 1 else (args.copies, size // args.copies)
mesh = dist.init_device_mesh("cpu", shape)
model = network()
for layer in (*(part for part in model if [*part.parameters()]), model):
    fully_shard(layer, mesh=mesh)
base = sgd(model)
done = max((int(path.name) for path in args.folder.glob("*")), default=0)
last = args.folder / str(done)
states = dict(zip(("model", "base"), get_state_dict(model, base), strict=True))
if done:
    dcp.load(states, checkpoint_id=last / "base")
    model_state, base_state = states["model"], states["base"]
    set_state_dict(model, base, model_state_dict=model_state, optim_state_dict=base_state)
opt = DistributedAndersonOptimizer(base, anderson=AndersonConfig(**SETTINGS[args.method]))
if done:
    opt.load_history(last / "history")
for k in range(done, done + args.steps):
    x, y = data(k, mine())
    opt.zero_grad()
    (model(x) - y).square().mean().backward()
    opt.step()
states = dict(zip(("model", "base"), get_state_dict(model, opt), strict=True))
last = args.folder / str(done + args.steps)
dcp.save(states, checkpoint_id=last / "base")
opt.save_history(last / "history")
stats = opt.anderson.stats
said = {"accelerated": stats.accelerated, "resets": sum(stats.resets.values())}
weights = [p.full_tensor().detach().reshape(-1) for p in model.parameters()]
if dist.get_rank() == 0:
    said["weights"] = torch.cat(weights).tolist()
os.write(1, (json.dumps(said) + "\n").encode())
dist.destroy_process_group()
