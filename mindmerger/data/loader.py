"""The way from row numbers to padded tensors, on this rank: order, micro-batches, collation ahead of time."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from mindmerger.data.batches import (
    Batch,
    MicroBatch,
    collate,
    epoch_batches,
    heaviest_batches,
    split_global_batch,
)
from mindmerger.runtime.processes import rank, world_size

DEV_GROUP = 16  # micro-batches of the dev split between two looks at whether the run was asked to stop


class TrainingData(NamedTuple):
    """A run's tokenised examples and their split.

    examples: a `TrainingSet`. tokenizers: a `Tokenizers`. dev, train: row numbers, int64. labels: a `DevLabels`, None
    where the dev split has no accuracy. states: an `EncoderStates`, None where the encoder runs in every step.
    """

    examples: object
    tokenizers: object
    dev: np.ndarray
    train: np.ndarray
    labels: object | None = None
    states: object | None = None


@dataclass
class LoadedMicroBatch:
    """A micro-batch whose tensors are being made, by a thread as a rule."""

    rows: np.ndarray
    weight: float  # 0 where the rows only keep the ranks in step
    _collated: Callable[[], Batch]
    waited: float = 0.0  # seconds that `load` spent waiting for the thread

    def load(self, device) -> Batch:
        """Returns the tensors, ids on the device; waits where the thread has fallen behind."""
        asked = time.perf_counter()
        batch = self._collated()
        self.waited += time.perf_counter() - asked
        return batch.to(device)


@dataclass
class GlobalBatch:
    """Data of one optimizer step: this rank's micro-batches, and what all ranks have together."""

    indices: np.ndarray  # of all ranks
    target_tokens: int  # of all ranks
    epoch: int
    micro_batches: list = field(default_factory=list)  # `MicroBatch`, then `LoadedMicroBatch`: of this rank


