"""What needs two real ranks; run by test_on_ranks.py under horovodrun, once per case."""

import contextlib
import copy
import io
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import horovod.torch as hvd
import torch
from torch import nn

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
from aadl_hvd import checkpoint as library_checkpoint
from aadl_hvd.checkpoint.files import FORMAT, MARK
from aadl_hvd.optim.batch_norm import average_batch_norm, batch_norms
from models import checkpoint
from models.data import ImageList, LoaderOptions, open_loader
from models.dist import fail_together, on_rank0, start
from models.engine import Trainer, count_correct, mean_over_ranks
from models.errors import UserError
from models.networks import build
from models.output import BEST, LAST
from models.resume import keep, resume, save, state_of
from models.schedule import Schedule


class Batches(list):
    """Stands for a loader."""

    batch = 0


def batches(sizes, seed, *, features=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 8, 8) if features is None else (features,)
    return Batches(
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for size in sizes
    )


def trainer(model, lr=0.1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    accumulate = settings.get("accumulate", 1)
    return Trainer(
        model=model,
        optimizer=hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            backward_passes_per_step=accumulate,
        ),
        schedule=Schedule(peak=lr, epochs=1, steps_per_epoch=100, decay="none"),
        device=torch.device("cpu"),
        **settings,
    )


def network():
    torch.manual_seed(0)
    return build("resnet8", 10, channels=1, width=4)


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 10)


def expect_error(message, call):
    try:
        call()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error about {message!r}")


def assert_same_on_ranks(model):
    for name, tensor in model.state_dict().items():
        everywhere = hvd.allgather(tensor.float().reshape(1, -1), name=f"same.{name}")
        assert torch.equal(everywhere[0], everywhere[1]), f"{name} differs between ranks"


def errors_reach_every_rank():
    problem = "rank 1's disk is full" if hvd.rank() == 1 else None
    expect_error("rank 1: rank 1's disk is full", lambda: fail_together(problem))
    fail_together(None)

    def work():
        assert hvd.rank() == 0
        raise UserError("seen on rank 0 alone")

    expect_error("seen on rank 0 alone", lambda: on_rank0(work))
    assert on_rank0(lambda: {"rank": hvd.rank()}) == {"rank": 0}


def batch_norm_statistics_are_of_all_images():
    """The ranks' images differ in mean and spread; together they have the pooled statistics."""
    pooled = torch.cat([batches([500], seed)[0][0] * (1 + seed) + seed for seed in (0, 1)])
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=1.0))
    model(batches([500], hvd.rank())[0][0] * (1 + hvd.rank()) + hvd.rank())
    average_batch_norm(model, mean_over_ranks)
    norm = batch_norms(model)[0]
    assert torch.allclose(norm.running_mean, pooled.mean(), atol=1e-5)
    assert torch.allclose(norm.running_var, pooled.var(), rtol=1e-3)


def recalibration_forgets_old_weights():
    run = trainer(network(), keep_batches=3)
    list(run.train_epoch(batches([16] * 5, seed=hvd.rank()), log_every=2))
    run.recalibrate()
    first = [norm.running_mean.clone() for norm in batch_norms(run.model)]
    for norm in batch_norms(run.model):
        norm.running_mean.fill_(1e6)  # as if the weights had jumped
    before = copy.deepcopy(run.model)
    run.recalibrate()
    for norm, mean in zip(batch_norms(run.model), first, strict=True):
        assert torch.allclose(norm.running_mean, mean, atol=1e-5)
        assert norm.momentum == 0.1
    assert_same_on_ranks(run.model)
    # The first layer's statistics, by hand, over the last three batches of both ranks.
    images = torch.cat([b[0] for seed in (0, 1) for b in batches([16] * 5, seed)[-3:]])
    with torch.no_grad():
        expected = before.conv(images).mean(dim=(0, 2, 3))
    assert torch.allclose(run.model.norm.running_mean, expected, atol=1e-5)


def validation_counts_are_right():
    """Uneven batches, and a rank with a batch less, or with none at all."""
    for sizes in ([[7, 3], [7]], [[4, 4, 1], []]):
        run = trainer(network())
        run.model.eval()
        everything = [b for rank, part in enumerate(sizes) for b in batches(part, rank + 10)]
        images, labels = (torch.cat(parts) for parts in zip(*everything, strict=True))
        with torch.no_grad():
            logits = run.model(images)
        right = logits.argsort(dim=1, descending=True) == labels[:, None]
        result = run.validate(batches(sizes[hvd.rank()], hvd.rank() + 10))
        assert result.images == len(labels) == sum(map(sum, sizes))
        assert abs(result.top1 - right[:, 0].double().mean()) < 1e-9
        assert abs(result.top5 - right[:, :5].any(1).double().mean()) < 1e-9
        assert abs(result.loss - nn.functional.cross_entropy(logits, labels)) < 1e-5
    few = count_correct(torch.eye(3), torch.tensor([0, 2, 1])).tolist()
    assert few[1:] == [1, 3, 3], "with three classes all are among the five largest"


