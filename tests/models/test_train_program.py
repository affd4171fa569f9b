"""python -m models.train as its user starts it: outcomes, exit codes, messages, resume."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, start

from models import networks
from models.data import LoaderOptions, list_images, open_loader
from models.engine import count_correct
from models.metrics import read_csv

pytestmark = pytest.mark.ranks

SMALL = [
    "--model=resnet8", "--width=4", "--channels=1", "--image-size=16", "--resize=16",
    "--augment=crop", "--workers=1", "--batch-size=100", "--warmup-epochs=0.2", "--milestones=1",
    "--optimizer=nesterov", "--lr=0.2", "--log-every=2", "--no-tensorboard", "--device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def train(digits):
    def train(out, *options, ranks=2, data=digits, **settings):
        return start(
            "models.train", *SMALL, f"--data={data}", f"--out={out}", *options,
            ranks=ranks, **settings,
        )  # fmt: skip

    return train


def trained(train, out, *options, **settings):
    code, output = train(out, *options, **settings)
    assert code == 0, output[-4000:]
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_state(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_state(a, b)
    else:
        assert one == other or (one != one and other != other)  # NaN: not measured yet


@pytest.fixture(scope="module")
def signalled(digits):
    """Trains on MPI, which hands the ranks' exit code on."""

    def signalled(out, rank, step, name, *options, ranks=2):
        program = str(Path(__file__).with_name("signalled.py"))
        return start(
            program, rank, step, name, *SMALL, f"--data={digits}", f"--out={out}", *options,
            ranks=ranks, controller="mpi",
        )  # fmt: skip

    return signalled


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """Two epochs in one go on Horovod's own optimizer."""
    out = tmp_path_factory.mktemp("straight")
    return out, trained(train, out, "--anderson=off", "--epochs=2")


def test_training_leaves_what_it_promises(straight):
    out, state = straight
    assert {path.name for path in out.iterdir()} == {
        "steps.csv", "epochs.csv", "summary.json", "summary.txt", "training.png", "settings.yaml",
        "last.pt", "best.pt",
    }  # fmt: skip
    steps = read_csv(out / "steps.csv")
    assert [row["step"] for row in steps] == [2, 4, 6, 7, 9, 11, 13, 14], "7 steps an epoch"
    assert [row["lr"] for row in steps] == pytest.approx([0.2] * 4 + [0.02] * 4)
    assert state["step"] == 14 and state["epoch"] == 2
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_validation_of_two_ranks_is_that_of_the_whole_folder(straight, digits):
    """297 images on 2 ranks in batches of 100: padded, uneven, and counted right."""
    out, state = straight
    model = networks.build("resnet8", 10, channels=1, width=4)
    model.load_state_dict(state["model"])
    model.eval()
    classes = list_images(digits / "train").classes
    images = list_images(digits / "val", classes)
    options = LoaderOptions(
        train=False, batch_size=297, image_size=16, resize=16, channels=1, workers=1
    )
    with torch.no_grad():
        sums = [count_correct(model(x), y) for x, y in open_loader("dali", images, options)]
    loss, top1, top5, count = torch.stack(sums).sum(0).tolist()
    row = read_csv(out / "epochs.csv")[-1]
    assert row["val_images"] == count == 297
    assert row["val_top1"] == pytest.approx(top1 / count)
    assert row["val_top5"] == pytest.approx(top5 / count)
    assert row["val_loss"] == pytest.approx(loss / count, rel=1e-5)


def test_resume_is_bitwise_an_uninterrupted_run(train, straight, tmp_path):
    trained(train, tmp_path, "--anderson=off", "--epochs=1")
    resumed = trained(train, tmp_path, "--anderson=off", "--epochs=2", "--resume=auto")
    assert_same_state(resumed, straight[1])
    keys = ("step", "lr", "loss", "top1")
    rows = [[{k: row[k] for k in keys} for row in read_csv(d / "steps.csv")]
            for d in (tmp_path, straight[0])]  # fmt: skip
    assert rows[0] == rows[1]


