"""Gold answers: how likely the LLM finds them. A loss moves where greedy answers only say right or wrong."""

from mindmerger.generation.answers import batch_inputs, explain_batch_out_of_memory, split_evaluation
from mindmerger.generation.likelihood import Choice, gold_of_choices


def score_gold(model, settings, batch: list[int], answers: list | None = None) -> list[dict]:
    """Returns the loss of each gold answer of a batch, as the records of its examples hold it.

    Args:
        batch: numbers of examples.
        answers: theirs; of choices among labels the losses are known already.

    Returns:
        gold_loss: summed over the tokens, in nats; gold_tokens: their number, the end token included.

    Raises:
        UserError: out of memory, or for losses that are not numbers.
    """
    import torch

    if answers and isinstance(answers[0], Choice):
        return gold_of_choices(settings, batch, answers)
    losses = []
    # Where rows change places, a batch of answers is several of inputs: it has the longest ones first already.
    for part in split_evaluation(batch, settings):
        inputs = batch_inputs(model, settings.tokenizers, settings.columns, part, with_target=True)
        with explain_batch_out_of_memory(inputs, settings.max_new_tokens), torch.no_grad():
            losses += row_losses(model, inputs)
    if not all(loss.isfinite() for loss in losses):
        raise model.not_finite_error()
    tokens = [len(settings.columns["target_ids"][i]) for i in batch]
    return [{"gold_loss": loss.item(), "gold_tokens": n} for loss, n in zip(losses, tokens, strict=True)]


def row_losses(model, inputs: dict) -> list:
    """Returns the summed loss of each row, which `MindMerger.forward` adds up over all rows."""
    from mindmerger.model.loss import token_losses

    logits = []
    # The forward pass computes them for target tokens alone, row after row; a second one for each row would cost what
    # batching saves.
    handle = model.llm.register_forward_hook(lambda module, given, output: logits.append(output.logits[0]))
    try:
        model(**{"encoder_input_ids": None, "encoder_attention_mask": None} | inputs)
    finally:
        handle.remove()
    [logits_MV], mask_BT = logits, inputs["target_mask"].bool()
    losses_M = token_losses(logits_MV, inputs["target_ids"][mask_BT.to(logits_MV.device)])
    return [row.double().sum() for row in losses_M.split(mask_BT.sum(1).tolist())]
