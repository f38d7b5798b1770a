"""Answers chosen among the labels of a row: the one that the LLM finds likeliest, the end token included.

With its end token a label is what generation would have to give to be right, and what training has the LLM predict. The
probabilities of a row's labels are then those of different answers and add up to 1 at most, also where one label is the
beginning of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mindmerger.generation.answers import Generation, batch_inputs, explain_batch_out_of_memory
from mindmerger.runtime.errors import UserError


@dataclass
class Choice(Generation):
    """An answer chosen among labels; `label_log_probs` has all of them in the row's order: summed over the tokens with
    the end token, in nats."""

    label_log_probs: dict[str, float]


def encode_labels(tokenizers, rows: Sequence[tuple[str, ...]]) -> dict[str, list[int]]:
    """Returns the tokens of every label that a row has, with the end token, as training has them in its targets.

    Args:
        rows: the labels of each row.

    Raises:
        UserError: where two labels of a row are the same tokens.
    """
    from mindmerger.data.tokenising import encode_targets

    texts = list(dict.fromkeys(label for labels in rows for label in labels))
    found = dict(zip(texts, encode_targets(tokenizers, texts), strict=True))
    for labels in dict.fromkeys(rows):
        own = [tuple(found[label]) for label in labels]
        if len(set(own)) < len(own):
            twice = [label for label, ids in zip(labels, own, strict=True) if own.count(ids) > 1]
            raise UserError(
                f"the labels {' and '.join(map(repr, twice))} are the same tokens for the LLM's tokenizer, so that "
                "neither can be chosen: evaluate with --scoring generate, train with --dev_accuracy_rows 0"
            )
    return found


def label_tensors(ids_of: dict[str, list[int]], rows: Sequence[tuple[str, ...]], pad_id: int, size: tuple[int, int]):
    """Returns the labels of a batch as ids and mask (B, C, T), padded on the right: C and T as `size` says.

    Args:
        ids_of: as `encode_labels` gives it.
        rows: the labels of each row of the batch.
    """
    import torch

    ids_BCT = torch.full((len(rows), *size), pad_id, dtype=torch.int64)
    mask_BCT = torch.zeros_like(ids_BCT)
    for row, labels in enumerate(rows):
        for number, label in enumerate(labels):
            ids = ids_of[label]
            ids_BCT[row, number, : len(ids)] = torch.tensor(ids)
            mask_BCT[row, number, : len(ids)] = 1
    return ids_BCT, mask_BCT


def size_of(ids_of: dict[str, list[int]], rows: Sequence[tuple[str, ...]]) -> tuple[int, int]:
    """Returns the most labels of a row, and the most tokens of a label."""
    return max(map(len, rows)), max(len(ids_of[label]) for labels in rows for label in labels)


def choose_labels(model, settings, batch: list[int]) -> list[Choice]:
    """Returns the likeliest label of each example numbered `batch`; of equally likely ones the first.

    Raises:
        UserError: out of memory, or for log-probabilities that are not numbers.
    """
    import torch

    rows = [settings.examples[i].labels for i in batch]
    inputs = batch_inputs(model, settings.tokenizers, settings.columns, batch)
    size = size_of(settings.label_ids, rows)
    ids_BCT, mask_BCT = label_tensors(settings.label_ids, rows, settings.tokenizers.llm_pad_id, size)
    with explain_batch_out_of_memory(inputs, settings.max_new_tokens), torch.no_grad():
        output = model(**inputs, target_ids=ids_BCT.to(model.device), target_mask=mask_BCT)
        losses_BC = output.label_losses.cpu()
    if not losses_BC[mask_BCT[:, :, 0].bool()].isfinite().all():
        raise model.not_finite_error()
    choices = []
    for labels, losses in zip(rows, losses_BC.tolist(), strict=True):
        log_probs = {label: -loss for label, loss in zip(labels, losses, strict=False)}
        choices.append(Choice(max(log_probs, key=log_probs.get), 0, False, log_probs))
    return choices


def gold_of_choices(settings, batch: list[int], choices: list[Choice]) -> list[dict]:
    """Returns what `score_gold` returns, from the choices made: the gold answer is one of the labels."""
    targets = [settings.examples[i].target for i in batch]
    pairs = zip(targets, choices, strict=True)
    return [
        {"gold_loss": -one.label_log_probs[target], "gold_tokens": len(settings.label_ids[target])}
        for target, one in pairs
    ]
