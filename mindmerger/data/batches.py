"""Batch order, a function of (seed, epoch), the split of a global batch into micro-batches, and collation.

Dimension letters: B rows, S encoder tokens, P prompt tokens, T target tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from mindmerger.tasks.readers import DataError

if TYPE_CHECKING:  # torch takes seconds to import, and only tensors need it
    import torch


def _generator(*key: int) -> np.random.RandomState:
    # RandomState over a SeedSequence: numpy promises never to change this stream, so a resumed run keeps its order.
    if min(key) < 0:
        raise DataError(f"--seed must not be negative, got {min(key)}")
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def automatic_dev_size(number_of_examples: int) -> int:
    """Returns the published 3000, or a tenth of a data set that is too small for it."""
    return min(3000, number_of_examples // 10)


def split_dev(
    number_of_examples: int, dev_size: int, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits row numbers into (dev, train): dev is the first `dev_size` of the seeded shuffle. Both int64.

    Args:
        groups: of each row, numbered from 0 in the order of their first rows; then whole groups are shuffled, and dev
            has as near to `dev_size` rows as they allow. Groups of one row each are split as single rows are.

    Raises:
        DataError: where `dev_size` leaves nothing to train on.
    """
    if dev_size < 0:
        raise DataError(f"--dev_size must be at least 0 or auto, not {dev_size}")
    if dev_size >= number_of_examples:
        raise DataError(
            f"--dev_size {dev_size} would take all of the {number_of_examples} examples "
            f"({dev_size / number_of_examples:.0%} of them): pass --dev_size auto for a tenth "
            f"({automatic_dev_size(number_of_examples)}), another number, or 0 for no dev split"
        )
    if groups is not None:
        return _split_groups(groups, dev_size, seed)
    order = _generator(seed).permutation(number_of_examples).astype(np.int64)
    return order[:dev_size], order[dev_size:]


