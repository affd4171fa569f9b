"""A history that moves between ranks while it is in their memory, under any shardings."""

import dataclasses
import functools

import pytest
from checkpointing import Run, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from aadl_hvd import AndersonConfig, checkpoint
from aadl_hvd.checkpoint import transfer
from aadl_hvd.checkpoint.shard_state import ShardState
from aadl_hvd.checkpoint.state_dict import examine, parameter_table
from aadl_hvd.comm.simulated import run_ranks

LAYOUTS = {
    "rows": {"average_window": 3},
    "columns": {"layout": "columns", "history_depth": 5, "safeguard": "residual"},
    "bfloat16": {"history_dtype": "bfloat16", "history_depth": 4},
    "groups": {"history_depth": 7},
    "subspace": {"method": "subspace"},
}
STEPS = {"subspace": 53}  # in mid-block


def groups_of(layout, size):
    return 2 if layout == "groups" and size % 2 == 0 else 1


@functools.cache
def trained(layout, size, steps=None):
    """The state_dict of every rank, with its part."""

    def program(comm):
        run = Run(comm, LAYOUTS[layout], groups=groups_of(layout, size))
        run.train(steps or STEPS.get(layout, 22))
        assert run.opt.anderson.columns > 2
        return run.opt.sharded_state_dict()

    return run_ranks(size, program)


def shards_of(states):
    return [ShardState.from_dict(state["anderson"]["history"], "history") for state in states]


def sharding_of(comm, layout):
    run = Run(comm, LAYOUTS[layout], groups=groups_of(layout, comm.size))
    return run.opt.anderson.share(32), parameter_table(run.opt)


def fitted(anderson, history, sharding, table, comm):
    config = AndersonConfig(**{"noise_gate": None} | LAYOUTS[anderson["layout"]]).to_dict()
    state = {k: v for k, v in anderson.items() if k != "layout"} | {"history": history}
    state["config"] = config
    found = examine(state, table, config, sharding, comm.size, comm.rank)
    assert found.shard is not None, found.left_out
    return found.shard.to_dict()


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    data=st.data(),
)
def test_each_rank_gets_its_part_or_all_know_whose_is_lost(layout, before, after, data):
    """Whoever holds what: as if all parts had been merged and everybody had loaded the whole."""
    states = trained(layout, before)
    parts = shards_of(states)
    holders = [data.draw(st.lists(st.integers(0, after - 1), max_size=2)) for _ in parts]
    whole = checkpoint.merge_shards(states)["anderson"]

    def program(comm):
        held = [part for part, ranks in zip(parts, holders, strict=True) if comm.rank in ranks]
        if comm.rank == 0 and not held:
            return None, None, "rank 0 is one that was there before"
        sharding, table = sharding_of(comm, layout)
        history, why = transfer.redistribute(comm, held, sharding)
        if history is None:
            return None, None, why
        assert history.sharding.rows == sharding.rows
        assert history.columns.y.shape[1] == sharding.rows[1] - sharding.rows[0]
        assert len(history.columns.index) <= len(sharding.slots)
        anderson = whole | {"layout": layout}
        found = fitted(anderson, history.to_dict(), sharding, table, comm)
        return found, fitted(anderson, whole["history"], sharding, table, comm), why

    if not any(0 in ranks for ranks in holders):
        return
    outcome = run_ranks(after, program)
    count = groups_of(layout, before)
    size = before // count
    held = {rank % size for rank, ranks in enumerate(holders) if ranks}
    lost = sorted(set(range(size)) - held)
    for found, expected, why in outcome:
        if not lost:
            assert why == ""
            found["own"], expected["own"] = {}, {}
            assert_same(found, expected)
        elif found is not None:  # the columns layout: a rank of more than there are columns
            assert layout == "columns"
        else:
            assert why.startswith(f"the shard of rank{'s' * (len(lost) > 1)} {lost[0]}")
            assert f" of {size} that shared it is lost" in why
    assert len({found is None for found, _, _ in outcome}) == 1


def test_parts_of_another_moment_are_of_no_use():
    older, newer = (shards_of(trained("rows", 3, steps)) for steps in (22, 23))

    def program(comm):
        part = older[2] if comm.rank == 2 else newer[comm.rank]
        return transfer.redistribute(comm, [part], sharding_of(comm, "rows")[0])

    for history, why in run_ranks(3, program):
        assert history is None
        assert why == "the shard of rank 2 of 3 that shared it is lost, or of another moment"


def test_a_rank_that_cannot_hand_out_its_part_ends_nothing():
    parts = shards_of(trained("rows", 2))
    columns = dataclasses.replace(parts[1].columns, y="no tensor")
    damaged = dataclasses.replace(parts[1], columns=columns)

    def program(comm):
        part = damaged if comm.rank == 1 else parts[0]
        history = transfer.redistribute(comm, [part], sharding_of(comm, "rows")[0])
        comm.allgather_object(None)  # and all are still in step
        return history

    for history, why in run_ranks(3, program):
        assert history is None
        assert why.startswith("rank 1 could not hand out or take in a shard: TypeError")


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_stored_is_no_loss(size):
    parts = shards_of(trained_nothing(size))

    def program(comm):
        return transfer.redistribute(comm, [parts[comm.rank]], sharding_of(comm, "rows")[0])

    assert run_ranks(size, program) == [(None, "")] * size


def trained_nothing(size):
    return run_ranks(size, lambda comm: Run(comm, LAYOUTS["rows"]).opt.sharded_state_dict())


def test_pieces_are_all_that_travels():
    """From 4 ranks to 3: nobody is sent what it has, and no byte goes to two ranks."""
    parts = shards_of(trained("rows", 4))
    held = {0: [0], 1: [1], 2: [2, 3]}
    sent = []

    def program(comm):
        original = comm.all_to_all

        def all_to_all(outgoing):
            for to, data in outgoing.items():
                pieces = transfer.from_bytes(data)
                sent.extend((comm.rank, to, *piece["sharding"]["rows"]) for piece in pieces)
            return original(outgoing)

        comm.all_to_all = all_to_all
        mine = [parts[i] for i in held[comm.rank]]
        return transfer.redistribute(comm, mine, sharding_of(comm, "rows")[0])

    assert all(history is not None for history, _ in run_ranks(3, program))
    # Rows before: 0 to 7, 8 to 15, 16 to 23 and 24 to 31; after: 0 to 10, 11 to 21, 22 to 31.
    assert sorted(sent) == [(1, 0, 8, 11), (2, 1, 16, 22)]
