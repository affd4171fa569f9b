"""Trainings that follow each other in a folder; run by test_output_folder.py on two ranks."""

import csv
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import horovod.torch as hvd
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from aadl_hvd.core import memory
from models import networks
from models.command_line import parse
from models.data import LoaderOptions, list_images, open_loader
from models.dist import on_rank0, start
from models.engine import count_correct
from models.errors import UserError
from models.metrics import read_csv
from models.training import run

STEPS = 2  # of an epoch


def write_images(root):
    for part, count in (("train", 16), ("val", 6)):
        for name, green in (("a", 90), ("b", 140)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (10 * i, green, 250 - 10 * i)).save(folder / f"{i}.jpg")


def train(out, *options):
    settings = [
        f"--data={ROOT / 'set'}", f"--out={out}", "--loader=torch", "--workers=0",
        "--model=resnet8", "--width=4", "--image-size=16", "--batch-size=8", "--augment=none",
        "--warmup-epochs=0", "--device=cpu", "--progress=off", "--log-every=1", *options,
    ]  # fmt: skip
    assert run(on_rank0(lambda: parse(settings)))
    hvd.barrier()


def refused(message, out, *options):
    """On all ranks, with the same line, and without a trace in the folder."""
    before = contents(out)
    try:
        train(out, *options)
    except UserError as error:
        said = hvd.allgather_object(str(error))
        assert said[0] == said[1] and message in said[0] and "\n" not in said[0], said
    else:
        raise AssertionError(f"no error about {message!r}")
    assert contents(out) == before


def contents(out):
    hvd.barrier()
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    hvd.barrier()
    return found


