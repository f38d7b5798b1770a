"""XBridge, encoder side (ACL 2026, arXiv 2603.17512; code ictnlp/XBridge): a wide two-layer block over normed states.

The LLM reads `<bos>` · W2 silu(W1 rmsnorm(h) + b1) + b2 · end · [prompt] · target, E → 4E → D. The decoder side, which
turns the LLM's states into text of other languages, is not part of this project; its released weights are passed over.

Dimension letters: B batch, S encoder tokens, E encoder width, D LLM width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mindmerger.bridges.base import Bridge, BridgeOutput, Stage, with_end


class XBridge(Bridge):
    """RMSNorm, two linear layers with SiLU between them, and a learned end that starts at zero."""

    paper = "XBridge, ACL 2026, arXiv 2603.17512 (its encoder side)."
    stages = {
        "translation": Stage(data="pairs", with_prompt=False),
        "task": Stage(data="task", with_prompt=True, starts_from="translation"),
    }
    released = {"": "mapping_enc2llm.layers.0.", "end_boundary": "mapping_enc2llm.end_boundary"}
    released_others = ("mapping_llm2dec.", "model_mt.", "model_llm.")

    def __init__(self, *towers: int, **options):
        super().__init__(*towers, **options)
        encoder_width, llm_width = self.towers[:2]
        # eps is the released code's: torch's default depends on the dtype.
        self.input_layernorm = nn.RMSNorm(encoder_width, eps=1e-6)
        self.linear1 = nn.Linear(encoder_width, 4 * encoder_width)
        self.linear2 = nn.Linear(4 * encoder_width, llm_width)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_width))

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns the mapped states and the end behind them, (B, S + 1, D)."""
        normed = self.input_layernorm(states_BSE[0].to(self.end_boundary.dtype))
        return with_end(self.linear2(F.silu(self.linear1(normed))), mask_BS, self.end_boundary)

    def prefix_length(self, encoder_tokens):
        """Returns one position for each encoder token and one for the end."""
        return encoder_tokens + 1
