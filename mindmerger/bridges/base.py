"""The contract of a bridge: the one trained part between two frozen towers, and the stages in which it is trained.

Dimension letters: B batch, S encoder tokens, K prefix length, E encoder width, D LLM width.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import nn


class BridgeOutput(NamedTuple):
    """Input of the LLM that comes from the encoder.

    prefix_BKD: soft tokens, markers included, in the bridge's own dtype. prefix_mask_BK: 1 on real ones, on the device
    of the mask that the bridge was given. memory: keys and values for the attention of each LLM layer; None leaves the
    LLM's attention untouched, and anything else is refused so far.
    """

    prefix_BKD: torch.Tensor
    prefix_mask_BK: torch.Tensor
    memory: list[tuple[torch.Tensor, torch.Tensor]] | None = None


class Stage(NamedTuple):
    """One stage of training.

    data: "pairs" (sentences, X → English) or "task" (the task's queries). with_prompt: whether the LLM reads the prompt
    after the prefix. encoder_text: what the encoder reads. trains: the parts that get gradients. starts_from: the stage
    whose best result this one continues. Other values of `encoder_text` and `trains` than these are refused so far.
    """

    data: str
    with_prompt: bool
    encoder_text: str = "source"
    trains: tuple[str, ...] = ("bridge",)
    starts_from: str | None = None


class Bridge(nn.Module):
    """The part that is trained between two frozen towers. One subclass per method, one file per subclass.

    A subclass is built from the two widths, sets `stages`, and implements `forward` and `prefix_length`. Its parameters
    are what a mapping file and a checkpoint hold.
    """

    # hidden_states of the encoder that it reads: 0 = embeddings, -1 = the final output.
    encoder_layers: ClassVar[tuple[int, ...]] = (-1,)
    # By --stage_name, in the order in which they are trained.
    stages: ClassVar[dict[str, Stage]] = {}
    # The dtype of the LLM's embeddings, set before each call. The prefix is cast to it afterwards in any case.
    llm_dtype: torch.dtype | None = None

    def __init__(self, encoder_width: int, llm_width: int):
        super().__init__()
        self.encoder_width, self.llm_width = encoder_width, llm_width

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns the prefix for right-padded encoder states, one tensor (B, S, E) for each of `encoder_layers`."""
        raise NotImplementedError

    def prefix_length(self, encoder_tokens):
        """Returns K, the real positions of the prefix for a number (or an array of numbers) of encoder tokens S.

        Token budgets and position checks ask here, before any weight is loaded.
        """
        raise NotImplementedError
