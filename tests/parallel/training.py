"""Shared by the tests of the drop-in optimizer: tiny models, data of this rank, comparisons."""

import contextlib
import copy
import warnings

import horovod.torch as hvd
import torch

from aadl_hvd import AndersonConfig, AndersonOptimizer, DistributedAndersonOptimizer

# Everything in full on two ranks with MPI. Elsewhere collectives take many times as long where
# ranks share two cores, and every kind of call is made once, not with every setting.
BRIEF = hvd.size() > 2 or not hvd.mpi_enabled()
NEVER = AndersonConfig(frequency=10**9)  # stores in every step, accelerates in none


def unless_brief(*values):
    """Values of a parameter; only the first one where time is short."""
    return values[:1] if BRIEF else values


def network(dtype=torch.float32):
    """A tanh network, the same on every rank."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=True)
    )
    return model.to(dtype)


def batches(steps, dtype=torch.float32, size=6):
    """[(x, y)] of this rank, other ones on other ranks."""
    generator = torch.Generator().manual_seed(100 + hvd.rank())
    return [
        (
            torch.randn(size, 3, generator=generator).to(dtype),
            torch.randn(size, 2, generator=generator).to(dtype),
        )
        for _ in range(steps)
    ]


def full_batch(steps, dtype=torch.float32, size=12):
    """The same (x, y) of this rank in every step."""
    return batches(1, dtype, size) * steps


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def round_gradients(model, bits=6):
    """Makes sums of gradients exact, whatever the order of the ranks.

    To multiples of 2^-bits: 6 is few enough digits for float16, too.

    With three ranks Horovod's own result depends on which tensors it happens to fuse.
    """

    def rounded(gradient):
        if gradient.is_sparse:
            values = rounded(gradient._values())
            return torch.sparse_coo_tensor(
                gradient._indices(), values, gradient.shape, check_invariants=False
            )
        return torch.round(gradient * 2**bits) / 2**bits

    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(rounded)


def train(model, opt, data, passes=1):
    """The loop of Horovod's own examples, with `passes` backward passes a step."""
    losses = []
    for first in range(0, len(data), passes):
        opt.zero_grad()
        for x, y in data[first : first + passes]:
            loss = loss_of(model, x, y)
            loss.backward()
            losses.append(loss.item())
        opt.step()
    return losses


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def assert_replicas_equal(*models, ranks=None):
    """Bit for bit, over all ranks (or those given; every rank must call it)."""
    bits = [
        bytes(p.detach().contiguous().view(torch.uint8).numpy())
        for m in models
        for p in map(torch.atleast_1d, m.parameters())
    ]
    everybody = hvd.allgather_object(bits)
    chosen = [everybody[r] for r in (ranks if ranks is not None else range(hvd.size()))]
    assert all(other == chosen[0] for other in chosen), "replicas differ"


def assert_same_bits(found, expected, what=""):
    """Tensors, or nested dicts and lists of them."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        if expected.is_sparse:
            found, expected = found.to_dense(), expected.to_dense()
        assert torch.equal(found, expected), f"{what}: {found} and {expected}"
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key in expected:
            assert_same_bits(found[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(a, b, f"{what}.{i}")
    else:
        both_nan = found != found and expected != expected
        assert found == expected or both_nan, f"{what}: {found} and {expected}"


def compare_with_horovod(make_model, make_optimizer, run, config=NEVER, arguments=None, exact=True):
    """Trains a copy with Horovod's optimizer and one with ours; weights and state must be equal.

    Args:
        make_model: () -> model.
        make_optimizer: (model) -> torch optimizer.
        run: (model, wrapped optimizer) -> anything, compared as well.
        config: settings under which nothing is accelerated.
        arguments: (model) -> keyword arguments for both wrappers.
        exact: bit for bit; False: to rounding, for what Horovod alone does not repeat.
    """
    first = make_model()
    second = copy.deepcopy(first)
    start = flat(first).clone()
    found = []
    for model, wrap, more in (
        (first, hvd.DistributedOptimizer, {}),
        (second, DistributedAndersonOptimizer, {"anderson": config}),
    ):
        round_gradients(model)
        more = more | {"named_parameters": model.named_parameters()}
        more |= arguments(model) if arguments is not None else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # num_groups, Horovod's own
            opt = wrap(make_optimizer(model), **more)
        result = run(model, opt)
        state = opt.state_dict()
        found.append((result, state["state"], state["param_groups"]))
    check = assert_same_bits if exact else torch.testing.assert_close
    check(list(second.parameters()), list(first.parameters()))
    check(found[1], found[0])
    assert not torch.equal(flat(second), start), "nothing was trained"
    assert flat(second).isfinite().all()
    assert opt.anderson.stats.accelerated == 0
    return opt


class HandMade:
    """What must come out: AndersonOptimizer in one process, gradients reduced by hand.

    Has the methods of the distributed optimizer that training loops call.
    """

    def __init__(self, optimizer, anderson, process_set=hvd.global_process_set):
        self.inner = AndersonOptimizer(optimizer, anderson=anderson, independent=True)
        self.anderson = self.inner.anderson
        self.param_groups = self.inner.param_groups
        self.zero_grad = self.inner.zero_grad
        self.skip = False
        self.process_set = process_set

    def synchronize(self):
        if not self.process_set.included():
            return
        parameters = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        grads = [grad.to_dense().reshape(-1) for grad in grads]
        mean = hvd.allreduce(torch.cat(grads), name="by.hand", process_set=self.process_set)
        for p, grad in zip(parameters, mean.split([g.numel() for g in grads]), strict=True):
            p.grad = grad.reshape(p.shape).clone()

    @contextlib.contextmanager
    def skip_synchronize(self):
        self.skip = True
        yield
        self.skip = False

    def step(self, closure=None):
        if closure is not None:

            def reduced():
                loss = closure()
                self.synchronize()
                return loss

            return self.inner.step(reduced)
        if not self.skip:
            self.synchronize()
        return self.inner.step()


def compare_with_hand_made(
    make_model, make_optimizer, run, config, arguments=None, tolerance=1e-8, accelerated=1
):
    """Trains a copy with our distributed optimizer, one with `HandMade`; equal to rounding.

    Args:
        make_model: () -> model, in float64.
        make_optimizer: (model) -> torch optimizer.
        run: (model, wrapped optimizer) -> anything.
        config: settings.
        arguments: (model) -> keyword arguments of DistributedAndersonOptimizer.
        tolerance: of the weights, absolute and relative.
        accelerated: how many steps must have been, at least.

    Returns:
        The distributed optimizer and its model.
    """
    first = make_model()
    second = copy.deepcopy(first)
    opt = DistributedAndersonOptimizer(
        make_optimizer(first),
        **{"named_parameters": first.named_parameters()}
        | (arguments(first) if arguments is not None else {}),
        anderson=config,
    )
    run(first, opt)
    hand_made = HandMade(make_optimizer(second), config, opt.process_set)
    run(second, hand_made)
    torch.testing.assert_close(flat(first), flat(second), rtol=tolerance, atol=tolerance)
    assert opt.anderson.stats.counters() == hand_made.anderson.stats.counters()
    assert opt.anderson.stats.accelerated >= accelerated, opt.anderson.stats
    return opt, first