def not_a_number_on_one_rank_ends_all():
    model = linear()
    run = trainer(model)
    data = batches([8] * 6, seed=hvd.rank(), features=6)
    if hvd.rank() == 1:
        data[3][0][0, 0] = float("nan")
    expect_error("training diverged", lambda: list(run.train_epoch(data, log_every=2)))
    assert run.step in (4, 6)


def training_loss_is_the_mean_over_ranks():
    run = trainer(linear(), lr=0.0)
    data = [batches([8] * 5, seed, features=6) for seed in (0, 1)]
    intervals = list(run.train_epoch(data[hvd.rank()], log_every=3))
    assert [i.steps for i in intervals] == [3, 2] and [i.images for i in intervals] == [48, 32]
    images, labels = (torch.cat(parts) for parts in zip(*(data[0][:3] + data[1][:3]), strict=True))
    with torch.no_grad():
        logits = run.model(images)
    assert abs(intervals[0].loss - nn.functional.cross_entropy(logits, labels)) < 1e-6
    assert abs(intervals[0].top1 - (logits.argmax(1) == labels).double().mean()) < 1e-9


def clipping_sees_the_averaged_gradient():
    run = trainer(linear(), lr=1.0, clip_norm=0.01)
    start_weights = [p.detach().clone() for p in run.model.parameters()]
    reference = linear()
    data = [batches([8], seed, features=6) for seed in (0, 1)]
    list(run.train_epoch(data[hvd.rank()], log_every=1))
    images, labels = (torch.cat(parts) for parts in zip(*(data[0] + data[1]), strict=True))
    nn.functional.cross_entropy(reference(images), labels).backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    assert norm > 0.02
    for p, q, old in zip(
        run.model.parameters(), reference.parameters(), start_weights, strict=True
    ):
        assert torch.allclose(p, old - q.grad * 0.01 / norm, atol=1e-6)


def accumulation_is_one_large_batch():
    whole = batches([16], seed=hvd.rank(), features=6)
    halves = Batches(zip(whole[0][0].split(8), whole[0][1].split(8), strict=True))
    halves.append(halves[0])  # does not fill a step: left out
    one, two = trainer(linear()), trainer(linear(), accumulate=2)
    list(one.train_epoch(whole, log_every=1))
    list(two.train_epoch(halves, log_every=1))
    assert (one.step, two.step) == (1, 1)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def mixed_precision_keeps_ranks_together():
    for settings in (
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"amp": "fp16", "clip_norm": 0.1},
        {"channels_last": True},
        {"amp": "bf16", "channels_last": True},
    ):
        run = trainer(network(), **settings)
        before = run.model.head.weight.detach().clone()
        last = list(run.train_epoch(batches([16] * 4, seed=hvd.rank()), log_every=4))[-1]
        assert last.loss < 10, settings
        assert not torch.equal(before, run.model.head.weight), settings
        average_batch_norm(run.model, mean_over_ranks)
        assert_same_on_ranks(run.model)


def infinite_gradient_is_skipped_on_all_ranks():
    """A first loss scale far too large: fp16 overflows on one rank, both skip, then recover."""
    run = trainer(linear(), amp="fp16")
    data = batches([8] * 30, seed=hvd.rank(), features=6)
    if hvd.rank() == 1:
        for images, _ in data:
            images *= 30
    list(run.train_epoch(data, log_every=30))
    scales = hvd.allgather(torch.tensor([run.scaler.get_scale()]), name="scales")
    assert scales[0] == scales[1] < 65536, "nothing overflowed" if scales[0] == 65536 else scales
    assert_same_on_ranks(run.model)


IDENTITY = {"model": "linear"}
REMOVED = object()


