"""MindMerger's own bridge (Huang et al., NeurIPS 2024, section 3.1): two linear layers and a learned boundary.

Dimension letters: B batch, S encoder tokens, E encoder width, D LLM width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mindmerger.bridges.base import Bridge, BridgeOutput, Option, Stage
from mindmerger.runtime.errors import UserError

LAST = "last"


class Mapping(Bridge):
    """Encoder states to vectors in the LLM's input-embedding space, plus the learned end boundary (paper, section 3.1).

    Parameter names and shapes are those of the released checkpoints: `mlp.linear1` (2E, E), `mlp.linear2` (D, 2E),
    both with bias, and `end_boundary` (1, 1, D), which starts at zero.

    `encoder_layer=i` reads hidden layer i of the encoder in the place of its final output *(ours)*.
    """

    paper = """Huang et al., "MindMerger: Efficiently Boosting LLM Reasoning in non-English Languages", NeurIPS 2024,
arXiv 2405.17386."""
    choices = {"encoder_layer": Option(LAST)}
    stages = {
        "mapping": Stage(data="pairs", with_prompt=False),
        "augmentation": Stage(data="task", with_prompt=True, starts_from="mapping"),
    }
    # Of MERLIN's curriculum, between the two.
    further_stages = {"question": Stage(data="question_pairs", with_prompt=False, starts_from="mapping")}

    def __init__(self, *towers: int, **options):
        super().__init__(*towers, **options)
        encoder_width, llm_width, depth = self.towers[:3]
        if "encoder_layer" in self.options:
            layer = int(self.options["encoder_layer"])
            if layer > depth > 0:
                raise UserError(f"--bridge_option encoder_layer={layer}: the encoder has {depth} layers")
            self.encoder_layers = (layer,)
        # An empty module for the sake of its name: released files have their keys below `mlp`.
        self.mlp = nn.Module()
        self.mlp.linear1 = nn.Linear(encoder_width, 2 * encoder_width)
        self.mlp.linear2 = nn.Linear(2 * encoder_width, llm_width)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_width))

    @classmethod
    def settle(cls, given):
        """Returns no option for the default, as folders and checkpoints have it from before there was one."""
        return {
            name: value for name, value in super().settle(given).items() if (name, value) != ("encoder_layer", LAST)
        }

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns the mapped states and the boundary behind them, (B, S + 1, D)."""
        hidden = F.relu(self.mlp.linear1(states_BSE[0].to(self.mlp.linear1.weight.dtype)))
        mapped_BSD, boundary_11D = self.mlp.linear2(hidden), self.end_boundary
        if self.llm_dtype is not None:
            # Before the boundary is repeated: its gradient is then summed over the rows in the LLM's dtype, as in the
            # released code.
            mapped_BSD, boundary_11D = mapped_BSD.to(self.llm_dtype), boundary_11D.to(self.llm_dtype)
        prefix_BKD = torch.cat([mapped_BSD, boundary_11D.expand(mask_BS.shape[0], 1, -1)], dim=1)
        return BridgeOutput(prefix_BKD, self.prefix_mask(mask_BS))

    def prefix_length(self, encoder_tokens):
        """Returns one position for each encoder token and one for the boundary."""
        return encoder_tokens + 1