def test_signal_to_one_rank_stops_all_amid_an_epoch_and_resume_loses_nothing(
    signalled, train, straight, tmp_path
):
    options = ("--anderson=off", "--epochs=2", "--resume=auto")
    code, output = signalled(tmp_path, 1, 8, "SIGUSR1", *options)
    assert code == 75, output[-4000:]
    assert "stopped by a signal after step 9" in output, "the interval of step 8 ends with step 9"
    assert output.count("(the program ends with exit code 75; the rest is mpirun's)") == 1
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["step"], state["epoch"]) == (9, 1)
    assert [own["data"]["batch"] for own in state["ranks"]] == [2, 2]

    resumed = trained(train, tmp_path, *options)
    for part in ("optimizer", "ranks", "step", "epoch"):
        assert_same_state(resumed[part], straight[1][part])
    # Running statistics are averaged over ranks at each checkpoint, once more than without.
    for name, tensor in straight[1]["model"].items():
        exact = "running" not in name
        torch.testing.assert_close(
            resumed["model"][name], tensor, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3
        )
    rows = [[(row["step"], row["loss"]) for row in read_csv(folder / "steps.csv")]
            for folder in (tmp_path, straight[0])]  # fmt: skip
    assert rows[0] == rows[1]


def test_a_full_disk_ends_no_training(digits, train, straight, tmp_path):
    """The checkpoint before stays, what is missing is said, and nothing half is left."""
    program = str(Path(__file__).with_name("full_disk.py"))
    options = ("--anderson=off", "--epochs=2")
    code, output = start(
        program, 8, *SMALL, f"--data={digits}", f"--out={tmp_path}", *options,
        ranks=2, controller="mpi",
    )  # fmt: skip
    assert code == 0, output[-4000:]
    assert "no checkpoint was written to" in output and "File too large" in output
    assert output.count("measurements in") == 1 and "no summary was written" in output
    assert "epoch 2/2" in output, "trained to the end"
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 7
    assert not list(tmp_path.glob(".*partial"))
    assert_same_state(trained(train, tmp_path, *options, "--resume=auto"), straight[1])


def test_signal_in_an_epochs_last_step_finishes_the_epoch(signalled, tmp_path):
    options = ("--anderson=off", "--epochs=3", "--checkpoint-every=3")
    code, output = signalled(tmp_path, 0, 15, "SIGTERM", *options, ranks=1)
    assert code == 75 and "stopped by a signal after step 15" in output, output[-4000:]
    assert len(read_csv(tmp_path / "epochs.csv")) == 1, "the epoch was validated"
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and state["ranks"][0]["data"]["batch"] == 0


