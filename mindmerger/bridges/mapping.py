"""MindMerger's own bridge (Huang et al., NeurIPS 2024, section 3.1): two linear layers and a learned boundary.

Dimension letters: B batch, S encoder tokens, E encoder width, D LLM width.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Mapping(nn.Module):
    """Encoder states to vectors in the LLM's input-embedding space, plus the learned end boundary (paper, section 3.1).

    Parameter names and shapes are those of the released checkpoints: `mlp.linear1` (2E, E), `mlp.linear2` (D, 2E),
    both with bias, and `end_boundary` (1, 1, D), which starts at zero.
    """

    def __init__(self, encoder_width: int, llm_width: int):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.linear1 = nn.Linear(encoder_width, 2 * encoder_width)
        self.mlp.linear2 = nn.Linear(2 * encoder_width, llm_width)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_width))

    def forward(self, states_BSE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mapped states (B, S, D) and the boundary (1, 1, D), in the mapping's own dtype.

        The boundary is returned, not read from outside, because ZeRO-3 gathers a parameter only inside its module's
        forward.
        """
        hidden = F.relu(self.mlp.linear1(states_BSE.to(self.mlp.linear1.weight.dtype)))
        return self.mlp.linear2(hidden), self.end_boundary
