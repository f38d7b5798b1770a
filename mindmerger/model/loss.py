"""The loss: logits at the positions that predict a target token, and their summed cross-entropy.

Dimension letters: B batch, L merged length, M target tokens of the whole batch, D LLM width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput


@dataclass
class MindMergerOutput(ModelOutput):
    """`loss`: mean next-token cross-entropy over target tokens; `loss_sum`: its sum; `target_tokens`: their number;
    `label_losses`: (B, C), of each label where there are several to choose from; `label_greedy`: (B, C), whether greedy
    decoding would give it."""

    loss: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    target_tokens: torch.Tensor | None = None
    label_losses: torch.Tensor | None = None
    label_greedy: torch.Tensor | None = None


@contextmanager
def head_on_positions(head: nn.Module, flat_M: torch.Tensor):
    """Context manager: the LLM's output head sees hidden states of the given flat positions only, as (1, M, D).

    Going through the head's own call leaves what a model does to its logits afterwards (Gemma 2's soft cap, Cohere's
    and Granite's scales) and ZeRO-3's gathering as they are, while the (B, L, V) logits never exist.
    """
    calls = []

    def select(_, inputs):
        calls.append(1)
        return (inputs[0].flatten(0, 1).index_select(0, flat_M).unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
    # A head that is called by parts would get wrong positions, and only the loss would show it.
    if len(calls) != 1:
        raise RuntimeError(f"the LLM's output head was called {len(calls)} times in one forward pass, expected once")


def next_token_loss(
    llm: nn.Module, predictor_M: torch.Tensor, labels_M: torch.Tensor, linear_loss: Callable | None = None, **inputs
) -> torch.Tensor:
    """Returns the summed cross-entropy of labels (M,) by the logits at flat positions (M,) of B*L, a scalar in fp32.

    Args:
        linear_loss: computes it from hidden states (M, D), the head's weight (V, D), the labels and the head's bias,
            so that the logits (M, V) are never whole; None computes them.
        inputs: of the LLM.
    """
    head = llm.get_output_embeddings()
    if linear_loss is None or len(labels_M) == 0:
        with head_on_positions(head, predictor_M):
            return ChunkedCrossEntropy.apply(llm(**inputs, use_cache=False).logits[0], labels_M)
    losses = []

    def loss_of(hidden_1MD):
        losses.append(linear_loss(hidden_1MD[0], head.weight, labels_M, head.bias).reshape(1, 1, 1))
        return losses[0]

    # Within the head's own call, where ZeRO 3 gathers its weight.
    own = vars(head).get("forward")
    head.forward = loss_of
    try:
        with head_on_positions(head, predictor_M):
            logits = llm(**inputs, use_cache=False).logits
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    # ZeRO 3 hands on the same memory as another tensor.
    if logits.data_ptr() != losses[0].data_ptr() or losses[0]._version:
        raise RuntimeError(f"{type(llm).__name__} changes its logits: its loss cannot be taken before they are made")
    return logits[0, 0, 0]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits (M, V) against labels (M,), in fp32 whatever the logits' dtype.

    Equals `F.cross_entropy(logits.float(), labels, reduction="sum")`, but fp32 copies exist for a few rows at a time:
    at 256,000 tokens of vocabulary the copies that autograd keeps would outgrow the rest of the step. The backward pass
    leaves the gradient in the place of the logits, so that it can be gone through once.
    """

    # On a CPU 2000 x 32,000 logits in bf16 take 0.56 s forward and backward, 0.92 s in one piece.
    CHUNK = 2**23  # elements, 32 MB in fp32: enough to keep a GPU busy

    @classmethod
    def chunks(cls, logits_MV: torch.Tensor, *others: torch.Tensor):
        """Returns slices of all the tensors, for as many rows as a chunk may have."""
        rows = max(1, cls.CHUNK // logits_MV.shape[1])
        return zip(*(tensor.split(rows) for tensor in (logits_MV, *others)), strict=True)

    @staticmethod
    def forward(ctx, logits_MV, labels_M):
        ctx.save_for_backward(logits_MV, labels_M)
        chunks = ChunkedCrossEntropy.chunks(logits_MV, labels_M)
        losses = [F.cross_entropy(logits.float(), labels, reduction="sum") for logits, labels in chunks]
        return torch.stack(losses).sum()  # without rows there is one empty chunk, of loss 0

    @staticmethod
    def backward(ctx, grad):
        logits_MV, labels_M = ctx.saved_tensors
        for logits, labels in ChunkedCrossEntropy.chunks(logits_MV, labels_M):
            # Computed again: kept from the forward pass, (M, V) in fp32 would wait for this.
            probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
            probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
            # Into the logits, which nobody needs any more: the largest tensor of a pass exists once.
            logits.copy_(probabilities.mul_(grad))
        return logits_MV, None


def token_losses(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of each token, (M,) in fp32, without a gradient."""
    # In chunks: fp32 copies of all logits would outgrow the forward pass where the vocabulary is large.
    chunks = ChunkedCrossEntropy.chunks(logits_MV.detach(), labels_M)
    return torch.cat([F.cross_entropy(part.float(), labels, reduction="none") for part, labels in chunks])
