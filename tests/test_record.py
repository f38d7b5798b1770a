"""The record of a training run: what a resumed run keeps of it, and what reaches the report targets."""

import argparse
import json
import sys

import pytest
from conftest import ROOT

from mindmerger.runtime.errors import UserError
from mindmerger.training.record import Recorder

STAND_INS = ROOT / "tests/stand_ins"


@pytest.fixture
def record(tmp_path):
    """A recorder whose log has steps 1 to 5, an evaluation at 4, and is not yet cut back."""
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)] + [{"step": 4, "dev_loss": 2.0}]
    lines += [{"step": 5, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Recorder(argparse.Namespace(report_to="none", logging_steps=1), tmp_path)


def steps(record):
    """(step, whether it is an evaluation) of every line."""
    lines = [json.loads(line) for line in record.path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], "dev_loss" in line) for line in lines]


def test_an_evaluation_that_will_be_made_again_leaves_the_log_and_any_other_stays(record):
    """The checkpoint of a stop before its evaluation stays as it is when the evaluation has been made up for: a second
    resume from it wrote the evaluation's line twice."""
    record.rewind(4, evaluation_due=False)
    assert steps(record) == [(1, False), (2, False), (3, False), (4, False), (4, True)]
    record.rewind(4, evaluation_due=True)
    assert steps(record) == [(1, False), (2, False), (3, False), (4, False)]


@pytest.mark.parametrize("damage", [b'{"step": 2, "loss\xff\xfe": 1}', b"\x00" * 9, b"[" * 100_000, b"[2]", b"7"])
def test_damaged_lines_of_the_log_are_dropped_by_name_and_do_not_stop_a_resume(record, damage, capsys):
    whole = record.path.read_bytes()
    record.path.write_bytes(damage + b"\n" + whole)
    record.rewind(5)
    assert record.path.read_bytes() == whole
    assert f"{record.path}: dropped a damaged line" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Report targets. tensorboard and wandb need not be installed: stand-ins keep their rules


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Opens a recorder of a target at a step, as a starting or resumed run does."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.setenv("WANDB_SERVER", str(tmp_path / "server.json"))
    for name in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import tensorboard

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)

    def open_at(name, step, evaluation_due=False, **more):
        arguments = {"report_to": name, "logging_steps": 1, "save_name": "s", "lr": 0.1, "languages": None, **more}
        record = Recorder(argparse.Namespace(**arguments), tmp_path)
        record.rewind(step, evaluation_due)
        return record

    yield open_at
    for name in ("wandb", "tensorboard"):
        sys.modules.pop(name, None)


def train(record, last, evaluations=()):
    """Records the steps up to `last`, each with a loss that tells it, and evaluations after some of them."""
    while record.step < last:
        record({"loss": float(record.step + 1)}, 0)
        if record.step in evaluations:
            record.evaluation(record.step, record.step / 2)


def wandb_runs(tmp_path):
    return json.loads((tmp_path / "server.json").read_text())


def test_wandb_continues_its_run_after_a_resume_and_has_every_step_once(target, tmp_path, capsys):
    """A second run with its own copy of the overlapping steps began."""
    record = target("wandb", 0)
    train(record, 5, evaluations=(2, 4))
    record.close(failed=True)
    record = target("wandb", 2, lr=0.2)  # from the checkpoint of step 2
    train(record, 6, evaluations=(2, 4, 6))
    record.close(failed=False)
    ((_, run),) = wandb_runs(tmp_path).items()
    losses = [row["step"] for row in run["rows"].values() if "loss" in row]
    assert losses == [1, 2, 3, 4, 5, 6] and run["dropped"] == []
    assert [row["step"] for row in run["rows"].values() if "dev_loss" in row] == [2, 4, 6]
    assert run["metrics"]["*"] == "step"
    assert run["config"]["lr"] == 0.2 and run["exit_code"] == 0 and run["inits"] == 2
    assert "wandb has the steps 3 to 5 of its run already" in capsys.readouterr().err


def test_wandb_gets_the_evaluation_that_a_stop_left_due(target, tmp_path):
    """Its step is not above that of the last row, so wandb would drop it."""
    record = target("wandb", 0)
    train(record, 4, evaluations=(2,))
    record.close(failed=True)
    record = target("wandb", 4, evaluation_due=True)
    record.evaluation(4, 0.25)
    train(record, 5)
    record.close(failed=False)
    ((_, run),) = wandb_runs(tmp_path).items()
    assert [row["dev_loss"] for row in run["rows"].values() if "dev_loss" in row] == [1.0, 0.25]
    assert run["dropped"] == []


