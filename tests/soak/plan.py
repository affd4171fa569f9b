"""Which fault comes in which step of a soak."""

import random

EVERY = 50  # steps between two checkpoints
# After these training goes on; after the others it is launched again.
NUMBERS = (
    "nan on one",
    "inf on all",
    "nan loss on one",
    "zero gradients",
    "scaler skips",
    "nan on all",
)
ENDS = ("raise", "raise in closure", "kill", "leave", "signal")


def faults_of(steps, seed):
    """{step: fault} of a run, the same on every rank and in every launch."""
    draw = random.Random(seed)
    found = {step: draw.choice(NUMBERS) for step in draw.sample(range(1, steps), steps // 20)}
    ends = [ENDS[i % len(ENDS)] for i in range(max(len(ENDS), steps // 500))]
    places = draw.sample(range(EVERY + 1, steps - 1), len(ends))
    return found | dict(zip(sorted(places), ends, strict=True))
