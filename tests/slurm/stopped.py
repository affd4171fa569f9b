"""Ranks of torch.distributed that wait to be asked to stop. In their second life they end."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
dist.init_process_group("gloo")
lives = os.environ.get("SLURM_RESTART_COUNT", "0")
print(f"rank {dist.get_rank()} of {dist.get_world_size()}, restarts: {lives}", flush=True)
while lives == "0":
    stop = torch.tensor(len(asked))
    dist.all_reduce(stop)
    if stop:
        print(f"rank {dist.get_rank()} stops", flush=True)
        dist.barrier()  # what ranks write is written: torchrun ends the others when one has left
        sys.exit(75)
    time.sleep(0.1)
dist.barrier()
dist.destroy_process_group()
