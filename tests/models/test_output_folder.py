"""A second training in a folder: what is refused, what is removed, what the files then hold."""

import csv
import os

import pytest
from launching import start

from models.errors import UserError
from models.metrics import MetricsLog, read_csv
from models.output import SETTINGS, claim, clear, contents, write_settings

TRAINED = ("last.pt", "best.pt", "last.7.0.part", "last.7.1.part", "steps.csv", "epochs.csv",
           "summary.json", "summary.txt", "training.png", ".last.pt.12.partial", "steps.partial",
           "tensorboard/events.out.tfevents.1.host.2.0")  # fmt: skip
OTHERS = ("notes.txt", "data.csv", "model.pt", "last.pt.bak", "last.7.part", "my.steps.csv",
          "tensorboard/notes.txt", "tensorboard/other/events.out.tfevents.9")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def folder(*names):
        for name in names:
            path = tmp_path / "out" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return tmp_path / "out"

    return folder


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", [*TRAINED, SETTINGS])
def test_any_file_of_a_training_is_one(folder, name):
    out = folder(name, *OTHERS)
    if name == SETTINGS:
        (out / name).unlink()
        write_settings(out, "lr: 1\n", print)
    with pytest.raises(UserError, match=f"holds a training already.*{name.split('/')[0]}.*--over"):
        claim(out, None, False)
    assert claim(out, None, True) is None
    assert name.split("/")[0] in clear(out)
    assert files(out) == sorted(OTHERS)
    assert claim(out, None, False) is None


def test_all_of_a_training_is_removed_and_nothing_else(folder):
    out = folder(*TRAINED, *OTHERS)
    clear(out)
    assert files(out) == sorted(OTHERS)
    assert clear(out) == ""


def test_what_another_training_writes_meanwhile_is_not_removed(folder):
    out = folder("steps.csv")
    known = contents(out)
    folder("last.pt")
    with pytest.raises(UserError, match=r"newer than this training \(last.pt\): another one"):
        clear(out, known)
    assert files(out) == ["last.pt", "steps.csv"]
    (out / "last.pt").unlink()
    assert clear(out, known) == "steps.csv"


def test_a_job_that_is_queued_again_does_not_overwrite_itself(folder, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="give --resume auto"):
        claim(folder(), None, True)


@pytest.mark.parametrize(("overwrite", "resume"), [(True, None), (False, "auto")])
def test_a_folder_that_cannot_be_replaced_is_found_at_the_start(folder, overwrite, resume):
    out = folder("best.pt/mine.txt", "steps.csv")
    with pytest.raises(UserError, match=r"cannot replace .*best\.pt, which is a folder"):
        claim(out, resume, overwrite)
    assert files(out) == ["best.pt/mine.txt", "steps.csv"]


def test_the_checkpoint_goes_first(folder, monkeypatch):
    """Of what an interrupted removal leaves, nothing goes on."""
    out, gone = folder(*TRAINED), []
    monkeypatch.setattr(type(out), "unlink", lambda path, **_: gone.append(path.name))
    clear(out)
    assert gone[0] == "last.pt" and gone[1] == "best.pt"


def test_a_file_of_the_users_with_our_name_stays(folder):
    out, said = folder(SETTINGS), []
    assert claim(out, None, False) is None and clear(out) == ""
    write_settings(out, "lr: 1\n", said.append)
    assert "file of your own" in said[0] and (out / SETTINGS).read_text() == SETTINGS


@pytest.mark.parametrize(
    ("names", "resume", "message"),
    [
        (["last.pt", "steps.csv"], None, "give --resume auto to go on with it, --overwrite"),
        (["steps.csv"], None, "give --overwrite to remove these"),
        (["last.pt"], "elsewhere/last.pt", "is of another folder"),
        (["summary.json", "best.pt"], "auto", "but no last.pt to go on from"),
    ],
)
def test_what_is_refused(folder, names, resume, message):
    out = folder(*names)
    with pytest.raises(UserError, match=message):
        claim(out, resume, False)
    assert files(out) == sorted(names)


