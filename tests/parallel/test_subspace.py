"""The subspace method on real ranks: one process with the whole batch, replicas, faults, resume."""

import copy
import math

import horovod.torch as hvd
import pytest
import torch
from training import assert_replicas_equal, flat, unless_brief

from aadl_hvd import (
    AndersonConfig,
    AndersonOptimizer,
    DistributedAndersonOptimizer,
    ReplicaMismatchError,
)

SUBSPACE = AndersonConfig(method="subspace", averages=(0.9,))
OVERLAP = AndersonConfig(method="subspace", averages=(0.9,), overlap=True)
BATCH, STEPS = 8, 80
LAST = hvd.rank() == hvd.size() - 1
DOUBLE = torch.float64
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=1e-3),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.004, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
}


class Training:
    """A small network on noisy targets, in mini-batches: `parts` of them make the whole batch."""

    def __init__(self, base, config=SUBSPACE, alone=False, **options):
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
        ).double()
        optimizer = BASES[base](self.model.parameters())
        if alone:
            self.opt = AndersonOptimizer(optimizer, anderson=config, independent=True)
        else:
            named = self.model.named_parameters()
            self.opt = DistributedAndersonOptimizer(optimizer, named, anderson=config, **options)
        self.ranks = range(hvd.size()) if alone else [hvd.rank()]
        self.k = 0

    def loss(self):
        """Of this rank's part of the batch of step k; of the whole batch in one process."""
        parts = []
        for rank in self.ranks:
            generator = torch.Generator().manual_seed(1000 * self.k + rank)
            x = torch.randn(BATCH, 6, generator=generator, dtype=DOUBLE)
            y = x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(BATCH, 1, generator=generator)
            parts.append((self.model(x) - y).square().mean())
        return torch.stack(parts).mean()

    def train(self, until, observe=True, spoilt=()):
        while self.k < until:
            self.k += 1
            self.opt.zero_grad()
            loss = self.loss()
            loss.backward()
            before = copy.deepcopy(self.model.state_dict())
            if LAST and self.k in spoilt:
                next(self.model.parameters()).grad.fill_(math.nan)
            if observe:
                self.opt.observe(loss)
            self.opt.step()
            if self.k in spoilt:
                self.model.load_state_dict(before)
        return self

    @property
    def stats(self):
        return self.opt.anderson.stats


@pytest.mark.parametrize("base", unless_brief(*BASES))
@pytest.mark.parametrize("observe", [True, False])
def test_ranks_train_as_one_process_with_the_whole_batch(base, observe):
    ours = Training(base).train(STEPS, observe)
    assert_replicas_equal(ours.model)
    one = Training(base, alone=True).train(STEPS, observe)
    assert ours.stats.jumps == one.stats.jumps > 1, (ours.stats, one.stats)
    torch.testing.assert_close(flat(ours.model), flat(one.model), rtol=0.0, atol=1e-8)
    assert ours.stats.wobble == pytest.approx(one.stats.wobble, rel=1e-5, nan_ok=not observe)
    assert ours.stats.walk == pytest.approx(one.stats.walk, rel=1e-5)
    assert ours.stats.promised_gain == pytest.approx(one.stats.promised_gain, rel=1e-5)


@pytest.mark.parametrize("base", unless_brief("Nesterov", "Adam"))
def test_jumps_that_are_added_one_step_later(base):
    """As in one process, with the same bits on all ranks in every step."""
    ours, one = Training(base, OVERLAP), Training(base, OVERLAP, alone=True)
    for k in range(1, STEPS + 1):
        ours.train(k)
        assert_replicas_equal(ours.model)
    one.train(STEPS)
    assert ours.stats.jumps == one.stats.jumps > 1, (ours.stats, one.stats)
    torch.testing.assert_close(flat(ours.model), flat(one.model), rtol=0.0, atol=1e-8)
    assert ours.stats.promised_gain == pytest.approx(one.stats.promised_gain, rel=1e-5)


