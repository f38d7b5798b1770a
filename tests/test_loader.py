"""The way from row numbers to tensors: global batches from any place of a run, the dev split in groups."""

import itertools
import math
import threading
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from mindmerger.bridges import Mapping
from mindmerger.data import loader as data_loader
from mindmerger.data.loader import BatchLoader, TrainingData
from mindmerger.model.input_plan import plan_input
from mindmerger.training.trainer import Progress

ROWS, DEV = 23, 5


@pytest.fixture
def make(monkeypatch):
    """Builds one rank's loader over rows of different lengths."""
    generator = np.random.RandomState(0)
    lengths = generator.randint(1, 9, (ROWS + DEV, 3))
    names = ("encoder_ids", "prompt_ids", "target_ids")
    stored = {name: [[3 + row] * lengths[row, i] for row in range(ROWS + DEV)] for i, name in enumerate(names)}
    examples = SimpleNamespace(
        dataset=datasets.Dataset.from_dict(stored),
        encoder_lengths=lengths[:, 0],
        target_lengths=lengths[:, 2],
        merged_lengths=lambda prefix_length: 1 + prefix_length(lengths[:, 0]) + lengths[:, 1] + lengths[:, 2],
    )
    pads = SimpleNamespace(encoder_pad_id=0, llm_pad_id=0)

    def call(rank=0, ranks=1, **flags):
        monkeypatch.setattr(data_loader, "rank", lambda: rank)
        monkeypatch.setattr(data_loader, "world_size", lambda: ranks)
        sizes = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2, "eval_batch_size": 2}
        sizes |= {"micro_batch_tokens": None, "packing": False}
        args = SimpleNamespace(**{**sizes, "seed": 1, "num_workers": 2, **flags})
        data = TrainingData(examples, pads, np.arange(ROWS, ROWS + DEV), np.arange(ROWS))
        return BatchLoader(args, data, lambda tokens: tokens + 1, torch.device("cpu"))

    return call


def content(batches) -> list:
    """Rows, weights, tensors and counts of global batches."""
    found = []
    for batch in batches:
        loaded = [(m.rows.tolist(), m.weight, m.load("cpu").target_ids.tolist()) for m in batch.micro_batches]
        found.append((batch.epoch, batch.indices.tolist(), batch.target_tokens, loaded))
    return found


def test_a_run_that_starts_anywhere_gets_what_an_unbroken_one_got_there(make):
    whole = content(itertools.islice(make().starting_at(0, 0), 10))
    assert make().steps_per_epoch == 4 and [epoch for epoch, *_ in whole] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for epoch, batch in ((0, 3), (1, 0), (1, 2)):
        first = 4 * epoch + batch
        left = 10 - first
        assert content(itertools.islice(make().starting_at(epoch, batch), left)) == whole[first:]
    assert [row for _, rows, *_ in whole[:4] for row in rows] != [row for _, rows, *_ in whole[4:8] for row in rows]


def test_threads_change_no_batch(make):
    batches = [content(itertools.islice(make(num_workers=n).starting_at(0, 0), 5)) for n in (0, 1, 3)]
    assert batches[0] == batches[1] == batches[2]


def test_each_row_is_trained_on_once_an_epoch_whatever_the_number_of_ranks(make):
    for ranks in (1, 2, 3):
        seen = []
        for rank in range(ranks):
            epoch = itertools.islice(make(rank, ranks).starting_at(0, 0), 4)
            seen += [row for batch in epoch for m in batch.micro_batches if m.weight for row in m.rows.tolist()]
        assert sorted(seen) == list(range(ROWS))


def test_the_next_batch_is_collated_while_one_is_in_use(make, monkeypatch):
    loader, done = make(), threading.Event()
    collated = loader._collated
    needed = set(next(make(num_workers=0).starting_at(0, 1)).indices.tolist())

    def note(rows):
        needed.difference_update(rows.tolist())
        if not needed:
            done.set()
        return collated(rows)

    monkeypatch.setattr(loader, "_collated", note)
    batches = loader.starting_at(0, 0)
    next(batches)
    assert done.wait(10)


