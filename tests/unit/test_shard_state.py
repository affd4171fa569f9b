"""The typed state of one rank: there and back, what its fingerprint covers, what is refused."""

import dataclasses

import pytest
import torch
from checkpointing import assert_same

from aadl_hvd import CheckpointError
from aadl_hvd.checkpoint.reshard import Merger
from aadl_hvd.checkpoint.shard_state import (
    AveragesState,
    BackoffState,
    ColumnsState,
    GramState,
    LossState,
    NoiseState,
    Origin,
    OwnLossState,
    OwnNoiseState,
    OwnState,
    ResidualTrial,
    ShardState,
    TrialState,
    WindowState,
)
from aadl_hvd.checkpoint.subspace_state import (
    BlocksState,
    HandoverState,
    InvarianceState,
    OwnBlockState,
    SubspaceState,
    TrustState,
)
from aadl_hvd.core.sharding import Sharding

N, H = 5, 3


def numbers(*shape, dtype=torch.float32):
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape).to(dtype)


def full_state():
    """Of one rank, with something in every field."""
    noise = OwnNoiseState(call=6, now=(numbers(2, 4), numbers()), changes=((4, numbers(2, 4)),))
    losses = OwnLossState(losses=((1.0,), (2.0, 3.0)), variances=(0.5,), last_difference=0.1)
    block = OwnBlockState(dot=0.5, rows=(0, N), losses=(1.0, 2.0))
    return ShardState(
        sharding=Origin(layout="columns", n=N, size=1, rank=0, rows=(0, N)),
        calls=7,
        ranks=1,
        decays=(1e-4, 0.0),
        columns=ColumnsState(
            stored=4,
            count=H,
            last=1,
            index=(0, 1, 2),
            pair=numbers(2, N),
            y=numbers(H, N),
            r=numbers(H, N).neg(),
            weights=numbers(H, dtype=torch.float64),
        ),
        gram=GramState(
            matrix=torch.eye(H, dtype=torch.float64),
            fresh=(2,),
            carried=numbers(H, dtype=torch.float64),
            drift=0.5,
            products=numbers(H, 1, dtype=torch.float64),
        ),
        averages=AveragesState(
            decays=(0.9,), every=3, gains=(0.1,), measured=1, count=2, means=numbers(1, 2, N)
        ),
        window=WindowState(pushed=9, iterates=numbers(2, N)),
        noise=NoiseState(share=0.25, open=1),
        losses=LossState(observed=True, verdict_due=True, loss=1.0, tolerance=0.1),
        backoff=BackoffState(left_out=0, following=8, rejected=0.125),
        trial=TrialState(
            base=numbers(N), residual=ResidualTrial(norm=2.0, undo={"entries": {}}), loss=True
        ),
        handover=HandoverState(
            subspace=True,
            refused=1,
            wait=32,
            left=-3,
            since=9,
            into=4,
            length=10,
            idle=2,
            late=True,
        ),
        subspace=SubspaceState(
            blocks=BlocksState(
                stored=3, steps=4, gaps=(1, 1, 16), columns=numbers(2, 2, N), vectors=numbers(9, N)
            ),
            trust=TrustState(scale=0.5, phi=0.1, psi=0.2, slope=-0.3),
            invariance=InvarianceState(looks=(2, 3), largest=(0.5, 7.0)),
            base=numbers(N),
            jump=numbers(N).neg(),
        ),
        own={"0": OwnState(noise=noise, losses=losses, block=block)},
    )


def test_there_and_back():
    state = full_state()
    state.check()
    data = state.to_dict()
    again = ShardState.from_dict(data, "history")
    assert_same(again.to_dict(), data)
    assert isinstance(again.trial.residual, ResidualTrial) and again.columns.index == (0, 1, 2)


def every_field(state, path=()):
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if dataclasses.is_dataclass(value):
            yield from every_field(value, (*path, field.name))
        else:
            yield (*path, field.name), value


def with_other(state, path):
    name, *rest = path
    value = getattr(state, name)
    if rest:
        value = with_other(value, rest)
    elif isinstance(value, torch.Tensor):
        value = value + 1
    elif isinstance(value, tuple | str):
        value = value + value
    elif isinstance(value, dict):
        value = {}
    else:
        value = not value if isinstance(value, bool) else value + 1
    return dataclasses.replace(state, **{name: value})


@pytest.mark.parametrize("path", [path for path, _ in every_field(full_state())], ids=".".join)
def test_the_fingerprint_covers_what_all_ranks_share(path):
    divided = {
        *("columns.index", "columns.pair", "columns.y", "columns.r", "columns.weights"),
        *("gram.products", "averages.means", "window.iterates", "ranks", "own"),
        *("subspace.blocks.columns", "subspace.blocks.vectors", "subspace.base", "subspace.jump"),
    }
    alone = path[0] in ("sharding", "trial") or ".".join(path) in divided
    same = with_other(full_state(), path).fingerprint() == full_state().fingerprint()
    assert same == alone


@pytest.mark.parametrize("path", [path for path, _ in every_field(full_state())], ids=".".join)
def test_a_field_that_is_absent_is_named(path):
    data = full_state().to_dict()
    *way, last = path
    place = data
    for name in way:
        place = place[name]
    del place[last]
    with pytest.raises(CheckpointError, match=rf"lacks \['{last}'\]"):
        ShardState.from_dict(data, "history")


def test_cut_and_merged_it_is_what_it_was():
    state, merger = full_state(), Merger()
    for rows in ((3, 5), (0, 1), (1, 3)):
        for index in ({0, 2}, {1}):
            merger.add(state.cut(rows, frozenset(index)))
    merged = merger.merged().to_dict()
    expected = state.to_dict()
    assert merged.pop("sharding")["layout"] == "rows"
    del expected["sharding"]
    assert_same(merged, expected | {"own": {}})


def test_a_smaller_depth_keeps_the_newest():
    state = full_state()
    fitted = state.fit(Sharding("rows", N, 2, 2, 1), 2, 1)
    fitted.check()
    assert (fitted.columns.count, fitted.columns.index, fitted.gram.fresh) == (2, (0, 1), (1,))
    assert torch.equal(fitted.columns.y, state.columns.y[1:, 3:])
    assert torch.equal(fitted.averages.means, state.averages.means[..., 3:])
    assert fitted.own == {} and fitted.gram.products is None
