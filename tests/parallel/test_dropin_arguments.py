"""Combinations of Horovod's arguments, acceleration off: Horovod's weights, bit for bit.

Gradients are rounded (see `round_gradients`), for Horovod alone does not repeat itself otherwise;
Adasum does not even so (1 run of 30 in float64, two ranks) and is compared to rounding.
What Horovod refuses, as sparse gradients in groups, is refused here in the same words.
"""

import dataclasses
import itertools
import random
import warnings

import horovod.torch as hvd
import pytest
import torch
from training import BRIEF, batches, compare_with_horovod, network, train

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

STEPS = 2
HALF = (torch.float16, torch.bfloat16)
OFF = (
    AndersonConfig(frequency=10**9),  # stores in every step
    AndersonConfig(enabled=False),
    AndersonConfig(
        frequency=1, noise_gate=1e30, method="residual"
    ),  # tries in every step and finds noise
    AndersonConfig(frequency=10**9, layout="columns", residual="step", safeguard="residual"),
)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination. What is not named in a product is drawn."""

    dtype: torch.dtype = torch.float32
    gradients: str = "dense"
    compression: str = "none"
    passes: int = 1
    op: str = "Average"
    groups: int | str | None = None
    process_set: str = "global"
    predivide: float = 1.0
    optimizer: str = "momentum"
    off: int = 0

    @property
    def refusal(self):
        """Why Horovod does not take it, or None."""
        adasum, sparse = self.op == "Adasum", self.gradients != "dense"
        if adasum and (self.process_set != "global" or not hvd.mpi_enabled() or hvd.size() != 2):
            return "Adasum: MPI, 2^k ranks, all of them"
        if self.groups is not None and self.process_set == "all but rank 0":
            return "groups are agreed on with rank 0"
        if sparse and self.groups is not None and not adasum:
            return "sparse gradients do not travel in groups"
        if sparse and self.dtype == torch.float16:
            return "torch adds no sparse float16 tensors on a processor"
        if self.gradients == "sparse" and self.compression != "none" and not adasum:
            return "sparse gradients are not compressed, but decompressed"
        travels = self.dtype if self.compression == "none" or self.gradients == "sparse" else None
        if travels == torch.bfloat16 and not (adasum and self.compression != "none"):
            return "bfloat16 travels compressed only"
        return None


def cases(dtype, gradients, most):
    """Combinations for a dtype and a kind of gradient: all, or `most` of them by chance."""
    product = itertools.product(
        ("none", "fp16"),
        (1, 2),
        ("Average", "Sum", "Adasum"),
        (None, 2, "list", "num_groups"),
        ("global", "all but rank 0", "all but the last"),
    )
    draw = random.Random(f"{dtype} {gradients}")  # the same on every rank
    found = []
    for compression, passes, op, groups, process_set in product:
        names = [*OPTIMIZERS] if gradients == "dense" else ["SGD", "momentum", "Adagrad"]
        case = Case(
            dtype,
            gradients,
            compression,
            passes,
            op,
            groups,
            process_set,
            predivide=draw.choice((1.0, 2.0)) if op == "Average" else 1.0,
            optimizer=draw.choice(names[:3] if dtype in HALF else names),
            off=draw.randrange(len(OFF)),
        )
        if case.refusal is None:
            found.append(case)
    return found if most is None else draw.sample(found, min(len(found), 4 if BRIEF else most))


def model_of(case):
    if case.gradients == "dense":
        return network(case.dtype)
    torch.manual_seed(3)
    table = torch.nn.Embedding(7, 3, sparse=True)
    return torch.nn.Sequential(table, torch.nn.Linear(3, 2)).to(case.dtype)


def data_of(case):
    data = batches(STEPS * case.passes, case.dtype)
    if case.gradients == "dense":
        return data
    # Other rows on every rank and in every step, some of them twice.
    step = itertools.count(hvd.rank())
    return [(torch.tensor([next(step) % 7, 2, 2, 5, 5, 6]), y) for _, y in data]


def arguments_of(case, model, process_sets):
    listed = [[model[0].weight, list(model.parameters())[-1]]]
    return {
        "compression": getattr(hvd.Compression, case.compression),
        "backward_passes_per_step": case.passes,
        "op": getattr(hvd, case.op),
        "gradient_predivide_factor": case.predivide,
        "groups": {"list": listed, "num_groups": None}.get(case.groups, case.groups),
        "num_groups": 2 if case.groups == "num_groups" else 0,
        "sparse_as_dense": case.gradients == "sparse as dense",
        "process_set": process_sets[case.process_set],
    }


def config_of(case):
    config = OFF[case.off]
    return dataclasses.replace(config, residual="step") if case.op == "Adasum" else config


@pytest.fixture
def process_sets(all_but_rank_0, all_but_the_last):
    return {
        "global": hvd.global_process_set,
        "all but rank 0": all_but_rank_0,
        "all but the last": all_but_the_last,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("gradients", ["dense", "sparse", "sparse as dense"])
@pytest.mark.parametrize(
    "most", [16, pytest.param(None, marks=pytest.mark.long)], ids=["some", "every"]
)
def test_combinations(dtype, gradients, most, process_sets):
    chosen = cases(dtype, gradients, most)
    if not chosen:
        pytest.skip("Horovod takes none of them")
    for case in chosen:
        try:
            opt = compare_with_horovod(
                lambda case=case: model_of(case),
                lambda model, case=case: OPTIMIZERS[case.optimizer](model.parameters()),
                lambda model, opt, case=case: train(model, opt, data_of(case), case.passes),
                config=config_of(case),
                arguments=lambda model, case=case: arguments_of(case, model, process_sets),
                exact=case.op != "Adasum",
            )
            assert opt.anderson.stats.stored == (0 if case.off == 1 else STEPS)
            tried = sum(opt.anderson.stats.rejected.values())
            assert tried == opt.anderson.stats.rejected["noise"] == (case.off == 2)
        except BaseException as error:
            error.add_note(str(case))
            raise


@pytest.mark.parametrize(
    "case",
    [
        Case(gradients="sparse", groups=2),
        Case(gradients="sparse as dense", groups=1),
        Case(gradients="sparse", compression="fp16"),
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.bfloat16, gradients="sparse", compression="fp16"),
        Case(dtype=torch.float16, gradients="sparse"),
    ],
    ids=lambda case: case.refusal,
)
def test_what_horovod_refuses(case, process_sets):
    assert case.refusal is not None
    errors = []
    for wrap in (hvd.DistributedOptimizer, DistributedAndersonOptimizer):
        model = model_of(case)
        names = [(f"{wrap.__name__}.{case}.{n}", p) for n, p in model.named_parameters()]
        given = arguments_of(case, model, process_sets)
        opt = wrap(OPTIMIZERS[case.optimizer](model.parameters()), names, **given)
        with pytest.raises(Exception, match=r".") as error, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, opt, data_of(case))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