def _split_groups(groups: np.ndarray, dev_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.bincount(groups)
    if dev_size and len(sizes) == 1:
        raise DataError(
            f"--dev_split groups: all {len(groups)} examples are one question and its translations, of which no part "
            "can be kept aside: pass --dev_split rows, or --dev_size 0"
        )
    order = _generator(seed).permutation(len(sizes))
    smallest = order[np.argmin(sizes[order])]
    in_dev, left = np.zeros(len(sizes), dtype=bool), dev_size
    for group in order:
        if 2 * left <= sizes[smallest]:  # none brings it nearer
            break
        if sizes[group] < 2 * left:
            in_dev[group], left = True, left - sizes[group]
    # Where groups are large, none or all can be nearest: there is to be something on either side.
    if dev_size and not in_dev.any():
        in_dev[smallest] = True
    elif in_dev.all():
        in_dev[smallest] = False
    place = np.empty(len(sizes), dtype=np.int64)
    place[order] = np.arange(len(sizes))
    rows = np.argsort(place[groups], kind="stable")
    return rows[in_dev[groups[rows]]], rows[~in_dev[groups[rows]]]


def draw_rows(rows: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Returns `number` of the rows, or all where there are fewer, in ascending order: the seed decides."""
    # The 2 keeps the draw apart from the order of epochs.
    return np.sort(rows[_generator(seed, 2).permutation(len(rows))[:number]])


def epoch_batches(train_indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Returns the global batches of an epoch (from 0), each (≤ batch_size,): (seed, epoch) decide."""
    # The 1 keeps epoch 0 apart from the dev split: a seed followed by zeros gives the same stream as the seed alone.
    order = np.asarray(train_indices)[_generator(seed, 1, epoch).permutation(len(train_indices))]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# What one more micro-batch costs, as a share of the token budget, for reading the weights and starting the kernels once
# more. Measured on a CPU with budgets of 2048: 75 positions in fp32, 25 in bf16 (docs/performance.md).
MICRO_BATCH_COST = 1 / 32


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank passes through the model at once; weight 0 where it only keeps the ranks in step."""

    indices: np.ndarray
    weight: float


def split_global_batch(
    indices: np.ndarray,
    lengths: np.ndarray,
    world_size: int,
    micro_batch_size: int,
    token_budget: int | None = None,
    packed: bool = False,
) -> list[list[MicroBatch]]:
    """Splits a global batch into micro-batches of rows of similar length: `[rank][i]`, equally many for every rank.

    Args:
        indices: rows of the global batch.
        lengths: merged length of every row of the data set, indexed by row (from `TrainingSet.merged_lengths`).
        micro_batch_size: most rows of a micro-batch, unless there is a budget.
        token_budget: most positions of a micro-batch, padding included; a longer row stands alone.
        packed: whether rows are passed without padding.

    Every row is in exactly one micro-batch of weight 1. Rows are dealt to the ranks in turn, by falling length: all
    ranks work on rows of similar length at the same time, the longest first, so that a lack of memory shows at once. A
    rank without rows passes one row with weight 0.
    """
    indices = np.asarray(indices)
    if not len(indices):
        return [[] for _ in range(world_size)]
    lengths = np.asarray(lengths)
    # Stable, so that rows of equal length keep the shuffled order with any version of numpy.
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    longest = lengths[order[::world_size]]  # of each deal of one row to every rank
    if token_budget is None:
        rounds = math.ceil(len(longest) / micro_batch_size)
        starts = [part[0] for part in np.array_split(np.arange(len(longest)), rounds)]
    else:
        starts = _starts_by_budget(longest, token_budget, packed)
    return [
        [
            MicroBatch(part, 1.0) if len(part) else MicroBatch(order[-1:], 0.0)
            for part in np.split(order[rank::world_size], starts[1:])
        ]
        for rank in range(world_size)
    ]


def heaviest_batches(
    indices: np.ndarray,
    lengths: np.ndarray,
    others: Sequence[np.ndarray],
    most_rows: int,
    token_budget: int | None = None,
    packed: bool = False,
) -> list[np.ndarray]:
    """Returns the rows of the micro-batches that may need most memory: the longest merged rows, and those with most
    tokens of another kind (targets make logits, sources the encoder's states).

    Args:
        indices: rows of the data set to choose from.
        lengths: merged length of every row of the data set.
        others: lengths of the other kinds, indexed alike.
        most_rows: of a micro-batch.
        token_budget: most positions of a micro-batch, padding included; a longer row stands alone.
        packed: whether rows are passed without padding: then a batch of the longest ones is filled up by shorter ones.
    """
    # By budget many short rows that are nearly all target have more targets than a few long ones.
    shares = [other / lengths for other in others] if token_budget else []
    found = {}
    for key in (lengths, *others, *shares):
        order = indices[np.argsort(-key[indices], kind="stable")]
        rows = order[:most_rows]
        if token_budget and packed:
            rows = order[_fill(lengths[order], token_budget, most_rows)]
        elif token_budget:
            positions = np.arange(1, len(rows) + 1) * np.maximum.accumulate(lengths[rows])
            rows = rows[: max(1, int((positions <= token_budget).sum()))]
        if len(rows):
            found.setdefault(frozenset(rows.tolist()), rows)
    return list(found.values())


def _fill(lengths: np.ndarray, token_budget: int, most_rows: int) -> list[int]:
    """Returns which rows a budget holds without padding when each is taken, in order, that still fits; the first is."""
    taken, left, first = [], max(token_budget, int(lengths[0])) if len(lengths) else 0, 0
    while len(taken) < most_rows and (fits := lengths[first:] <= left).any():
        taken.append(first + int(fits.argmax()))
        left, first = left - int(lengths[taken[-1]]), taken[-1] + 1
    return taken


def _starts_by_budget(longest: np.ndarray, token_budget: int, packed: bool = False) -> list[int]:
    """Finds where to split rows of falling length so that padding and the number of micro-batches together cost least.

    Every micro-batch costs its rows times its longest row, and a fixed `MICRO_BATCH_COST` of the budget besides:
    filling each one up would pad short rows to the length of long ones only to save a pass. The best split of the
    first n rows follows from the best splits of fewer. Packed, a micro-batch costs the sum of its rows: then the fewest
    are best.
    """
    fixed, rows = MICRO_BATCH_COST * token_budget, len(longest)
    before = np.concatenate([[0], np.cumsum(longest)])  # positions of the rows before each
    cost, start = np.full(rows + 1, np.inf), np.zeros(rows + 1, dtype=np.int64)
    cost[0] = 0.0
    for first in range(rows):
        if packed:
            most = int(np.searchsorted(before, before[first] + token_budget, side="right")) - 1 - first
        else:
            most = int(token_budget // max(1, longest[first]))
        ends = np.arange(first + 1, min(first + max(1, most), rows) + 1)
        positions = before[ends] - before[first] if packed else (ends - first) * longest[first]
        candidate = cost[first] + fixed + positions
        better = ends[candidate < cost[ends]]
        cost[better], start[better] = candidate[better - first - 1], first
    starts, end = [], rows
    while end:
        end = int(start[end])
        starts.append(end)
    return starts[::-1]


@dataclass
class Batch:
    """Rows as int64 tensors, padded on the right; both of a pair are None where no row has that segment.

    plan: how the model lays them out (`MindMerger.plan_input`), where that was settled beforehand.
    encoder_states: those of a frozen encoder that is not run, zeros behind each row's end.
    """

    encoder_input_ids: "torch.Tensor | None"  # (B, S)
    encoder_attention_mask: "torch.Tensor | None"
    prompt_ids: "torch.Tensor | None"  # (B, P)
    prompt_mask: "torch.Tensor | None"
    target_ids: "torch.Tensor | None"  # (B, T)
    target_mask: "torch.Tensor | None"
    plan: object | None = None
    encoder_states: "torch.Tensor | None" = None  # (layers, B, S, E), in the encoder's dtype

    @property
    def arguments(self) -> dict:
        """The model's arguments: the tensors that there are, and the plan."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @property
    def tensors(self) -> dict:
        """The tensors that there are, by the names of the model's arguments."""
        return {name: value for name, value in self.arguments.items() if name != "plan"}

    @property
    def sizes(self) -> dict[str, int]:
        """The tokens of each segment's longest row, padding included, for messages."""
        segments = {"encoder": self.encoder_input_ids, "prompt": self.prompt_ids, "target": self.target_ids}
        return {name: ids.shape[1] for name, ids in segments.items() if ids is not None}

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def to(self, device) -> "Batch":
        """Moves ids, states and plan to the device. Masks stay on the CPU: packing is planned there, and reading a mask
        back from the GPU would wait for it."""
        names = ("encoder_input_ids", "prompt_ids", "target_ids", "encoder_states")
        moved = {name: self.tensors[name].to(device, non_blocking=True) for name in names if name in self.tensors}
        return replace(self, plan=self.plan and self.plan.to(device), **moved)

    def pin(self) -> "Batch":
        """Copies the tensors into pinned memory, from which a GPU reads while the CPU goes ahead."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return replace(self, plan=self.plan and self.plan.pin(), **pinned)


def collate(rows: Sequence[Mapping[str, Sequence[int]]], encoder_pad_id: int, llm_pad_id: int) -> Batch:
    """Pads rows of `encoder_ids`, `prompt_ids` and `target_ids` on the right."""
    columns = (("encoder_ids", encoder_pad_id), ("prompt_ids", llm_pad_id), ("target_ids", llm_pad_id))
    pairs = [_pad([row.get(column) or [] for row in rows], pad_id) for column, pad_id in columns]
    return Batch(*(tensor for pair in pairs for tensor in pair))


def _pad(segments: list[Sequence[int]], pad_id: int) -> tuple:
    import torch

    lengths = torch.tensor([len(ids) for ids in segments])
    if not lengths.any():
        return None, None
    ids = torch.full((len(segments), int(lengths.max())), pad_id, dtype=torch.int64)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    for row, segment in enumerate(segments):
        ids[row, : len(segment)] = torch.as_tensor(segment, dtype=torch.int64)
    return ids, mask
