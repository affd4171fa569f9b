"""The training program as launched jobs run it: FOLDER STOP_STEP OPTIONS.

Each rank writes down what it sees into FOLDER. After STOP_STEP (0 for none) the ranks wait until
they are asked to stop; FOLDER/waiting says that they do.
"""

import json
import os
import sys
import time
from pathlib import Path

import horovod.torch as hvd

from models import train
from models.engine import Trainer

SEEN = ("OMP_NUM_THREADS", "HOROVOD_FUSION_THRESHOLD", "GREETING", "CUDA_VISIBLE_DEVICES")

if __name__ == "__main__":
    folder, stop_step = Path(sys.argv[1]), int(sys.argv[2])
    take_step = Trainer._take_step

    def watched_step(self, *arguments):
        report = folder / f"rank{hvd.rank()}.json"
        if not report.exists():
            seen = {
                "rank": hvd.rank(),
                "local_rank": hvd.local_rank(),
                "size": hvd.size(),
                "local_size": hvd.local_size(),
                "cores": sorted(os.sched_getaffinity(0)),
                "environment": {name: os.environ.get(name) for name in SEEN},
                "arguments": sys.argv,
            }
            report.write_text(json.dumps(seen))
        result = take_step(self, *arguments)
        if self.step == stop_step:
            (folder / "waiting").touch()
            end = time.monotonic() + 120
            while not self.stop_requested():
                assert time.monotonic() < end, "the signal did not reach this rank"
                time.sleep(0.01)
        return result

    Trainer._take_step = watched_step
    sys.exit(train.main(sys.argv[3:]))