class Training:
    """A trainer and a loader, 4 batches an epoch, that no image is drawn from."""

    def __init__(self, **settings):
        model = linear()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        names = list(model.named_parameters())
        config = AndersonConfig(history_depth=3, frequency=2, warmup_steps=0, noise_gate=0)
        self.trainer = Trainer(
            model=model,
            optimizer=DistributedAndersonOptimizer(base, named_parameters=names, anderson=config)
            if settings.pop("anderson", True)
            else hvd.DistributedOptimizer(base, named_parameters=names),
            schedule=Schedule(peak=0.1, epochs=2, steps_per_epoch=4, decay="none"),
            device=torch.device("cpu"),
            **settings,
        )
        files = tuple(map(str, range(16)))
        images = ImageList(root=Path(), classes=("a",), files=files, labels=(0,) * len(files))
        options = LoaderOptions(
            train=True, rank=hvd.rank(), world=hvd.size(), batch_size=2,
            image_size=8, resize=8, channels=1, workers=0,
        )  # fmt: skip
        self.loader = open_loader("torch", images, options)

    def steps(self, count):
        list(self.trainer.train_epoch(batches([8] * count, seed=hvd.rank(), features=6), 99))

    def saved(self, folder):
        """5 steps, so amid the second epoch."""
        self.steps(5)
        self.loader.epoch, self.loader.batch = 1, 1
        state = state_of(IDENTITY, 1, 0.5, self.trainer, self.loader)
        assert save(folder / LAST, state, self.trainer, print)

    def resumed(self, folder):
        """What it says."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            settings = SimpleNamespace(resume="auto")
            self.found = resume(settings, folder, self.trainer, self.loader, IDENTITY)
        return said.getvalue()


@contextlib.contextmanager
def temporary_folder():
    folder = on_rank0(lambda: Path(tempfile.mkdtemp()))
    yield folder
    on_rank0(lambda: shutil.rmtree(folder))


def damage(path, where, value):
    """Changes one entry of a file; the file is whole, its checksums are right."""
    state = library_checkpoint.load(path)
    within = state
    for key in where[:-1]:
        within = within[key]
    if value is REMOVED:
        del within[where[-1]]
    else:
        within[where[-1]] = value(within[where[-1]]) if callable(value) else value
    torch.save({MARK: FORMAT} | state, path)  # which may be what is damaged


DAMAGED = [  # what `checkpoint.load` finds is in test_output_files.py
    (("format",), REMOVED, "no checkpoint of this program"),
    (("ranks",), lambda ranks: ranks[:1], "was written by 1 ranks, this run has 2"),
    (("ranks", 1, "data", "identity"), 3, "rank 1: "),
    (("ranks", 1, "data", "batch"), 2, "rank 1: "),
    (("ranks", 1, "data", "epoch"), 0, "contradict"),
    (("ranks", 1, "torch"), torch.zeros(3, dtype=torch.uint8), "rank 1: "),
    (("ranks", 1, "python"), (1, 2, 3), "rank 1: "),
    (("step",), 10**6, "epoch 1 and step 1000000 contradict"),
    (("model", "weight"), torch.zeros(3), "size mismatch"),
]
DAMAGED_OPTIMIZERS = [
    (("optimizer",), {}, "damaged"),
    (("optimizer", "param_groups"), [], "damaged"),
    (("optimizer", "param_groups", 0, "momentum"), "x", "momentum"),
    (("optimizer", "param_groups", 0, "momentum"), REMOVED, "momentum"),
    (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(3), "momentum_buffer"),
    (("optimizer", "state", 0, "momentum_buffer"), "x", "momentum_buffer"),
]


def damaged_checkpoints_end_all_ranks():
    """With a line that says what is wrong, whichever rank it is that trips."""
    for anderson, damages in ((True, DAMAGED), (False, DAMAGED_OPTIMIZERS)):
        with temporary_folder() as folder:
            Training(anderson=anderson).saved(folder)
            whole = (folder / LAST).read_bytes()
            for where, value, message in damages:
                if hvd.rank() == 0:
                    damage(folder / LAST, where, value)
                run = Training(anderson=anderson)
                try:
                    run.resumed(folder)
                except UserError as error:
                    said = hvd.allgather_object(str(error))
                    assert said[0] == said[1] and "\n" not in said[0], (where, said)
                    assert message in said[0] and str(folder / LAST) in said[0], (where, said)
                else:
                    raise AssertionError(f"went on with {where} damaged")
                if hvd.rank() == 0:
                    (folder / LAST).write_bytes(whole)
                hvd.barrier()
            assert not Training(anderson=anderson).resumed(folder)


DAMAGED_PARTS = [
    (("anderson",), REMOVED),
    (("anderson", "history"), {}),
    (("anderson", "history", "columns", "y"), lambda y: y[:, :-1]),
    (("anderson", "history", "averages"), None),
    (("anderson", "history", "backoff"), []),
    (("of",), "another"),
    ((MARK,), 9),
]


def a_bad_part_on_one_rank_is_a_missing_one():
    """Of the history alone: all go on, say so once, and the history rebuilds itself."""
    with temporary_folder() as folder:
        first = Training()
        first.saved(folder)
        own = checkpoint.part_of(folder / LAST, 5, hvd.rank())
        whole = own.read_bytes()
        for where, value in DAMAGED_PARTS:
            if hvd.rank() == 1:
                damage(own, where, value)
            run = Training()
            said = hvd.allgather_object(run.resumed(folder))
            assert "history has to rebuild" in said[0] and "last.5.1.part" in said[0], (where, said)
            assert said[0].count("\n") == 1 and not said[1], (where, said)
            assert run.found == (1, 0.5) and run.trainer.step == 5
            stats = run.trainer.optimizer.anderson.stats
            before = first.trainer.optimizer.anderson.stats
            assert stats.counters() == before.counters(), where
            run.steps(2)
            assert stats.stored > before.stored, where
            assert_same_on_ranks(run.trainer.model)
            own.write_bytes(whole)
        run = Training()
        assert not run.resumed(folder)
        for training in (first, run):
            training.steps(3)
        assert torch.equal(first.trainer.model.weight, run.trainer.model.weight)


def what_cannot_be_read_back_ends_all_ranks():
    """With the checkpoint before in place: of no use would be those that follow, too."""
    with temporary_folder() as folder:
        Training().saved(folder)
        before = (folder / LAST).read_bytes()
        for at in (0, 1):  # in rank 0's state, then in rank 1's part
            run = Training()
            run.steps(1)  # parts have the step in their names
            if hvd.rank() == at == 0:
                run.trainer.scaler.state_dict = lambda: {"scale": SimpleNamespace()}
            elif hvd.rank() == at == 1:
                run.trainer.optimizer.sharded_state_dict = lambda: {"part": SimpleNamespace()}
            try:
                run.saved(folder)
            except UserError as error:
                said = hvd.allgather_object(str(error))
                assert said[0] == said[1] and "\n" not in said[0], said
                assert ("state['scaler']['scale'], of type", "state['part'], of type")[at] in said[
                    0
                ]
                assert said[0].startswith(("no checkpoint can be", "rank 1: no checkpoint")[at])
            else:
                raise AssertionError("went on")
            assert (folder / LAST).read_bytes() == before
        assert not Training().resumed(folder)


def a_better_checkpoint_than_the_last_one_knows_of_counts():
    """`best.pt` may be newer than `last.pt`, and must not give way to a worse one."""
    with temporary_folder() as folder:
        run = Training()
        run.saved(folder)
        state = state_of(IDENTITY, 1, 0.75, run.trainer, run.loader)
        assert keep(folder / BEST, state, print)
        run = Training()
        assert not run.resumed(folder) and run.found == (1, 0.75)


def resuming_automatically_without_a_checkpoint_begins():
    with temporary_folder() as folder:
        run = Training()
        assert not run.resumed(folder) and run.found == (0, 0.0)
        if hvd.rank() == 0:
            (folder / LAST).symlink_to(folder / "not mounted")
        hvd.barrier()
        expect_error("no such checkpoint", lambda: run.resumed(folder))


CASES = [
    errors_reach_every_rank,
    batch_norm_statistics_are_of_all_images,
    recalibration_forgets_old_weights,
    validation_counts_are_right,
    not_a_number_on_one_rank_ends_all,
    training_loss_is_the_mean_over_ranks,
    clipping_sees_the_averaged_gradient,
    accumulation_is_one_large_batch,
    mixed_precision_keeps_ranks_together,
    infinite_gradient_is_skipped_on_all_ranks,
    damaged_checkpoints_end_all_ranks,
    a_bad_part_on_one_rank_is_a_missing_one,
    what_cannot_be_read_back_ends_all_ranks,
    a_better_checkpoint_than_the_last_one_knows_of_counts,
    resuming_automatically_without_a_checkpoint_begins,
]

if __name__ == "__main__":
    start()
    assert hvd.size() == 2
    for case in CASES:
        try:
            case()
        except BaseException:
            print(f"FAILED {case.__name__} on rank {hvd.rank()}", flush=True)
            raise
        print(f"passed {case.__name__} on rank {hvd.rank()}", flush=True)
    hvd.shutdown()
    sys.exit(0)
