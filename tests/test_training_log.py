"""The record of a training run: what a resumed run keeps of it."""

import argparse
import json

import pytest

from training_log import Recorder


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
    record.cut_back(4, evaluation_due=False)
    assert steps(record) == [(1, False), (2, False), (3, False), (4, False), (4, True)]
    record.cut_back(4, evaluation_due=True)
    assert steps(record) == [(1, False), (2, False), (3, False), (4, False)]


@pytest.mark.parametrize("damage", [b'{"step": 2, "loss\xff\xfe": 1}', b"\x00" * 9, b"[" * 100_000, b"[2]", b"7"])
def test_damaged_lines_of_the_log_are_dropped_by_name_and_do_not_stop_a_resume(record, damage, capsys):
    whole = record.path.read_bytes()
    record.path.write_bytes(damage + b"\n" + whole)
    record.cut_back(5)
    assert record.path.read_bytes() == whole
    assert f"{record.path}: dropped a damaged line" in capsys.readouterr().err
