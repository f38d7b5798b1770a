"""Training by the clock: it ends in time with everything written, its schedule with it, and goes on with its clock."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, read_log, run_many, run_prepared

import run_training
from mindmerger.runtime.errors import UserError
from mindmerger.training import time_limit
from mindmerger.training.checkpoints import check_state
from mindmerger.training.settings import parse
from mindmerger.training.time_limit import TimeLimit
from mindmerger.training.trainer import Progress, Run, learning_rate, set_learning_rate


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def pass_(self, seconds):
        self.seconds += seconds


def a_run(args, total_steps, minutes, clock, used=0.0, eval_steps=5, dev=4):
    """A run whose parts are stand-ins, but for its clock."""
    engine = SimpleNamespace(basic_optimizer=SimpleNamespace(param_groups=[{"lr": None, "share_of_lr": 1.0}]))
    data = SimpleNamespace(dev=np.arange(dev))
    loader = SimpleNamespace(data=data, lengths=np.full(10, 50), steps_per_epoch=10**6, release_pages=lambda: None)
    loader.starting_at = lambda epoch, batch: itertools.repeat(SimpleNamespace(epoch=0))
    settings = SimpleNamespace(args=args, output_dir=None)
    run = Run(settings, engine, loader, total_steps, eval_steps, eval_steps, clock=TimeLimit(minutes, used, now=clock))
    run.signals = SimpleNamespace(save_agreed=False)
    run.record = type("Record", (), {"__call__": lambda *_: None, "flush": lambda _: None})()
    return run


def rates_by_the_clock(args, minutes, step_s, total_steps=10_000):
    """The learning rates of a run whose steps take `step_s` seconds each."""
    clock = Clock()
    run = a_run(args, total_steps, minutes, clock)
    rates = []
    while len(rates) < total_steps:
        with run.clock.timing("step"):
            rates.append(set_learning_rate(run, len(rates)))
            clock.pass_(step_s)
        if run.clock.is_over():
            break
    return rates


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_and_decay_fit_into_the_time(scheduler):
    args = parse(["--lr", "1", "--lr_scheduler", scheduler, "--warmup_ratio", "0.1"])
    rates = rates_by_the_clock(args, minutes=10, step_s=2)
    assert len(rates) == 299
    peak = rates.index(max(rates))
    assert peak == 30 and all(a < b for a, b in zip(rates[:30], rates[1:31], strict=True)) and rates[0] > 0
    shares = np.arange(269) / 270
    expected = {"constant": 1 + 0 * shares, "linear": 1 - shares, "cosine": (1 + np.cos(np.pi * shares)) / 2}
    assert rates[30:] == pytest.approx(expected[scheduler], abs=1e-3)
    assert (rates[-1] < 0.01) == (scheduler != "constant")


def test_where_the_steps_end_first_the_rates_are_those_of_the_steps():
    args = parse(["--lr", "1", "--lr_scheduler", "cosine", "--warmup_ratio", "0.1", "--max_minutes", "60"])
    expected = [learning_rate(args, step, 40) for step in range(40)]
    assert rates_by_the_clock(args, minutes=60, step_s=2, total_steps=40) == expected
    assert rates_by_the_clock(args, minutes=None, step_s=1e6, total_steps=40) == expected


def trained(monkeypatch, clock, run, progress, step_s, evaluation_s, saving_s, stop_at=None):
    """Trains with steps, evaluations and checkpoints that take their time by the clock; returns what happened."""
    events = []

    def train_step(run, step, batch):
        clock.pass_(step_s(step) if callable(step_s) else step_s)
        events.append(("step", step + 1))
        # A forward pass takes a third of a step: so many positions were trained on.
        return {"tokens_per_s": 200 / evaluation_s / 3}, 143 if step + 1 == stop_at else 0

    def evaluate_and_save(run, progress):
        clock.pass_(evaluation_s)
        progress.evaluation_due = False
        events.append(("evaluation", progress.step))
        return 0

    def save_checkpoint(run, progress):
        progress.minutes = run.clock.minutes()
        clock.pass_(saving_s)
        events.append(("saving", progress.step))

    for function in (train_step, evaluate_and_save, save_checkpoint):
        monkeypatch.setattr(run_training, function.__name__, function)
    return run_training.train(run, progress), events


TIMES = {
    "short evaluations": (7, 31, 11, 5),
    "long evaluations": (3, 100, 1, 5),
    "slow disk": (5, 10, 60, 5),
    "no evaluation before the last": (7, 60, 2, 10**6),
    "long steps": (90, 20, 20, 2),
    "first step compiles": (lambda step: 100 if step == 0 else 4, 20, 5, 10),
    "uneven steps": (lambda step: 4 + step % 5, 20, 5, 10),
}


@pytest.mark.parametrize("times", TIMES)
def test_the_last_evaluation_and_checkpoint_are_written_in_time_after_a_whole_step(monkeypatch, times):
    step_s, evaluation_s, saving_s, eval_steps = TIMES[times]
    clock, progress = Clock(), Progress()
    run = a_run(parse([]), 10**6, 10, clock, eval_steps=eval_steps)
    code, events = trained(monkeypatch, clock, run, progress, step_s, evaluation_s, saving_s)
    assert code == 0 and progress.step < 10**6
    used = clock.seconds - 1000
    longest = max(step_s(i) for i in range(20)) if callable(step_s) else step_s
    # In time, and not long before: by less than another step with what has to follow it.
    assert 600 - longest - 3 * evaluation_s - 2 * saving_s <= used <= 600, used
    assert events[-3:] == [("step", progress.step), ("evaluation", progress.step), ("saving", progress.step)]
    assert progress.minutes == pytest.approx(10)


def test_a_resumed_run_continues_its_clock_and_one_whose_time_is_over_takes_no_step(monkeypatch):
    clock, progress = Clock(), Progress()
    run = a_run(parse([]), 10**6, 10, clock)
    code, events = trained(monkeypatch, clock, run, progress, 7, 31, 11, stop_at=20)
    assert code == 143 and events[-1] == ("saving", 20)
    used = clock.seconds - 1000
    state = json.loads(json.dumps(progress.state(8)))
    assert state["minutes"] == pytest.approx((used - 11) / 60)  # as of before it was written
    clock.pass_(10**5)  # the queue of a cluster
    began, progress = clock.seconds, Progress.from_state(state, 8)
    run = a_run(parse([]), 10**6, 10, clock, used=progress.minutes)
    assert trained(monkeypatch, clock, run, progress, 7, 31, 11)[0] == 0
    assert 500 < used + clock.seconds - began <= 611
    again = Progress.from_state(progress.state(8), 8)
    run = a_run(parse([]), 10**6, 10, clock, used=again.minutes)
    assert trained(monkeypatch, clock, run, again, 7, 31, 11) == (0, [])
    finished, more = again.step, a_run(parse([]), 10**6, 20, clock, used=again.minutes)
    assert trained(monkeypatch, clock, more, again, 7, 31, 11)[1][0] == ("step", finished + 1)


def test_without_a_limit_nothing_is_recorded_and_no_rank_is_asked(monkeypatch):
    monkeypatch.setattr(time_limit, "broadcast_object", None)
    clock = TimeLimit()
    assert (clock.share(), clock.is_over()) == (0.0, False)
    assert "minutes" not in Progress(step=3).state(8)


def test_rank_0_decides(monkeypatch):
    """A rank whose clock is behind ends with the others, and one whose clock is ahead goes on with them."""
    behind, ahead = TimeLimit(1, now=Clock()), TimeLimit(1, used=2, now=Clock())
    assert (behind.share(), behind.is_over()) == (0.0, False)
    for ask, sent in ((behind.share, 0.75), (behind.is_over, True), (ahead.share, 0.25), (ahead.is_over, False)):
        monkeypatch.setattr(time_limit, "broadcast_object", lambda own, sent=sent: sent)
        assert ask() == sent


@pytest.mark.parametrize("minutes", [-1, "1", True, math.inf, None])
def test_minutes_that_cannot_be_are_refused_in_a_checkpoint(minutes):
    state = Progress(minutes=1.5).state(8) | {"identity": {}}
    check_state("folder", state)
    with pytest.raises(UserError, match="minutes in state.json is .*: it is not training state"):
        check_state("folder", state | {"minutes": minutes})


def test_two_ranks_end_in_time_and_the_same_command_then_trains_no_further(flags, tmp_path):
    limited = [*flags, "--epoch_num", "100000", "--eval_steps", "20", "--lr_scheduler", "cosine", "--max_minutes"]
    codes, printed = run_prepared(ROOT / "run_training.py", *limited, "0.1", cwd=tmp_path, ranks=2)
    assert codes == [0, 0], printed
    assert "--max_minutes 0.1 being over, at step" in printed[0]
    folder = tmp_path / "outputs/MindMerger/math/mapping"
    steps, rates = read_log(folder), read_log(folder, "lr")
    assert len(steps) > 3 and rates[0] == pytest.approx(1e-2, rel=1e-3) and rates[-1] < 0.25 * rates[0]
    assert all(a >= b for a, b in zip(rates[20:], rates[21:], strict=False))
    assert sum(8 / speed for speed in read_log(folder, "samples_per_s")[1:]) < 6
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"step", "dev_loss"} and lines[-1]["step"] == len(steps)
    state = json.loads((folder / f"checkpoint-{len(steps):06d}/state.json").read_text())
    assert state["minutes"] == pytest.approx(0.1, rel=0.2) and not state["evaluation_due"]
    again, refused, more = run_many(
        tmp_path,
        [
            [*limited, "0.1"],
            [*limited, "0.15"],
            [*limited, "0.15", "--allow_changed", "max_minutes", "--max_steps", str(len(steps) + 2)]
            + ["--allow_changed", "max_steps"],
        ],
    )
    assert again["code"] == 0 and f"at step {len(steps)} of" in again["printed"], again
    assert refused["code"] == 2 and "was trained with --max_minutes 0.1, this run has 0.15" in refused["error"]
    assert more["code"] == 0 and f"finished at step {len(steps) + 2} of {len(steps) + 2}" in more["printed"], more