def test_what_goes_on(folder, tmp_path):
    assert claim(tmp_path / "new", "auto", False) is None and (tmp_path / "new").is_dir()
    assert claim(tmp_path / "new", "elsewhere/last.pt", False) is None
    notice = claim(folder("steps.csv", "epochs.csv"), "auto", False)
    assert "the training begins" in notice and "steps.csv" in notice
    out = folder(*TRAINED)
    assert claim(out, "auto", False) is None
    os.symlink(out, tmp_path / "link")
    for path in (out / "best.pt", tmp_path / "link" / "last.pt"):
        assert claim(out, str(path), False) is None
    (out / "last.pt").unlink()
    (out / "last.pt").symlink_to("not mounted")
    assert claim(out, "auto", False) is None, "an error when it is read, not a new beginning"


def log_of(folder, *rows, **settings):
    log = MetricsLog(folder, tensorboard=False, say=settings.pop("say", print), **settings)
    for row in rows:
        log.write("steps", row)
    log.close()


def test_numbers_are_the_same_after_a_resume(tmp_path):
    rows = [{"step": n, "epoch": 1, "loss": 1 / n, "gap": None} for n in (1, 2, 33, 34)]
    log_of(tmp_path, *rows)
    before = (tmp_path / "steps.csv").read_bytes().splitlines()
    log_of(tmp_path, {"step": 34, "epoch": 2, "loss": 0.5, "gap": 7}, resume_step=33)
    after = (tmp_path / "steps.csv").read_bytes().splitlines()
    assert after == [*before[:-1], b"34,2,0.5,7"]
    with open(tmp_path / "steps.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 33, 34]
    assert [type(row["step"]) for row in read_csv(tmp_path / "steps.csv")] == [int] * 4


def test_rows_that_a_resume_removes_are_said(tmp_path):
    """As from best.pt, which is older than the newest rows."""
    log_of(tmp_path, *({"step": n, "loss": 1 / n} for n in (1, 2, 3, 4)))
    said = []
    log_of(tmp_path, {"step": 3, "loss": 0.5}, resume_step=2, say=said.append)
    assert said == ["steps.csv: 2 rows after step 2, from which this training goes on, are removed"]
    said.clear()
    log_of(tmp_path, {"step": 4, "loss": 0.5}, resume_step=3, say=said.append)
    assert said == []


@pytest.mark.parametrize(
    "damaged", ["33,", "33,0.2", "33", "33,0.25\x00\r\n", "x,1\r\n", "\r\n", "3,4,5\r\n"]
)
def test_damaged_lines_are_left_out_and_said(tmp_path, damaged):
    text = f"step,loss\r\n1,0.5\r\n{damaged}"
    (tmp_path / "steps.csv").write_bytes(text.encode())
    said = []
    log_of(tmp_path, {"step": 40, "loss": 2.0}, resume_step=39, say=said.append)
    assert (tmp_path / "steps.csv").read_text() == "step,loss\n1,0.5\n40,2.0\n"
    assert len(said) == 1 and "damaged lines" in said[0]


@pytest.mark.parametrize("content", ["", "step", "loss\r\n1\r\n", "\xff\x00"])
def test_a_file_without_steps_begins_anew(tmp_path, content):
    (tmp_path / "steps.csv").write_bytes(content.encode("latin-1"))
    log_of(tmp_path, {"step": 40, "loss": 2.0}, resume_step=39)
    assert (tmp_path / "steps.csv").read_text() == "step,loss\n40,2.0\n"


def test_columns_of_an_older_version_stay(tmp_path):
    (tmp_path / "steps.csv").write_text("step,old,loss\n1,5,0.5\n2,6,0.25\n")
    log_of(tmp_path, {"step": 2, "loss": 2.0, "new": 1}, resume_step=1)
    assert (tmp_path / "steps.csv").read_text() == "step,loss,new,old\n1,0.5,,5\n2,2.0,1,\n"


@pytest.mark.ranks
def test_trainings_in_one_folder():
    """On two real ranks; see the program."""
    code, output = start("tests/models/second_trainings.py", ranks=2, controller="mpi", limit=240)
    assert code == 0, output[-6000:]
    assert output.count("passed ") == 7, output[-6000:]
