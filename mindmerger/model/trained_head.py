"""An LLM's output head that is trained with the bridge, as LangBridge's released code does."""

import contextlib

import torch
from torch import nn

from mindmerger.hub.model_files import ModelError


class HeadElsewhere(nn.Module):
    """The place of an LLM's output head that is a part of the bridge.

    The bridge alone owns the parameter, so that optimizer, checkpoints and ZeRO 3 meet it once, by one name. It is fp32
    whatever the LLM's dtype: steps of a small learning rate would vanish in bf16.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self._held = (head,)  # in a tuple: not a submodule

    @property
    def weight(self) -> nn.Parameter:
        """As the models of transformers have it."""
        return self._held[0].weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits in the head's dtype."""
        (head,) = self._held
        return head(hidden.to(head.weight.dtype))


def refuse_tied_head(llm_path: str, tied: bool) -> None:
    """Refuses to train an output head that is the LLM's input embedding too, which has to stay as it is.

    Raises:
        ModelError: when it is.
    """
    if tied:
        raise ModelError(
            f"LLM {llm_path} ties its output head to its input embeddings, which stay frozen (the released code trains "
            "no such head either): leave --bridge_option train_lm_head=true out"
        )


def hand_over_head(llm: nn.Module, head: nn.Linear, llm_path: str) -> None:
    """Fills a bridge's output head with the LLM's and has the LLM use it.

    Raises:
        ModelError: for a head that is tied to the input embeddings, or has more than a weight.
    """
    own = llm.get_output_embeddings()
    refuse_tied_head(llm_path, own.weight is llm.get_input_embeddings().weight)
    if type(own) is not nn.Linear or own.bias is not None:
        raise ModelError(
            f"the output head of LLM {llm_path} is {own}, not a linear layer without bias: leave --bridge_option "
            "train_lm_head=true out"
        )
    with _whole(own.weight), torch.no_grad():
        head.weight.copy_(own.weight)
    # The LLM's own weight is let go. The fp32 one costs 2.1 GB with gradient and moments (32,000 tokens, width 4096).
    llm.set_output_embeddings(HeadElsewhere(head))


def _whole(parameter: nn.Parameter):
    """Context manager: a parameter has its values, also where ZeRO 3 has sharded it."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    # Without a modifier's rank: it is only read.
    return deepspeed.zero.GatheredParameters([parameter])