def test_resume_before_a_jump_is_added_is_bitwise():
    """With sums over ranks, averaged weights and a state for all while the jump travels."""
    ours, left = Training("Nesterov", OVERLAP), Training("Nesterov", OVERLAP)
    saved = []
    for k in range(1, STEPS + 1):
        ours.train(k)
        left.train(k)  # the same, and nothing is asked of it on the way
        if not ours.opt.anderson._handover.late or len(saved) == 2:
            continue
        with ours.opt.averaged_weights(which=0.9):
            pass
        full = ours.opt.consolidate_state_dict(to=0)
        full = hvd.broadcast_object(full, root_rank=0, name="full")
        shard = ours.opt.state_dict() | ours.opt.sharded_state_dict()
        weights = copy.deepcopy(ours.model.state_dict())
        saved += [(k, weights, copy.deepcopy(state)) for state in (shard, full)]
    assert len(saved) == 2 and ours.stats.jumps > 1
    assert torch.equal(flat(left.model), flat(ours.model))
    for k, weights, state in saved:
        again = Training("Nesterov", OVERLAP)
        again.model.load_state_dict(weights)
        again.opt.load_state_dict(state)
        again.k = k
        again.train(STEPS)
        assert torch.equal(flat(again.model), flat(ours.model)), k
        assert again.stats.counters() == ours.stats.counters()


def test_the_noise_gate_hands_over():
    """The default: the gate stays shut in 8 attempts, then blocks of 10 steps begin."""
    config = AndersonConfig(noise_gate=1e30)
    ours = Training("SGD", config).train(STEPS)
    assert_replicas_equal(ours.model)
    assert ours.stats.method == "subspace"
    assert ours.stats.block_length == 10
    # The first attempts have too few pairs, and are counted under no cause.
    assert ours.stats.rejected["noise"] >= 5
    assert ours.stats.jumps > 0, ours.stats


def test_a_bad_gradient_on_one_rank():
    """The block is forgotten on all ranks, and the next ones are taken in again."""
    ours = Training("SGD").train(STEPS, spoilt=(34, 35))
    assert_replicas_equal(ours.model)
    assert ours.stats.rejected["nonfinite"] == ours.stats.resets["nonfinite"] == 1
    assert ours.stats.stored == STEPS // 10 - 1
    with ours.opt.averaged_weights(which=0.9):
        assert flat(ours.model).isfinite().all()


def test_different_weights_are_found_at_the_end_of_a_block():
    ours = Training("SGD").train(25)
    if hvd.size() == 1:
        return
    if LAST:
        with torch.no_grad():
            next(ours.model.parameters()).add_(1.0)
    ours.train(29)
    with pytest.raises(ReplicaMismatchError, match=f"rank {hvd.size() - 1}|ranks? "):
        ours.train(30)


@pytest.mark.parametrize("base", unless_brief("Nesterov", "Adam"))
def test_resume_in_mid_block_is_bitwise(base):
    """Each rank its own shard, in the middle of a block and right after a jump."""
    ours = Training(base).train(40)
    saved = []
    for k in (41, 47):
        ours.train(k)
        state = copy.deepcopy(ours.opt.state_dict() | ours.opt.sharded_state_dict())
        saved.append((k, copy.deepcopy(ours.model.state_dict()), state))
    ours.train(STEPS)
    assert ours.stats.jumps > 1
    for k, weights, state in saved:
        again = Training(base)
        again.model.load_state_dict(weights)
        again.opt.load_state_dict(state)
        again.k = k
        again.train(STEPS)
        assert torch.equal(flat(again.model), flat(ours.model)), k
        assert again.stats.counters() == ours.stats.counters()


def test_a_state_of_one_rank_alone_is_forgotten_on_all():
    """In mid-block, on one rank: no collective is missed, and blocks begin anew."""
    ours = Training("SGD").train(35)
    if LAST:
        ours.opt.load_state_dict(
            copy.deepcopy(ours.opt.state_dict() | ours.opt.sharded_state_dict())
        )
    ours.train(STEPS)
    assert_replicas_equal(ours.model)
    if hvd.size() > 1:
        assert ours.stats.resets["desynchronized"] == 1, ours.stats


def test_micro_batches():
    """Two backward passes a step: the gradient of the step is what the method sees."""
    ours = Training("SGD", backward_passes_per_step=2)
    while ours.k < STEPS:
        ours.opt.zero_grad()
        for _ in range(2):
            ours.k += 1
            ours.loss().backward()
        ours.opt.step()
    assert_replicas_equal(ours.model)
    assert ours.stats.stored == STEPS // 20
    assert ours.stats.block_length == 10