@pytest.mark.parametrize("name", ["SIGUSR2+", "SIGTERM+"])
def test_worker_processes_outlive_a_signal_to_the_whole_job(signalled, tmp_path, name):
    options = ("--anderson=default", "--loader=torch", "--epochs=1", "--resume=auto")
    code, output = signalled(tmp_path, 0, 3, name, *options, ranks=1)
    assert code == 75 and "stopped by a signal after step 4" in output, output[-4000:]
    code, output = signalled(tmp_path, 0, 3, name, *options, ranks=1)
    assert code == 0 and "going on after step 4" in output, output[-4000:]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_each_signal_is_a_request(name):
    program = (
        "import os, signal\n"
        "from models.preemption import StopRequest\n"
        "request = StopRequest()\n"
        "request.listen()\n"
        "assert not request()\n"
        f"os.kill(os.getpid(), signal.{name})\n"
        "assert request()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert run.returncode == 0


@pytest.mark.parametrize(("hangs", "code"), [(True, 128 + signal.SIGTERM), (False, 0)])
def test_asked_twice_a_program_that_hangs_ends(hangs, code):
    """Within a library, where no handler of Python's runs; one that has looked goes on."""
    program = (
        "import ctypes, os, signal, sys, time\n"
        "from models import preemption\n"
        "preemption.PATIENCE = 1.5\n"
        "request = preemption.StopRequest()\n"
        "request.listen()\n"
        "reader, writer = os.pipe()\n"
        "print('ready', flush=True)\n"
        "letter = ctypes.create_string_buffer(1)\n"
        f"while not {hangs} and not request():\n"
        "    time.sleep(0.01)\n"
        "print('looked', flush=True)\n"
        f"{'ctypes.CDLL(None).read(reader, letter, 1)' if hangs else 'sys.stdin.readline()'}\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert run.stdout.readline() == b"ready\n"
        if not hangs:
            run.send_signal(signal.SIGUSR1)
        assert run.stdout.readline() == b"looked\n"
        time.sleep(0.2)
        if hangs:
            run.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)  # too early
        time.sleep(2)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        run.stdin.close()
        assert run.wait(timeout=20) == code
        assert (b"hangs" in run.stderr.read()) == hangs
    finally:
        run.kill()


def test_without_checkpoints_a_signal_kills_as_ever(signalled, tmp_path):
    """Exit code 75 would have the scheduler begin anew for ever."""
    code, output = signalled(
        tmp_path, 0, 3, "SIGTERM", "--anderson=off", "--epochs=1", "--checkpoint-every=0", ranks=1
    )
    assert code not in (0, 75) and not (tmp_path / "last.pt").exists(), output[-4000:]


def test_anderson_trains_and_resumes(train, tmp_path, digits):
    """On MPI, with torch's loader: bit for bit the uninterrupted run, history and all."""
    options = ("--anderson=default", "--loader=torch", "--workers=0", "--anderson-frequency=3")
    options += ("--anderson-noise-gate=0",)
    (tmp_path / "straight").mkdir()
    straight = trained(train, tmp_path / "straight", *options, "--epochs=2", controller="mpi")
    first = trained(train, tmp_path, *options, "--epochs=1", controller="mpi")
    assert 0 < first["optimizer"]["anderson"]["counters"]["stored"] <= 7
    assert {path.name for path in tmp_path.glob("*.part")} == {"last.7.0.part", "last.7.1.part"}
    code, output = train(
        tmp_path, *options, "--epochs=2", "--resume=auto", ranks=2, controller="mpi"
    )
    assert code == 0, output[-4000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    stored = straight["optimizer"]["anderson"]["counters"]["stored"]
    assert summary["acceleration"]["stored"] == stored > 10
    attempts = summary["acceleration"]["accelerated"] + sum(
        summary["acceleration"]["rejected"].values()
    )
    assert attempts > 0 and summary["acceleration"]["seconds"] > 0
    rows = read_csv(tmp_path / "steps.csv")
    assert [row["step"] for row in rows][-1] == 14 and rows[-1]["aa_stored"] == stored
    assert summary["acceleration"]["accelerated"] > 0
    resumed = torch.load(tmp_path / "last.pt", weights_only=True)
    for kind in ("model", "optimizer"):
        assert_same_state(resumed[kind], straight[kind])
    assert {path.name for path in tmp_path.glob("*.part")} == {"last.14.0.part", "last.14.1.part"}


def test_an_unexpected_error_of_one_rank_is_said_before_what_follows_from_it(digits, tmp_path):
    program = str(Path(__file__).with_name("failing.py"))
    code, output = start(
        program, 1, 3, *SMALL, f"--data={digits}", f"--out={tmp_path}",
        ranks=2, controller="mpi",
    )  # fmt: skip
    assert code == 1, output[-4000:]
    said = "rank 1 ends because of this error; what follows is said by mpirun, and by other ranks"
    assert output.count(said) == 1
    assert (
        output.index("RuntimeError: a bug") < output.index(said) < output.index("mpirun detected")
    )
    assert "rank 0 ends because of this error" not in output


def test_a_lost_part_of_the_history_is_said_and_rebuilt(train, tmp_path):
    options = ("--anderson=default", "--anderson-frequency=3")
    trained(train, tmp_path, *options, "--epochs=1")
    (tmp_path / "last.7.1.part").unlink()
    code, output = train(tmp_path, *options, "--epochs=2", "--resume=auto")
    assert code == 0, output[-4000:]
    assert "the history has to rebuild itself" in output and "last.7.1.part" in output


def test_one_rank_without_a_launcher_and_settings_from_a_file(train, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("anderson: off\nepochs: 3\namp: bf16\nchannels-last: true\nclip-norm: 1\n")
    code, output = train(tmp_path / "out", f"--config={config}", "--epochs=1", ranks=1)
    assert code == 0, output[-4000:]
    assert "1 rank on cpu" in output and "epoch 1/1" in output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "amp bf16 (default: off)" in lines and "clip-norm 1 (default: none)" in lines
    assert not any(line.startswith("momentum") for line in lines), "a default"
    assert max(map(len, output.splitlines())) < 200 + len(str(tmp_path))


def test_wrong_path_ends_every_rank_with_one_message(train, tmp_path):
    code, output = train(tmp_path / "out", data="/no/such/folder", limit=60)
    assert code != 0
    assert output.count("error: no such data folder: /no/such/folder") == 1
    assert output.count("(the program ends with exit code 2; the rest is horovodrun's)") == 1
    # The launcher adds lines of its own, a traceback among them; the ranks add none.
    assert "]<stderr>:Traceback" not in output and "HorovodInternalError" not in output


def test_corrupt_image_is_named_before_training(train, tmp_path, digits):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    broken = sorted((data / "train" / "3").iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:200])
    code, output = train(tmp_path / "out", data=data, controller="mpi", limit=60)
    assert code != 0
    assert output.count("1 corrupt images") == 1 and str(broken) in output
    assert output.index("corrupt images") < output.index("; the rest is mpirun's")
    assert "epoch 1/" not in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batchsize=3"], "unknown option --batchsize: did you mean '--batch-size'?"),
        (["--resume=/no/such.pt"], "no such checkpoint: /no/such.pt"),
        (["--lr=1e30", "--warmup-epochs=0", "--anderson=off"], "training diverged"),
    ],
)
def test_user_errors_are_one_line(train, tmp_path, options, message):
    code, output = train(tmp_path / "out", *options, ranks=1, limit=60)
    assert code == 2
    assert output.count("error: ") == 1 and message in output
    assert "Traceback" not in output