def test_all_ranks_get_equally_many_dev_groups_and_each_dev_row_counts_once(make, monkeypatch):
    monkeypatch.setattr(data_loader, "DEV_GROUP", 2)
    for ranks in (1, 2, 4):
        groups = [list(make(rank, ranks, eval_batch_size=1).dev_groups()) for rank in range(ranks)]
        assert len({tuple(len(group) for group in one) for one in groups}) == 1
        rows = [r for one in groups for group in one for m in group if m.weight for r in m.rows.tolist()]
        assert sorted(rows) == list(range(ROWS, ROWS + DEV))


def test_a_token_budget_splits_the_dev_split_too(make):
    """By rows alone a long row and its company took more memory than any micro-batch of the training."""
    loader = make(micro_batch_tokens=200, eval_batch_size=1)
    found = [m for group in loader.dev_groups() for m in group]
    assert sorted(r for m in found for r in m.rows.tolist()) == list(range(ROWS, ROWS + DEV)) and len(found) < DEV
    assert all(len(m.rows) * loader.lengths[m.rows].max() <= 200 for m in found)
    assert all(len(rows) * loader.lengths[rows].max() <= 200 for rows in loader.heaviest_of_dev())
    # Of some rows, such as those that have a dev accuracy, the longest come first.
    some = np.arange(ROWS, ROWS + 3)
    assert sorted(loader.heaviest_of_dev(some)[0]) == some.tolist()
    assert make(eval_batch_size=1).heaviest_of_dev(some)[0].tolist() == [some[np.argmax(loader.lengths[some])]]


@pytest.mark.parametrize("flags", [{}, {"micro_batch_tokens": 40}, {"train_batch_size": ROWS, "ranks": 2}])
def test_micro_batches_are_counted_as_they_are_made(make, flags):
    loader = make(**flags)
    steps = list(itertools.islice(loader.starting_at(0, 0), loader.steps_per_epoch))
    made = [len(batch.micro_batches) for batch in steps]
    assert loader.micro_batches_per_step() == max(1, round(sum(made) / len(made)))
    assert loader.micro_batches_per_step(1) == made[0]


def test_a_batch_is_laid_out_by_the_thread_that_collates_it(make):
    seen = []

    class Plan:
        def to(self, device):
            return ("moved", device)

    def plan(*masks):
        seen.append((threading.current_thread().name, [None if mask is None else mask.shape for mask in masks]))
        return Plan()

    loader = make(num_workers=1)
    loader.plan = plan
    micro = next(loader.starting_at(0, 0)).micro_batches[0].load("cpu")
    assert micro.arguments["plan"] == ("moved", "cpu") and "plan" not in micro.tensors
    assert all(name.startswith("collate") for name, _ in seen)
    masks = micro.encoder_attention_mask, micro.prompt_mask, micro.target_mask
    assert [mask.shape for mask in masks] in [shapes for _, shapes in seen]


def test_all_of_a_batch_for_a_gpu_waits_in_pinned_memory(make, monkeypatch):
    """A copy out of other memory waits for the GPU: tensors and layout alike."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    loader = make()
    loader.device, loader.plan = torch.device("cuda"), partial(plan_input, Mapping(2, 2), True)
    batch = loader._collated(np.arange(4))
    tensors = [*batch.tensors.values(), batch.plan.token_M]
    tensors += [one for packing in (batch.plan.encoder, batch.plan.rows) for one in vars(packing).values()]
    assert len(tensors) == 6 + 1 + 6 and {id(one) for one in tensors} == {id(one) for one in pinned}


def test_progress_comes_back_from_its_state_also_with_another_batch_size():
    progress = Progress()
    for _ in range(6):
        progress.advance(steps_per_epoch=4)
    assert (progress.step, progress.epoch, progress.batch) == (6, 1, 2)
    state = progress.state(batch_size=6)
    assert state["examples_in_epoch"] == 12 and state["best_dev_loss"] is None
    assert Progress.from_state(state, 6) == progress and progress.best_dev_loss == math.inf
    assert Progress.from_state(state, 5).batch == 2 and Progress.from_state(state, 12).batch == 1
