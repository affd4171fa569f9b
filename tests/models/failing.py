"""The training program, one rank of which fails in a given step: RANK STEP OPTIONS."""

import sys

import horovod.torch as hvd

from models import train
from models.engine import Trainer

if __name__ == "__main__":
    rank, step = int(sys.argv[1]), int(sys.argv[2])
    take_step = Trainer._take_step

    def failing_step(self, *arguments):
        if hvd.rank() == rank and self.step == step:
            raise RuntimeError("a bug")
        return take_step(self, *arguments)

    Trainer._take_step = failing_step
    sys.exit(train.main(sys.argv[3:]))