class BatchLoader:
    """Yields the global batches of a run from any place in it, and the dev split's micro-batches.

    Threads collate, not processes: padding a few rows of memory-mapped ids costs little, and forking a process that
    has threads of its own (gloo's, Arrow's, the signal listener's) hangs once in some hundred times.
    """

    def __init__(self, args, data: TrainingData, prefix_length: Callable, device, plan: Callable | None = None):
        """Prepares the way; reads no row yet.

        Args:
            args: training's flags, of which batch sizes, seed and number of threads count.
            prefix_length: the bridge's, K for a number of encoder tokens.
            device: on which the model runs; a GPU's batches wait in pinned memory.
            plan: the model's `plan_input`, by which a batch is laid out as soon as it is collated.
        """
        self.args, self.data, self.device, self.plan = args, data, device, plan
        # Of every merged row: BOS, prefix, prompt and target.
        self.lengths = data.examples.merged_lengths(prefix_length)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training rows."""
        return math.ceil(len(self.data.train) / self.args.train_batch_size)

    def starting_at(self, epoch: int, batch: int) -> Iterator[GlobalBatch]:
        """Yields the global batches from batch number `batch` of an epoch (both from 0) on, epoch after epoch.

        The rows of one global batch are split when it is asked for: splitting an epoch of a million rows beforehand
        would delay the first step by seconds. While one batch trains, the next one is collated.
        """
        return self._one_ahead(self._global_batches(epoch, batch))

    def dev_groups(self, rows: np.ndarray | None = None) -> Iterator[list[LoadedMicroBatch]]:
        """Yields this rank's micro-batches of the dev split, or of some rows of it, `DEV_GROUP` at a time: equally many
        groups of equally many on every rank, so that ranks can talk between them."""
        args, rows = self.args, self.data.dev if rows is None else rows
        micro_batches = self._split(rows, args.eval_batch_size, args.micro_batch_tokens)
        groups = (micro_batches[i : i + DEV_GROUP] for i in range(0, len(micro_batches), DEV_GROUP))
        for group in self._one_ahead(GlobalBatch(self.data.dev, 0, 0, one) for one in groups):
            yield group.micro_batches

    def dev_target_tokens(self) -> int:
        """Returns the number of target tokens of the whole dev split."""
        return int(self.data.examples.target_lengths[self.data.dev].sum())

    def release_pages(self) -> None:
        """Gives back the pages that rows were read from, as `TrainingSet.release_pages` does."""
        self.data.examples.release_pages()
        if self.data.states is not None:
            self.data.states.release_pages()

    def load(self, rows: np.ndarray) -> Batch:
        """Returns rows as tensors, ids on the device, at once."""
        return self._collated(rows).to(self.device)

    def heaviest(self) -> list[np.ndarray]:
        """Returns the rows of the micro-batches of training that may need most memory: the same on every rank."""
        args = self.args
        return self._heaviest(self.data.train, args.train_batch_size, args.train_micro_batch_size_per_gpu)

    def heaviest_of_dev(self, rows: np.ndarray | None = None) -> list[np.ndarray]:
        """Returns those of the dev split, or of some rows of it; the first has the longest rows."""
        rows = self.data.dev if rows is None else rows
        return self._heaviest(rows, len(rows), self.args.eval_batch_size)

    def _heaviest(self, rows: np.ndarray, batch_size: int, micro_batch_size: int) -> list[np.ndarray]:
        examples, budget = self.data.examples, self.args.micro_batch_tokens
        others = (examples.target_lengths, examples.encoder_lengths)
        # By budget a rank's whole share of a batch may be one micro-batch.
        most = math.ceil(batch_size / world_size()) if budget else micro_batch_size
        return heaviest_batches(rows, self.lengths, others, most, budget, self.args.packing)

    def positions(self, rows: np.ndarray) -> int:
        """Returns how many positions the LLM computes for a micro-batch of these rows, padding included."""
        lengths = self.lengths[rows]
        return int(lengths.sum() if self.args.packing else len(rows) * lengths.max())

    def micro_batches_per_step(self, steps: int = 16) -> int:
        """Returns how many micro-batches an optimizer step has, on average over the first steps of the first epoch,
        at least 1: a function of data and flags, wherever a run resumes."""
        args = self.args
        first = epoch_batches(self.data.train, args.train_batch_size, args.seed, 0)[:steps]
        sizes = [len(self._split_for_training(indices)) for indices in first]
        return max(1, round(sum(sizes) / max(1, len(sizes))))

    def _split_for_training(self, indices) -> list[MicroBatch]:
        return self._split(indices, self.args.train_micro_batch_size_per_gpu, self.args.micro_batch_tokens)

    def _split(self, indices, micro_batch_size: int, token_budget: int | None = None) -> list[MicroBatch]:
        sizes = (micro_batch_size, token_budget, self.args.packing)
        return split_global_batch(indices, self.lengths, world_size(), *sizes)[rank()]

    def _global_batches(self, epoch: int, first: int) -> Iterator[GlobalBatch]:
        args, targets = self.args, self.data.examples.target_lengths
        # Without end: the loop counts the steps, since --max_steps and a resumed run have fewer.
        while True:
            for indices in epoch_batches(self.data.train, args.train_batch_size, args.seed, epoch)[first:]:
                yield GlobalBatch(indices, int(targets[indices].sum()), epoch, self._split_for_training(indices))
            epoch, first = epoch + 1, 0

    def _one_ahead(self, batches: Iterable[GlobalBatch]) -> Iterator[GlobalBatch]:
        """Yields the batches with their micro-batches being loaded; the next one is begun before one is handed out."""
        threads = self.args.num_workers
        with ThreadPoolExecutor(threads, thread_name_prefix="collate") if threads else nullcontext() as pool:
            # A whole global batch ahead costs little memory: ids and masks of 128 rows of 1,000 tokens are 2 MB. States
            # of the encoder are more: in bf16 and of width 2048, 4 kB for each token and layer.
            begun = None
            for batch in batches:
                following = replace(batch, micro_batches=[self._begin(pool, micro) for micro in batch.micro_batches])
                if begun is not None:
                    yield begun
                begun = following
            if begun is not None:
                yield begun

    def _begin(self, pool: ThreadPoolExecutor | None, micro: MicroBatch) -> LoadedMicroBatch:
        # Without threads a micro-batch is collated when it is asked for.
        load = pool.submit(self._collated, micro.indices).result if pool else partial(self._collated, micro.indices)
        return LoadedMicroBatch(micro.indices, micro.weight, load)

    def _collated(self, rows: np.ndarray) -> Batch:
        columns, tokenizers = self.data.examples.dataset[rows.tolist()], self.data.tokenizers
        by_row = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = collate(by_row, tokenizers.encoder_pad_id, tokenizers.llm_pad_id)
        if self.data.states is not None and batch.encoder_input_ids is not None:
            batch.encoder_states = self.data.states.padded(rows)
        if self.plan is not None:
            batch.plan = self.plan(batch.encoder_attention_mask, batch.prompt_mask, batch.target_mask)
        return batch.pin() if self.device.type == "cuda" else batch