def test_a_run_that_starts_over_begins_a_new_run_of_wandb(target, tmp_path):
    for _ in range(2):
        record = target("wandb", 0)
        train(record, 2)
        record.close(failed=False)
    assert [run["inits"] for run in wandb_runs(tmp_path).values()] == [1, 1]


def test_a_wandb_that_cannot_start_is_one_line(target, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_REFUSES", "1")
    with pytest.raises(UserError, match=r"^--report_to wandb: No API key configured.*WANDB_MODE=offline$"):
        target("wandb", 0)


def test_a_wandb_that_cannot_start_and_does_not_say_why_is_one_line(target, monkeypatch):
    """The first line of an empty message was looked for."""
    record = target("wandb", 0)
    wandb = sys.modules["wandb"]
    record.close(failed=False)

    def refuse(**_):
        raise wandb.Error

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="^--report_to wandb: Error: log in with"):
        target("wandb", 0)


def test_tensorboard_shows_every_step_once_after_a_resume_and_the_hyper_parameters(target, tmp_path):
    """Steps after the checkpoint stood twice, and the file ended where the buffer had been written by chance."""
    import tensorboard

    record = target("tensorboard", 0)
    train(record, 5, evaluations=(2, 4))
    folder = tmp_path / "tensorboard"
    assert ("loss", 5) in tensorboard.shown(folder)  # without a close: flushed with the log
    record = target("tensorboard", 4, evaluation_due=True)
    train(record, 4)
    record.evaluation(4, 0.25)
    train(record, 6)
    record.close(failed=False)
    for tag, steps in (("loss", [1, 2, 3, 4, 5, 6]), ("dev_loss", [2, 4])):
        assert [step for found, step in tensorboard.shown(folder) if found == tag] == steps
    told = [event["hparams"] for event in tensorboard.events(folder) if "hparams" in event]
    assert told[-1]["lr"] == 0.1 and told[-1]["languages"] == "null"
    assert tensorboard.events(folder)[-1] == {"closed": True}


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """The real package, which stores into a folder of this test; gives a function that reads the rows of all runs."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read as the package loads
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    return lambda: {run: SQLiteStorage.get_logs("s", run) for run in SQLiteStorage.get_runs("s")}


def test_trackio_continues_its_run_after_a_resume_and_has_every_step_once(target, trackio, tmp_path, capsys):
    record = target("trackio", 0)
    train(record, 5, evaluations=(2, 4))
    record.close(failed=True)
    record = target("trackio", 2, lr=0.2)  # from the checkpoint of step 2
    train(record, 6, evaluations=(2, 4, 6))
    record.close(failed=False)
    ((name, rows),) = trackio().items()
    assert json.loads((tmp_path / "trackio_run.json").read_text()) == {"run": name, "step": 6, "evaluation": 6}
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(n, n) for n in range(1, 7)]
    assert [(row["step"], row["dev_loss"]) for row in rows if "dev_loss" in row] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    out, err = capsys.readouterr()
    assert out == "" and "trackio has the steps 3 to 5 of its run already: they stay as they are" in err
    record = target("trackio", 0)  # a run that starts over
    train(record, 1)
    record.close(failed=False)
    assert sorted(len(rows) for rows in trackio().values()) == [1, 9]


def test_trackio_gets_the_evaluation_that_a_stop_left_due_and_no_evaluation_twice(target, trackio):
    record = target("trackio", 0)
    train(record, 4, evaluations=(2,))
    record.close(failed=True)
    record = target("trackio", 4, evaluation_due=True)
    record.evaluation(4, 0.25)
    record.close(failed=True)
    for _ in range(2):  # resumed from the checkpoint after it, whose lines are offered again
        record = target("trackio", 4)
        record.close(failed=True)
    ((_, rows),) = trackio().items()
    assert [row["dev_loss"] for row in rows if "dev_loss" in row] == [1.0, 0.25]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_a_trackio_that_cannot_start_or_continue_is_one_line(target, trackio, tmp_path, monkeypatch):
    record = target("trackio", 0)
    train(record, 1)
    record.close(failed=False)
    (tmp_path / "trackio_run.json").write_text("{")
    with pytest.raises(UserError, match=r"trackio_run.json is damaged: remove it, and trackio begins another run$"):
        target("trackio", 1)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "space")  # without a login
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="^--report_to trackio: .*'hf auth login', or unset TRACKIO_SPACE_ID"):
        target("trackio", 0)
