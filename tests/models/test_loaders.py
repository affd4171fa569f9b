"""One suite for DALI's and torchvision's loaders: shards, counts, labels, order, resume."""

import itertools

import pytest
import torch
from conftest import numbered_images, numbers
from launching import start

from models.data import LOADERS, LoaderOptions, list_images, open_loader
from models.errors import UserError

COMBINATIONS = [  # images, ranks, batch
    (7, 1, 2),
    (10, 2, 3),
    (13, 4, 3),
    (23, 3, 4),
    (37, 4, 5),
    (41, 4, 10),
    (60, 2, 30),
    (61, 2, 30),
    (59, 5, 11),
]


@pytest.fixture
def open_all(kind):
    """Opens the loaders of all ranks of a world, here in one process."""
    opened = []

    def open_all(images, world, batch, **settings):
        settings = {"train": True, "image_size": 16, "resize": 16, "channels": 1} | settings
        # Worker processes are what torch's loader is for, but its order does not depend on them.
        settings.setdefault("workers", 1 if kind == "dali" else 0)
        loaders = [
            open_loader(
                kind,
                images,
                LoaderOptions(rank=rank, world=world, batch_size=batch, **settings),
            )
            for rank in range(world)
        ]
        opened.extend(loaders)
        return loaders

    yield open_all
    for loader in opened:
        loader.close()


def epoch(loader):
    """Numbers and labels of the images of one pass, by batch."""
    return [(numbers(images, loader.options), labels.tolist()) for images, labels in loader]


@pytest.mark.parametrize("shuffle", ["epoch", "once"])
@pytest.mark.parametrize(("count", "world", "batch"), COMBINATIONS)
def test_training_shards(open_all, tmp_path, count, world, batch, shuffle):
    images = numbered_images(tmp_path, count)
    loaders = open_all(images, world, batch, shuffle=shuffle)
    expected = (count // world) // batch
    for _ in range(4):
        shards = [epoch(loader) for loader in loaders]
        for loader, shard in zip(loaders, shards, strict=True):
            assert len(loader) == len(shard) == expected
            assert all(len(seen) == batch for seen, _ in shard)
        seen = [number for shard in shards for batch_seen, _ in shard for number in batch_seen]
        assert len(set(seen)) == len(seen) == world * expected * batch, "an image came twice"
        assert set(seen) <= set(range(count))
        for shard in shards:
            for batch_seen, labels in shard:
                assert labels == [number % 3 for number in batch_seen]


@pytest.mark.parametrize(("count", "world", "batch"), [*COMBINATIONS, (5, 2, 2), (4, 4, 3)])
def test_validation_sees_every_image_once(open_all, tmp_path, count, world, batch):
    images = numbered_images(tmp_path, count)
    loaders = open_all(images, world, batch, train=False)
    for _ in range(2):
        shards = [epoch(loader) for loader in loaders]
        for loader, shard in zip(loaders, shards, strict=True):
            assert len(loader) - 1 <= len(shard) <= len(loader)
            assert all(labels == [n % 3 for n in seen] and seen for seen, labels in shard)
        assert sorted(n for shard in shards for seen, _ in shard for n in seen) == [*range(count)]
    assert len({len(loader) for loader in loaders}) == 1


def test_reshuffle_is_global(open_all, tmp_path):
    """Rank 0 meets all images in time, not only those of its first shard, in new orders."""
    loader = open_all(numbered_images(tmp_path, 60), 2, 10)[0]
    passes = [[n for seen, _ in epoch(loader) for n in seen] for _ in range(8)]
    assert len({tuple(order) for order in passes}) == 8
    assert set(itertools.chain(*passes)) == set(range(60))
    assert len({n % 3 for n in passes[0][:10]}) == 3, "the first epoch must not be sorted by class"


def test_shuffled_once_gives_each_rank_the_same_batches(open_all, tmp_path):
    for loader in open_all(numbered_images(tmp_path, 60), 2, 15, shuffle="once"):
        first = epoch(loader)
        assert epoch(loader) == first
        assert len({n % 3 for n in first[0][0]}) == 3


@pytest.mark.parametrize("augment", ["none", "imagenet"])
@pytest.mark.parametrize("stop", [0, 1, 4, 6, 9, 13])
def test_resume_is_bitwise_the_same(open_all, digits, stop, augment):
    """Stopped in the middle of an epoch, at its end, and before the first batch (4 an epoch)."""
    images = list_images(digits / "val")
    world, batch = 2, 33

    def batches(loader):
        while True:
            yield from loader

    loaders = open_all(images, world, batch, augment=augment)
    streams = [batches(loader) for loader in loaders]
    for stream in streams:
        for _ in range(stop):
            next(stream)
    states = [loader.state_dict() for loader in loaders]
    expected = [list(itertools.islice(stream, 7)) for stream in streams]
    for loader, state, want in zip(
        open_all(images, world, batch, augment=augment), states, expected, strict=True
    ):
        loader.load_state_dict(state)
        got = list(itertools.islice(batches(loader), 7))
        for (images_got, labels_got), (images_want, labels_want) in zip(got, want, strict=True):
            assert torch.equal(images_got, images_want)
            assert torch.equal(labels_got, labels_want)


def test_ranks_draw_different_crops(open_all, tmp_path, digits):
    """Two ranks that hold copies of one image must not crop it alike."""
    source = (digits / "val" / "0").iterdir()
    folder = tmp_path / "only"
    folder.mkdir()
    content = next(source).read_bytes()
    for name in range(8):
        (folder / f"{name}.jpg").write_bytes(content)
    loaders = open_all(list_images(tmp_path), 2, 4, augment="crop")
    first, second = (next(iter(loader))[0] for loader in loaders)
    assert not torch.equal(first, second)


def test_crops_are_drawn_anew_each_epoch(open_all, digits):
    images = list_images(digits / "val")
    loader = open_all(images, 1, 33, augment="crop", shuffle="once")[0]
    (first, labels), *_ = loader
    (second, same_labels), *_ = loader
    assert torch.equal(labels, same_labels) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 6}, "batch size was 5, is 6"),
        ({"world": 3}, "ranks was 2, is 3"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"augment": "crop"}, "augmentation was 'none', is 'crop'"),
        ({"count": 30}, "number of files was 31, is 30.*hash of the file list"),
    ],
)
def test_resume_refuses_another_setting(open_all, tmp_path, change, message):
    setting = {"count": 31, "world": 2, "batch": 5} | change
    state = open_all(numbered_images(tmp_path / "a", 31), 2, 5)[0].state_dict()
    other = open_all(numbered_images(tmp_path / "b", setting.pop("count")), **setting)[0]
    with pytest.raises(UserError, match=message):
        other.load_state_dict(state)


