"""A noisy regression, and the noise that gradients of it are measured to have."""

import numpy as np
import torch

from aadl_hvd.core.noise import NoiseMeter
from aadl_hvd.optim.gradient_samples import GradientSamples

DOUBLE = torch.float64


def payload_of(meter):
    return meter.payload(meter.measured().numpy())


def network():
    torch.manual_seed(3)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
    return torch.nn.Sequential(*layers).double()


class Regression:
    """A tanh network on 400 samples, each with a label of its own, in mini-batches of 8."""

    BATCH = 8

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(400, 4, generator=generator, dtype=DOUBLE)
        self.y = torch.sin(self.x.sum(dim=1, keepdim=True))
        self.y += 0.5 * torch.randn(400, 1, generator=generator, dtype=DOUBLE)

    def loss(self, model, chosen):
        return (model(self.x[chosen]) - self.y[chosen]).square().mean()

    def draw(self, generator, count=BATCH):
        return torch.randint(len(self.x), (count,), generator=generator)

    def true_variance(self, model, batch):
        """Of the mean gradient over `batch` draws with replacement, at the weights in place."""
        gradients = []
        for i in range(len(self.x)):
            grads = torch.autograd.grad(self.loss(model, [i]), model.parameters())
            gradients.append(torch.cat([g.reshape(-1) for g in grads]))
        return float(torch.stack(gradients).var(dim=0, correction=0).sum()) / batch


def measured(steps, samples, draws, scaled=lambda p, k: None, factor=1.0, model=None, rate=1e-4):
    """Mean of sigma^2 over steps of a slow trajectory; `draws` -> list of losses, one a sample.

    What GradientSamples sees of S ranks with one sample each, or of one rank with S samples.
    """
    model = network() if model is None else model
    parameters = list(model.parameters())
    one_rank = samples > 1
    ranks = 1 if one_rank else len(draws(model, 0))
    takers = [GradientSamples(parameters, samples, factor) for _ in range(ranks)]
    meters, found = [NoiseMeter() for _ in takers], []
    for k in range(steps):
        losses = draws(model, k)
        if one_rank:
            for p in parameters:
                p.grad = None
            for loss in losses:
                loss.backward()
                for p in parameters:
                    takers[0].take(p)
        else:
            own = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
            for taker, gradients in zip(takers, own, strict=True):
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient
                    taker.take(p)
            for i, p in enumerate(parameters):
                p.grad = factor * sum(gradients[i] for gradients in own) / ranks
            for taker in takers:
                taker.take_mean()
        for p in parameters:
            scaled(p, k)
        sums = np.zeros(NoiseMeter.PAYLOAD)
        for taker, meter in zip(takers, meters, strict=True):
            meter.note(taker.deviations(), k)
            sums = sums + payload_of(meter)
        if (both := NoiseMeter.variance(sums, ranks)) is not None:
            found.append(both[0])
        with torch.no_grad():
            for p in parameters:
                p -= rate * p.grad
    return np.mean(found), len(found), model
