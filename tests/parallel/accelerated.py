"""Settings, optimizers and loops of the tests in which acceleration fires."""

import torch
from problems import TEXTBOOK
from training import batches, network, train

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

DOUBLE = torch.float64
SETTINGS = TEXTBOOK | {"history_depth": 4, "frequency": 3}  # two accelerated steps in STEPS
# For comparisons to rounding: new data in every step keep the least squares well conditioned;
# they leave nothing to gain, so every point is taken.
ALWAYS = AndersonConfig(**SETTINGS, safeguard="none", relaxation=0.3)
STEPS = 7

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.02, "fused": True}),
}


def double_network():
    return network(DOUBLE)


def first_layer_frozen():
    model = double_network()
    model[0].weight.requires_grad_(False)
    return model


def built(name, parameters):
    cls, settings = OPTIMIZERS[name]
    return cls(parameters, **settings)


def wrapped(model, optimizer, arguments=None, **settings):
    return DistributedAndersonOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        anderson=AndersonConfig(**SETTINGS | settings),
        **arguments or {},
    )


# Training loops. Each takes (model, optimizer).


def plain(model, opt, steps=STEPS):
    train(model, opt, batches(steps, DOUBLE))