def test_resume_refuses_another_rank_and_loader(open_all, tmp_path, kind):
    first, second = open_all(numbered_images(tmp_path, 20), 2, 5)
    with pytest.raises(UserError, match="rank was 0, is 1"):
        second.load_state_dict(first.state_dict())
    state = first.state_dict()
    state["identity"]["loader"] = "other"
    with pytest.raises(UserError, match=f"loader was 'other', is '{kind}'"):
        first.load_state_dict(state)


def test_resume_refuses_what_is_no_position(open_all, tmp_path, kind):
    loader = open_all(numbered_images(tmp_path, 20), 2, 5)[0]
    state = loader.state_dict()
    for change in ({"batch": 2}, {"batch": -1}, {"batch": "x"}, {"epoch": None}, {"epoch": 0.0}):
        with pytest.raises(UserError, match="cannot go on from epoch"):
            loader.load_state_dict(state | change)
    if kind == "dali":
        with pytest.raises(UserError, match="checkpoint is None"):
            loader.load_state_dict(state | {"dali": None})
        with pytest.raises(RuntimeError, match="could not build"):
            loader.load_state_dict(state | {"dali": state["dali"][:50]})
    loader.load_state_dict(state)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["close", "no close"])
def test_an_error_amid_an_epoch_does_not_wait_for_workers(tmp_path, how):
    """Nor does the program's end: its workers outlive the one SIGTERM that it sends them."""
    numbered_images(tmp_path, 20)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from models.data import LoaderOptions, list_images, open_loader\n"
        "if __name__ == '__main__':\n"
        "    options = LoaderOptions(train=True, batch_size=5, image_size=8, resize=8, workers=1)\n"
        "    loader = open_loader('torch', list_images(sys.argv[1]), options)\n"
        "    for batch in loader:\n"
        "        if sys.argv[2] == 'close':\n"
        "            loader.close()\n"
        "        raise KeyError('amid an epoch')\n"
    )
    code, output = start(str(program), tmp_path, how, limit=60)
    assert code == 1 and "amid an epoch" in output, output


@pytest.mark.parametrize(
    ("train", "batch", "world", "message"),
    [(True, 6, 2, "needs 12 training images.* has 10"), (False, 2, 11, "fewer than ranks")],
)
def test_too_few_images(open_all, tmp_path, train, batch, world, message):
    with pytest.raises(UserError, match=message):
        open_all(numbered_images(tmp_path, 10), world, batch, train=train)


def test_torch_workers_do_not_change_the_batches(digits):
    options = {"train": True, "batch_size": 50, "image_size": 16, "resize": 16, "augment": "crop"}
    seen = []
    for workers in (0, 2):
        loader = open_loader(
            "torch", list_images(digits / "val"), LoaderOptions(workers=workers, **options)
        )
        before = torch.get_rng_state()
        seen.append([images for _ in range(2) for images, _ in loader])
        assert torch.equal(torch.get_rng_state(), before) or workers
        loader.close()
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_loaders_show_the_network_the_same(digits, channels):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    options = LoaderOptions(
        train=False, batch_size=64, image_size=14, resize=18, channels=channels, workers=1
    )
    shown = []
    for kind in LOADERS:
        loader = open_loader(kind, list_images(digits / "val"), options)
        images, labels = next(iter(loader))
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.shape == (64, channels, 14, 14) and labels.shape == (64,)
        shown.append(images)
        loader.close()
    # The decoders and the resampling round differently; a wrong scale, layout or crop is ~1.
    assert (shown[0] - shown[1]).abs().mean() < 0.05


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_gpu_graph_is_sound_without_a_gpu(digits, train, augment):
    """Placement of every operator is checked when the graph is serialised."""
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    from models.data.dali import build_pipeline

    options = LoaderOptions(
        train=train, batch_size=64, image_size=224, resize=256, augment=augment, workers=2
    )
    graph = build_pipeline(list_images(digits / "train"), options, gpu=True, device_id=None)
    text = graph.serialize()
    assert b"mixed" in text
    outputs = graph.serialize().count(b"gpu")
    assert outputs >= 2
