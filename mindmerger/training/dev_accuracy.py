"""Dev accuracy: how often the likeliest label of a row is the right one, on some rows of the dev split.

A dev loss is an average over tokens and may fall while labels stay wrong. For tasks whose answers are labels the share
of right ones says what an evaluation with --scoring likelihood would: the labels, their tokens and their
log-probabilities are the same.
"""

import argparse
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from mindmerger.runtime.command import at_least
from mindmerger.runtime.errors import UserError

if TYPE_CHECKING:  # numpy and torch are imported where they are used: --help answers at once
    import numpy as np
    import torch

    from mindmerger.data.batches import Batch
    from mindmerger.tasks.examples import StageData
    from mindmerger.training.trainer import Progress, Run

SELECTIONS = ("loss", "accuracy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that count where a task's answers are labels."""
    add = parser.add_argument_group("dev accuracy (stages on the rows of a task with labels)").add_argument
    add("--dev_accuracy_rows", type=at_least(0), default=500, help="rows of the dev split, drawn by the seed, on which "
        "the likeliest label is compared with the right one; 0 for no dev accuracy")  # fmt: skip
    add("--select_by", choices=SELECTIONS, default=SELECTIONS[0], help="what the best mapping is chosen by: the lowest "
        "dev loss, or the highest dev accuracy and among equal ones the lowest loss")  # fmt: skip


def has_accuracy(args: argparse.Namespace, task, stage) -> bool:
    """Returns whether a stage has a dev accuracy: it trains on rows whose answers are labels."""
    on_rows = stage.data in ("task", "english_task")
    return on_rows and task.labels is not None and args.dev_accuracy_rows > 0 and args.dev_size != 0


def check_selection(args: argparse.Namespace, task, stage) -> None:
    """Refuses to choose by a dev accuracy that there is none of.

    Raises:
        UserError: saying why there is none.
    """
    if args.select_by != "accuracy" or has_accuracy(args, task, stage):
        return
    if args.dev_size == 0 or args.dev_accuracy_rows == 0:
        reason = "without rows (--dev_size, --dev_accuracy_rows) there is none"
    elif task.labels is None:
        reason = f"the answers of task {task.name} are no labels"
    else:
        reason = f"--stage_name {args.stage_name} does not train on the task's rows"
    raise UserError(f"--select_by accuracy chooses by dev accuracy, but {reason}: leave it out")


class DevLabels(NamedTuple):
    """The rows of the dev split that have an accuracy, and what they can be answered with.

    rows: row numbers of the data set, int64, the same on every rank. labels, target: of each of them, by row number.
    ids_of: tokens of each label. size: the most labels of a row, and the most tokens of a label.
    """

    rows: "np.ndarray"
    labels: dict[int, tuple[str, ...]]
    target: dict[int, str]
    ids_of: dict[str, list[int]]
    size: tuple[int, int]


def read_labels(args: argparse.Namespace, stage: "StageData", tokenizers, dev: "np.ndarray", examples) -> DevLabels:
    """Reads the labels of up to `--dev_accuracy_rows` rows of the dev split from the data files: tokenised data, which
    all stages share, do not hold them.

    Args:
        examples: the tokenised data set, whose rows are those of `stage` in order.

    Raises:
        UserError: for a file that has changed since it was tokenised, an answer that is none of its row's labels, and
            labels that are the same tokens.
    """
    from mindmerger.data.batches import draw_rows
    from mindmerger.generation.likelihood import encode_labels, size_of

    rows = draw_rows(dev, args.dev_accuracy_rows, args.seed)
    wanted = set(rows.tolist())
    found = enumerate(stage.examples([] if stage.skip_faulty_rows else None))
    chosen = {i: example for i, example in itertools.islice(found, int(rows.max()) + 1) if i in wanted}
    ids = dict(zip(rows.tolist(), examples.dataset[rows.tolist()]["id"], strict=True))
    for i, example in chosen.items():
        if example.id != ids[i]:
            raise UserError(
                f"row {i} of the data was {ids[i]} when it was tokenised and is {example.id} now: start again"
            )
        if example.target not in example.labels:
            raise UserError(
                f"the answer {example.target!r} of {example.id} is none of its labels ({', '.join(example.labels)}): "
                "correct the row, or pass --dev_accuracy_rows 0"
            )
    labels = {i: example.labels for i, example in chosen.items()}
    ids_of = encode_labels(tokenizers, list(labels.values()))
    targets = {i: example.target for i, example in chosen.items()}
    return DevLabels(rows, labels, targets, ids_of, size_of(ids_of, list(labels.values())))


def dev_accuracy(run: "Run") -> tuple[float, int]:
    """Computes the share of rows whose likeliest label is the right one, the rows shared among the ranks.

    Returns:
        the accuracy in percent and 0, or nan and the exit code of a signal that cut it short.
    """
    import torch

    known = run.loader.data.labels
    right = torch.zeros((), dtype=torch.float64, device=run.device)
    nothing = torch.zeros((), device=run.device)
    for group in run.loader.dev_groups(known.rows):
        for micro in group:
            rows = micro.rows.tolist()
            best_B = likeliest_labels(run, micro.load(run.device), rows)
            gold_B = torch.tensor([known.labels[i].index(known.target[i]) for i in rows], device=run.device)
            right += (best_B == gold_B).sum() * micro.weight
            run.signals.alive()
        if code := run.signals.agree(run.device, nothing)[0]:
            return math.nan, code
    code, (right,) = run.signals.agree(run.device, right)
    return 100 * right.item() / len(known.rows), code


def likeliest_labels(run: "Run", batch: "Batch", rows: list[int]) -> "torch.Tensor":
    """Returns the number of the likeliest label of each row, (B,), of equally likely ones the first.

    Args:
        batch: of those rows, on the device.
        rows: row numbers of the data set.
    """
    import torch

    from mindmerger.generation.likelihood import label_tensors
    from mindmerger.training.guards import EVAL_MEMORY_FLAGS, explain_step_out_of_memory

    known, pad_id = run.loader.data.labels, run.loader.data.tokenizers.llm_pad_id
    # One size for all batches: at ZeRO 3 every rank has to call the LLM equally often.
    ids_BCT, mask_BCT = label_tensors(known.ids_of, [known.labels[i] for i in rows], pad_id, known.size)
    labels = {"target_ids": ids_BCT.to(run.device), "target_mask": mask_BCT}
    with explain_step_out_of_memory(batch, EVAL_MEMORY_FLAGS), eagerly(run.args.compile), torch.no_grad():
        return run.engine(**batch.tensors | labels).label_losses.argmin(1)


def eagerly(compiled: bool):
    """Context manager: compiled layers run as they are written; a cache in them would be compiled for every length."""
    import contextlib

    import torch

    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def is_best(progress: "Progress", select_by: str, loss: float, accuracy: float | None) -> bool:
    """Returns whether an evaluation is better than the best one so far."""
    if select_by == "loss" or progress.best_dev_accuracy is None:
        return loss < progress.best_dev_loss
    # Of a few hundred rows equal shares are right often: then the loss decides.
    return (-accuracy, loss) < (-progress.best_dev_accuracy, progress.best_dev_loss)
