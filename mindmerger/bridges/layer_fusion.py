"""Layer fusion (arXiv 2508.09091; code ThemiraChathumina/MultiLingualImprove): a learned mix of all encoder layers.

The LLM reads `<bos>` · W x + b · end · prompt · target with x = Σ w_l h_l over the layers 1 … n. `mix=global` has one
weight for each layer, w = softmax((100 + 1e5 t) u). `mix=token` has weights for each token: a class vector and the n
layers of that token, each with a learned position, pass one post-norm transformer layer of one head and width
`feed_forward`, and w = softmax(head(class output)). That layer runs without the released code's dropout of 0.1, which
would make results depend on the split into micro-batches; this is this project's choice.

Dimension letters: B batch, S encoder tokens, n encoder layers, E encoder width, D LLM width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mindmerger.bridges.base import Bridge, BridgeOutput, Option, Stage, with_end

TOKEN = "encoder_mt.layer_weights."
LAYER = f"{TOKEN}transformerEncoder.layers.0."


class LayerFusion(Bridge):
    """A mixer over the encoder's layers, one linear layer, and a learned end that starts at zero."""

    paper = "Layer fusion, arXiv 2508.09091."
    choices = {"mix": Option("global", ("global", "token")), "feed_forward": Option("2048")}
    stages = {"task": Stage(data="english_task", with_prompt=True)}
    released = {
        "": "mapping.",
        "mix.weights": "encoder_mt.layer_weights_lb",
        "mix.temperature": "encoder_mt.temp",
        "mix.": LAYER,
        "mix.inputs.weight": f"{LAYER}self_attn.in_proj_weight",
        "mix.inputs.bias": f"{LAYER}self_attn.in_proj_bias",
        "mix.outputs.": f"{LAYER}self_attn.out_proj.",
        "mix.positions": f"{TOKEN}layer_pos_emb",
        "mix.cls": f"{TOKEN}cls",
        "mix.head.": f"{TOKEN}layer_weights.",
    }
    released_others = ("encoder_mt.embedding_model_base.", "model_llm.", "llm_embedding_layer.")

    def __init__(self, *towers: int, **options):
        super().__init__(*towers, **options)
        encoder_width, llm_width, depth = self.towers[:3]
        # Without the embeddings, as published; -1 is layer n behind the encoder's final norm.
        self.encoder_layers = (*range(1, depth), -1)
        if self.options["mix"] == "global":
            self.mix = GlobalMix(depth)
        else:
            self.mix = TokenMix(depth, encoder_width, int(self.options["feed_forward"]))
        self.mlp = nn.Module()
        self.mlp.fc = nn.Linear(encoder_width, llm_width)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_width))

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns the mapped mix of the layers and the end behind it, (B, S + 1, D)."""
        mixed_BSE = self.mix(torch.stack(states_BSE, dim=2).to(self.end_boundary.dtype))
        return with_end(self.mlp.fc(mixed_BSE), mask_BS, self.end_boundary)

    def prefix_length(self, encoder_tokens):
        """Returns one position for each encoder token and one for the end."""
        return encoder_tokens + 1


class GlobalMix(nn.Module):
    """One weight for each layer, the same for all tokens."""

    def __init__(self, depth: int):
        super().__init__()
        # All equal, so that the mix starts as the plain mean of the layers.
        self.weights, self.temperature = nn.Parameter(torch.full((depth,), 3e-5)), nn.Parameter(torch.tensor(1e-5))

    def forward(self, layers_BSnE: torch.Tensor) -> torch.Tensor:
        """Returns (B, S, E)."""
        # Constants of the released code. In its recordings they make the mix's gradients 4 to 30 times the linear
        # layer's, which clipping to one norm then starves.
        weights_n = ((100 + 1e5 * self.temperature) * self.weights).softmax(0)
        return torch.einsum("bsne,n->bse", layers_BSnE, weights_n)


class TokenMix(nn.Module):
    """Weights for each token, from the vectors that it has in all layers."""

    def __init__(self, depth: int, width: int, feed_forward: int):
        super().__init__()
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(depth, width))
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, depth)
        nn.init.xavier_uniform_(self.inputs.weight)  # as torch's own attention starts, which the released code uses
        for bias in (self.inputs.bias, self.outputs.bias):
            nn.init.zeros_(bias)

    def forward(self, layers_BSnE: torch.Tensor) -> torch.Tensor:
        """Returns (B, S, E)."""
        cls_BS1E = self.cls.expand(*layers_BSnE.shape[:2], 1, -1)
        queries, keys, values = self.inputs(torch.cat([cls_BS1E, layers_BSnE + self.positions], dim=2)).chunk(3, dim=-1)
        # Only the class vector is used of the layer's output: the others ask nothing.
        scores_BS1n = queries[:, :, :1] @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        attended_BS1E = self.outputs(scores_BS1n.softmax(-1) @ values)
        hidden = self.norm1(cls_BS1E + attended_BS1E)
        hidden = self.norm2(hidden + self.linear2(F.relu(self.linear1(hidden))))
        return (self.head(hidden).softmax(-1) @ layers_BSnE).squeeze(2)
