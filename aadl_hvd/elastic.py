"""Horovod elastic: `TorchState` for optimizers with Anderson acceleration.

    state = aadl_hvd.elastic.TorchState(model=model, optimizer=opt, epoch=0, batch=0)

The public name of `aadl_hvd.engines.horovod_elastic`. Importing this module imports Horovod.
"""

from aadl_hvd.engines.horovod_elastic import TorchState

__all__ = ["TorchState"]
