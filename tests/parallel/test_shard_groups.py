"""Several histories, each shared by some of the ranks: as one for all, with the same bits."""

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from problems import TEXTBOOK, counts
from test_layouts import CASES, STEPS, Regression, assert_same_on_all_ranks
from training import flat, full_batch, loss_of, network

from aadl_hvd import AndersonConfig, ConfigError, DistributedAndersonOptimizer

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def own_group(shard_groups):
    """The process set that this rank is in."""
    return next(group for group in shard_groups if group.included())


@pytest.mark.parametrize("name", CASES)
def test_groups_take_the_path_of_the_world(name, own_group):
    problem = Regression()
    paths = {}
    for group in ("world", own_group):
        config = AndersonConfig(**TEXTBOOK | CASES[name], shard_group=group)
        path, opt = problem.run_here(config, STEPS, torch.float64)
        assert_same_on_all_ranks(path, counts(opt), "groups")
        assert counts(opt)["accelerated"] > 1
        paths[str(group)] = path, counts(opt)
        share = opt.anderson._shard.sharding.size
        rows, window = -(-problem.n // share), config.average_window or 0
        assert share == (hvd.size() if group == "world" else own_group.size())
        assert opt.anderson.history_bytes <= 8 * rows * (2 * config.history_depth + 4 + window)
    (world, world_counts), (groups, group_counts) = paths.values()
    assert group_counts == world_counts
    assert np.abs(groups - world).max() < 1e-11 * np.abs(world).max()


def test_default_settings_with_noise_gate_averages_and_observe(own_group):
    """What rides along is summed over the world, not over a group."""
    # In float64: 40 accelerated steps make of float32's rounding 2 % of the noise, now and then.
    numbers = {}
    for group in ("world", own_group):
        model = network(torch.float64)
        opt = DistributedAndersonOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
            named_parameters=model.named_parameters(),
            anderson=AndersonConfig(shard_group=group),
        )
        for x, y in full_batch(40, torch.float64):
            opt.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            opt.observe(loss)
            opt.step()
        weights = flat(model)
        with opt.averaged_weights(which=0.95):
            both = torch.stack([weights, flat(model)]).numpy()
        assert_same_on_all_ranks(both, counts(opt), "default")
        stats = opt.anderson.stats
        assert stats.accelerated > 3
        gains = list(opt.anderson.average_gains.values())
        numbers[str(group)] = [stats.noise_variance, stats.signal, *gains]
    world, groups = (np.array(found) for found in numbers.values())
    np.testing.assert_allclose(groups, world, rtol=1e-6)


def test_nodes(nodes, monkeypatch):
    """The launcher says which ranks share a node: here all of them, or two by two."""
    problem = Regression()
    config = AndersonConfig(**TEXTBOOK | CASES["default"], shard_group="node")
    if nodes > 1:
        monkeypatch.setenv("HOROVOD_DYNAMIC_PROCESS_SETS", "0")
        with pytest.raises(ConfigError, match="Set HOROVOD_DYNAMIC_PROCESS_SETS=1"):
            wrapped("node")
        monkeypatch.undo()
    world, _ = problem.run_here(AndersonConfig(**TEXTBOOK | CASES["default"]), 6, torch.float64)
    for _ in range(2):  # the second time Horovod has the process sets already
        path, opt = problem.run_here(config, 6, torch.float64)
        assert opt.anderson._shard.sharding.groups == nodes
        assert opt.anderson._shard.sharding.size == hvd.size() // nodes
        assert_same_on_all_ranks(path, counts(opt), "nodes")
        assert np.abs(path - world).max() < 1e-11 * np.abs(world).max()


def wrapped(group):
    model = network()
    return DistributedAndersonOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), anderson=AndersonConfig(shard_group=group)
    )


def test_bad_groups_are_an_error_on_every_rank(all_but_rank_0, own_group):
    with pytest.raises(ConfigError, match=r"shard_group on rank 0: .* leaves it out"):
        wrapped(all_but_rank_0)
    with pytest.raises(ConfigError, match="is not registered"):
        wrapped(hvd.ProcessSet(range(hvd.size())))
    first = hvd.rank() == 0
    if hvd.size() > 2:
        with pytest.raises(ConfigError, match=r"in exactly one of them|of one size"):
            wrapped(hvd.global_process_set if first else all_but_rank_0)
    wrapped(own_group).zero_grad()  # and everything goes on
