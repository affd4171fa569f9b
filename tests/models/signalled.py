"""The training program, one rank of which is signalled in a given step: RANK STEP SIGNAL OPTIONS.

SIGNAL+ goes to the rank's child processes too, as from a scheduler that signals a whole job.
"""

import os
import signal
import sys

import horovod.torch as hvd
import psutil

from models import train
from models.engine import Trainer

if __name__ == "__main__":  # the loader's worker processes import this file
    rank, step, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    take_step = Trainer._take_step

    def signalled_step(self, *arguments):
        result = take_step(self, *arguments)
        if hvd.rank() == rank and self.step == step:
            number = getattr(signal, name.rstrip("+"))
            children = psutil.Process().children(recursive=True)
            if name.endswith("+"):
                assert len(children) > 1, "the loader has no worker processes"
                for child in children:
                    child.send_signal(number)
            os.kill(os.getpid(), number)
        return result

    Trainer._take_step = signalled_step
    sys.exit(train.main(sys.argv[4:]))
