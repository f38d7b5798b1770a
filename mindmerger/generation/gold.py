"""Gold answers: how likely the LLM finds them. A loss moves where greedy answers only say right or wrong."""

from mindmerger.generation.answers import batch_inputs, explain_batch_out_of_memory


def score_gold(model, settings, batch: list[int]) -> list[dict]:
    """Returns the loss of each gold answer of a batch, as the records of its examples hold it.

    Args:
        batch: numbers of examples.

    Returns:
        gold_loss: summed over the tokens, in nats; gold_tokens: their number, the end token included.

    Raises:
        UserError: out of memory, or for losses that are not numbers.
    """
    import torch

    inputs = batch_inputs(model, settings.tokenizers, settings.columns, batch, with_target=True)
    with explain_batch_out_of_memory(inputs, settings.max_new_tokens), torch.no_grad():
        losses = row_losses(model, inputs)
    if not all(loss.isfinite() for loss in losses):
        raise model.not_finite_error()
    tokens = [len(settings.columns["target_ids"][i]) for i in batch]
    return [{"gold_loss": loss.item(), "gold_tokens": n} for loss, n in zip(losses, tokens, strict=True)]


def row_losses(model, inputs: dict) -> list:
    """Returns the summed loss of each row, which `MindMerger.forward` adds up over all rows."""
    import torch
    from torch.nn.functional import cross_entropy

    from mindmerger.model.loss import ChunkedCrossEntropy

    logits = []
    # The forward pass computes them for target tokens alone, row after row; a second one for each row would cost what
    # batching saves.
    handle = model.llm.register_forward_hook(lambda module, given, output: logits.append(output.logits[0]))
    try:
        model(**{"encoder_input_ids": None, "encoder_attention_mask": None} | inputs)
    finally:
        handle.remove()
    [logits_MV], mask_BT = logits, inputs["target_mask"].bool()
    labels_M = inputs["target_ids"][mask_BT.to(logits_MV.device)]
    # In chunks: fp32 copies of all logits would outgrow the forward pass where the vocabulary is large.
    chunks = ChunkedCrossEntropy.chunks(logits_MV, labels_M)
    losses_M = torch.cat([cross_entropy(part.float(), labels, reduction="none") for part, labels in chunks])
    return [row.double().sum() for row in losses_M.split(mask_BT.sum(1).tolist())]