def test_resume_with_other_settings_is_refused(train, straight, tmp_path):
    shutil.copy(straight[0] / "last.pt", tmp_path / "last.pt")
    code, output = train(tmp_path, "--anderson=default", "--resume=auto", ranks=1)
    assert code == 2 and "anderson was 'off', is" in output
    code, output = train(tmp_path, "--anderson=off", "--resume=auto", ranks=1)
    assert code == 2 and "was written by 2 ranks, this run has 1" in output


def test_a_training_killed_before_its_summary_gets_it_on_resume(train, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    summary = tmp_path / "out" / "summary.json"
    expected = json.loads(summary.read_text())
    for name in ("summary.json", "summary.txt", "training.png"):
        (tmp_path / "out" / name).unlink()
    options = ("--anderson=off", "--epochs=2", "--resume=auto")
    code, output = train(tmp_path / "out", *options)
    assert code == 0, output[-4000:]
    assert output.count("the summary is missing") == 1
    found = json.loads(summary.read_text())
    assert found.keys() == expected.keys() - {"total_seconds"}
    for name in ("steps", "training_loss", "best_validation_top1", "validation_top1"):
        assert found[name] == expected[name], name
    for name in ("validation_loss", "training_seconds", "ms_per_step", "images_per_second"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert (tmp_path / "out" / "training.png").exists()
    code, output = train(tmp_path / "out", *options)
    assert code == 0 and "nothing left to train" in output and "summary is missing" not in output
