"""Who holds what: every row and every slot exactly once, in blocks that differ little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aadl_hvd import ConfigError
from aadl_hvd.core.sharding import Sharding

SIZES = (st.integers(0, 300), st.integers(1, 40), st.integers(1, 50))


@given(*SIZES)
def test_rows_are_disjoint_complete_in_order_and_balanced(n, depth, size):
    shards = [Sharding("rows", n, depth, size, rank) for rank in range(size)]
    rows = [row for shard in shards for row in range(*shard.rows)]
    assert rows == list(range(n))
    lengths = [hi - lo for lo, hi in (shard.rows for shard in shards)]
    assert max(lengths) == -(-n // size)
    # Full blocks come first, so that gathered blocks, padded at the end, are the flat vector.
    full = [length for length in lengths if length == shards[0].block]
    assert lengths[: len(full)] == full or n == 0
    for rank, shard in enumerate(shards):
        assert shard.block == max(lengths)
        assert shard.rows[0] == min(rank * shard.block, n)
        assert shard.slots == tuple(range(depth))
        assert shard.counts_replicated
        assert shard.summed == shard.counted == slice(0, lengths[rank])


@given(*SIZES, st.integers(1, 9))
def test_groups_hold_everything_and_sum_up_every_row_once(n, depth, size, groups):
    shards = [
        Sharding("rows", n, depth, size, rank, groups, group)
        for group in range(groups)
        for rank in range(size)
    ]
    for shard in shards:
        alone = Sharding("rows", n, depth, size, shard.rank)
        assert (shard.rows, shard.slots, shard.block) == (alone.rows, alone.slots, alone.block)
        assert shard.counted == shard.summed
    summed = [row for shard in shards for row in range(*shard.rows)[shard.summed]]
    assert sorted(summed) == list(range(n))


@given(*SIZES)
def test_columns_are_disjoint_complete_and_balanced(n, depth, size):
    shards = [Sharding("columns", n, depth, size, rank) for rank in range(size)]
    assert sorted(slot for shard in shards for slot in shard.slots) == list(range(depth))
    held = [len(shard.slots) for shard in shards]
    assert max(held) == -(-depth // size)
    assert max(held) - min(held) <= 1
    for rank, shard in enumerate(shards):
        assert all(slot % size == rank for slot in shard.slots)
        assert (shard.rows, shard.block) == ((0, n), n)
    # What all ranks can compute enters a sum once.
    assert [shard.counts_replicated for shard in shards] == [True] + [False] * (size - 1)
    assert [range(n)[shard.counted] for shard in shards] == [range(n)] + [range(0)] * (size - 1)
    assert all(shard.summed == slice(0, n) for shard in shards)


@pytest.mark.parametrize(
    ("groups", "group", "layout"),
    [(0, 0, "rows"), (2, 2, "rows"), (2, -1, "rows"), (2, 1, "columns")],
)
def test_bad_groups(groups, group, layout):
    with pytest.raises(ConfigError, match=f"groups={groups}"):
        Sharding(layout, 5, 2, 1, 0, groups, group)


@pytest.mark.parametrize(
    ("layout", "n", "depth", "size", "rank"),
    [
        ("row", 5, 2, 1, 0),
        ("rows", -1, 2, 1, 0),
        ("rows", 5, 0, 1, 0),
        ("rows", 5, 2, 0, 0),
        ("rows", 5, 2, 3, 3),
        ("columns", 5, 2, 3, -1),
    ],
)
def test_bad_arguments(layout, n, depth, size, rank):
    with pytest.raises(ConfigError, match="Invalid"):
        Sharding(layout, n, depth, size, rank)
