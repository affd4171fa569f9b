"""The training program, whose rank 0 cannot make files longer after a given step: STEP OPTIONS."""

import resource
import sys

import horovod.torch as hvd

from models import train
from models.engine import Trainer

if __name__ == "__main__":
    step = int(sys.argv[1])
    take_step = Trainer._take_step

    def limited_step(self, *arguments):
        if hvd.rank() == 0 and self.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return take_step(self, *arguments)

    Trainer._take_step = limited_step
    sys.exit(train.main(sys.argv[2:]))