def board(out):
    """Steps and values of a curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("steps/loss")]


def check_curve(out, steps):
    """CSV and TensorBoard hold the same, each step once, and whole numbers as such."""
    with open(out / "steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, steps + 1))
    assert [int(row["epoch"]) for row in rows] == [1 + i // STEPS for i in range(steps)]
    curve = board(out)
    assert [step for step, _ in curve] == list(range(1, steps + 1))
    for row, (_, loss) in zip(rows, curve, strict=True):
        assert abs(float(row["loss"]) - loss) < 1e-6
    with open(out / "epochs.csv", newline="") as file:
        epochs = [(int(row["step"]), int(row["epoch"])) for row in csv.DictReader(file)]
    assert epochs == [(STEPS * n, n) for n in range(1, steps // STEPS + 1)]


def a_second_training_is_refused():
    train(ROOT / "out", "--epochs=2")
    if hvd.rank() == 0:
        check_curve(ROOT / "out", 4)
    refused("holds a training already", ROOT / "out", "--epochs=1")


def nothing_is_lost_to_a_training_that_cannot_begin():
    out = ROOT / "out"
    refused("no such data folder", out, "--overwrite", "--data=/no/such")
    refused("an epoch has", out, "--overwrite", "--accumulate=100")
    refused("training diverged", out, "--overwrite", "--lr=1e30", "--log-every=2")
    with mock.patch.object(memory, "free_bytes", lambda device: 1000):
        refused("--anderson-history-depth", out, "--overwrite")


def one_that_overwrites_begins_afresh():
    out = ROOT / "out"
    if hvd.rank() == 0:
        (out / "notes.txt").write_text("mine")
        (out / "last.99.3.part").write_text("of a run on more ranks")
    train(out, "--overwrite", "--epochs=1", "--seed=3")
    if hvd.rank() == 0:
        check_curve(out, 2)
        assert not (out / "last.99.3.part").exists() and (out / "notes.txt").exists()
        assert torch.load(out / "best.pt", weights_only=True)["step"] == 2
        settings = parse(["--config", str(out / "settings.yaml")])
        assert (settings.seed, settings.epochs, settings.overwrite) == (3, 1, False)


def one_that_resumes_goes_on_without_a_seam():
    out = ROOT / "out"
    train(out, "--resume=auto", "--epochs=3", "--seed=3")
    if hvd.rank() == 0:
        check_curve(out, 6)
    # From an older checkpoint: what was measured after it goes.
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.copy(out / "last.pt", ROOT / "kept.pt")
    train(out, "--resume=auto", "--epochs=4", "--seed=3")
    if hvd.rank() == 0:
        shutil.copy(ROOT / "kept.pt", out / "last.pt")
    hvd.barrier()
    train(out, "--resume=auto", "--epochs=5", "--seed=3")
    if hvd.rank() == 0:
        check_curve(out, 10)


def one_killed_before_its_first_checkpoint_begins_anew():
    out = ROOT / "out"
    hvd.barrier()
    if hvd.rank() == 0:
        for name in ("last.pt", "summary.json", "summary.txt", "training.png"):
            (out / name).unlink()
    hvd.barrier()
    train(out, "--resume=auto", "--epochs=1")
    if hvd.rank() == 0:
        check_curve(out, 2)


def a_folder_holds_one_training():
    train(ROOT / "other", "--epochs=1", "--checkpoint-every=0", "--no-tensorboard")
    refused("but no last.pt to go on from", ROOT / "other", "--resume=auto", "--epochs=2")
    last = ROOT / "out" / "last.pt"
    refused("is of another folder", ROOT / "other", f"--resume={last}", "--epochs=2")


def the_best_checkpoint_is_what_was_measured():
    """With any --checkpoint-every, and in statistics that were measured anew."""
    for anderson, recalibrate in (("default", "auto"), ("off", "auto"), ("off", "always")):
        out = ROOT / f"best {anderson} {recalibrate}"
        train(out, f"--anderson={anderson}", f"--recalibrate={recalibrate}", "--epochs=5",
              "--checkpoint-every=5", "--lr=0.3", "--no-tensorboard")  # fmt: skip
        if hvd.rank():
            continue
        rows = read_csv(out / "epochs.csv")
        best = max(rows, key=lambda row: row["val_top1"])  # the first of them
        state = torch.load(out / "best.pt", weights_only=True)
        assert (state["step"], state["best"]) == (best["step"], best["val_top1"]), (rows, state)
        tracked = state["model"]["norm.num_batches_tracked"].item()
        anew = (anderson, recalibrate) != ("off", "auto")
        assert tracked == (STEPS if anew else state["step"])
        loss, top1, count = validated(state["model"])
        assert count == 12 and top1 == best["val_top1"]
        assert abs(loss - best["val_loss"]) < 1e-5 * loss


def validated(weights):
    model = networks.build("resnet8", 2, width=4)
    model.load_state_dict(weights)
    model.eval()
    images = list_images(ROOT / "set" / "val", ("a", "b"))
    options = LoaderOptions(train=False, batch_size=12, image_size=16, resize=18, workers=0)
    with torch.no_grad():
        sums = [count_correct(model(x), y) for x, y in open_loader("torch", images, options)]
    loss, top1, _, count = torch.stack(sums).sum(0).tolist()
    return loss / count, top1 / count, count


CASES = [
    a_second_training_is_refused,
    nothing_is_lost_to_a_training_that_cannot_begin,
    one_that_overwrites_begins_afresh,
    one_that_resumes_goes_on_without_a_seam,
    one_killed_before_its_first_checkpoint_begins_anew,
    a_folder_holds_one_training,
    the_best_checkpoint_is_what_was_measured,
]

if __name__ == "__main__":
    start()
    ROOT = on_rank0(lambda: Path(tempfile.mkdtemp()))
    on_rank0(lambda: write_images(ROOT / "set"))
    for case in CASES:
        case()
        hvd.barrier()
        if hvd.rank() == 0:
            print(f"passed {case.__name__}", flush=True)
    hvd.barrier()
    on_rank0(lambda: shutil.rmtree(ROOT))
    hvd.shutdown()
