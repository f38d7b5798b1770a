"""A bridge that shares nothing with MindMerger's but the seam: what a file in `mindmerger/bridges` could hold."""

import torch
from torch import nn

from mindmerger.bridges import BRIDGES, Bridge, BridgeOutput, Stage


class ToyBridge(Bridge):
    """Eight slots between two markers, however long the text: learned queries over first and last states."""

    encoder_layers = (0, -1)
    stages = {
        "read": Stage(data="pairs", with_prompt=False),
        "solve": Stage(data="task", with_prompt=True, starts_from="read"),
    }

    def __init__(self, *towers: int, **options):
        super().__init__(*towers, **options)
        encoder_width, llm_width = self.towers[:2]
        self.queries = nn.Parameter(torch.randn(8, encoder_width))
        self.out = nn.Linear(2 * encoder_width, llm_width)
        self.markers = nn.Parameter(torch.randn(2, llm_width))

    def forward(self, states_BSE, mask_BS):
        """Returns (B, 10, D)."""
        hidden = []
        for states in states_BSE:
            states = states.float()
            mask = mask_BS.to(states.device).bool()[:, None]
            weights = (self.queries @ states.transpose(1, 2)).masked_fill(~mask, float("-inf")).softmax(-1)
            hidden.append(weights @ states)
        slots_B8D = self.out(torch.cat(hidden, dim=-1))
        start_B1D, end_B1D = (marker.expand(len(slots_B8D), 1, -1) for marker in self.markers)
        return BridgeOutput(torch.cat([start_B1D, slots_B8D, end_B1D], 1), self.prefix_mask(mask_BS))

    def prefix_mask(self, mask_BS):
        """Returns ones, (B, 10)."""
        return mask_BS.new_ones(len(mask_BS), 10)

    def prefix_length(self, encoder_tokens):
        """Returns ten, for each number of encoder tokens."""
        return 0 * encoder_tokens + 10


BRIDGES["toy"] = ToyBridge
