"""How likely each of several labels is behind one input, which is computed once for all of them.

A label has a few tokens, the input some hundred: passing the input anew with every label would cost as many times as
there are labels. Its keys and values are kept instead, and each label's tokens are passed behind them.

Dimension letters: B batch, C labels of a row, T tokens of a label, L merged length of the input, D LLM width,
V vocabulary, M tokens of one label in the whole batch.
"""

import copy
import inspect
from contextlib import AbstractContextManager

import torch
from torch import nn

from mindmerger.hub.model_files import ModelError
from mindmerger.model.decoding import growing_cache
from mindmerger.model.loss import head_on_positions, token_losses


def score_labels(
    llm: nn.Module,
    embeds_BLD: torch.Tensor,
    mask_BL: torch.Tensor,
    memory: AbstractContextManager,
    ids_BCT: torch.Tensor,
    mask_BCT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed loss of each label, in nats and fp64, and whether greedy decoding would give it, both (B, C);
    infinite and False where a row has no such label. Call it without gradient.

    Every label is passed on its own: the LLM is called 1 + C times (once where no label has a second token), whatever
    the rows hold, so that ranks that share its weights call it equally often.

    Args:
        embeds_BLD, mask_BL: the input, padded on the left.
        memory: context manager within which the LLM attends to the bridge's memory.
        ids_BCT, mask_BCT: tokens of the labels, padded on the right; a mask without a 1 for no label.

    Raises:
        ModelError: for an LLM whose past cannot be kept.
    """
    device, wide = embeds_BLD.device, ids_BCT.shape[2]
    known = growing_cache(llm)
    if not known and wide > 1:
        raise ModelError(
            f"{type(llm).__name__} keeps its past in a way of its own, so that labels cannot be scored behind one "
            "input: evaluate with --scoring generate, train with --dev_accuracy_rows 0"
        )
    reader, cache = _Reader(llm, mask_BL.to(device)), known.get("past_key_values")
    labels, greedy = [], []
    with memory:
        last_B = torch.arange(1, len(mask_BL) + 1) * mask_BL.shape[1] - 1
        logits_BV = reader(embeds_BLD, last_B, cache)
        for ids_BT, label_mask_BT in zip(ids_BCT.unbind(1), mask_BCT.unbind(1), strict=True):
            total_B = token_losses(logits_BV, ids_BT[:, 0]).double()
            missed_B = (logits_BV.argmax(1) != ids_BT[:, 0]).long()
            if wide > 1:
                row_M, at_M = torch.nonzero(label_mask_BT[:, 1:], as_tuple=True)
                embeds_BTD = llm.get_input_embeddings()(ids_BT[:, :-1])
                # A copy, since passing a label adds to it: not every kind of cache can be shortened again.
                logits_MV = reader(embeds_BTD, row_M * (wide - 1) + at_M, copy.deepcopy(cache))
                row_M = row_M.to(device)
                ids_M = ids_BT[row_M, at_M.to(device) + 1]
                total_B = total_B.index_add(0, row_M, token_losses(logits_MV, ids_M).double())
                missed_B = missed_B.index_add(0, row_M, (logits_MV.argmax(1) != ids_M).long())
            absent_B = label_mask_BT[:, 0].to(device) == 0
            labels.append(total_B.masked_fill(absent_B, torch.inf))
            greedy.append((missed_B == 0) & ~absent_B)
    return torch.stack(labels, dim=1), torch.stack(greedy, dim=1)


class _Reader:
    """An LLM that reads an input and then what may follow it, as `generate` would have it read them."""

    def __init__(self, llm: nn.Module, mask_BL: torch.Tensor):
        self.llm, self.mask_BL = llm, mask_BL
        # Not every LLM counts positions: some know them from the mask.
        self.counts = "position_ids" in inspect.signature(llm.forward).parameters

    def __call__(self, embeds_BTD: torch.Tensor, flat_M: torch.Tensor, cache) -> torch.Tensor:
        """Returns logits (M, V) at flat positions of B*T.

        Args:
            cache: of the input; an empty one where this is the input itself.
        """
        mask_BL, new = self.mask_BL, embeds_BTD.shape[1]
        if cache is not None and cache.get_seq_length() > 0:
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), new)], dim=1)
        more = {"position_ids": (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -new:]} if self.counts else {}
        with head_on_positions(self.llm.get_output_embeddings(), flat_M.to(embeds_BTD.device)):
            output = self.llm(
                inputs_embeds=embeds_BTD,
                attention_mask=mask_BL,
                past_key_values=cache,
                use_cache=cache is not None,
                **more,
            )
        return output.logits[0]
