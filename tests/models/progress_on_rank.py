"""A training's display without the training, on each rank: KIND."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.progress import Progress

STEPS = 4

if __name__ == "__main__":
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", 0)))
    progress = Progress(sys.argv[1] if rank == 0 else "off", total=STEPS, done=0)
    progress.say("the first line")
    for step in range(1, STEPS + 1):
        time.sleep(0.15)  # tqdm draws ten times a second
        interval = SimpleNamespace(step=step, steps=1, loss=0.5, images=8, seconds=1.0)
        progress.update(interval, 1, None)
    progress.say("the last line")
    progress.close()
    if rank == 0:
        print("after the bar", flush=True)
