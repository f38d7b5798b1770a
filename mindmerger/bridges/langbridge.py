"""LangBridge (Yoon et al., ACL 2024, arXiv 2401.10695; code kaistAI/LangBridge): the encoder reads the whole prompt.

The LLM reads `<bos>` · W h + b · end · target, no prompt of its own. Options: `mapper=ffn` puts W2 gelu(W1 h + b1) + b2
in the place of the linear layer, `mapper=latent` a Perceiver resampler of one layer with `latents` outputs.
`train_lm_head=true` trains the LLM's output head too, as the released code does in spite of "frozen"; default false is
this project's choice.

Dimension letters: B batch, S encoder tokens, Q latents, H heads, W width of a head, E encoder width, D LLM width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mindmerger.bridges.base import Bridge, BridgeOutput, Option, Stage, with_end

# The released code's, whatever the encoder's width.
HEADS, HEAD_WIDTH = 8, 64


class LangBridge(Bridge):
    """Every encoder state mapped on its own, or as many latents as wished from all of them, and a learned end."""

    paper = """Yoon et al., "LangBridge: Multilingual Reasoning Without Multilingual Supervision", ACL 2024,
arXiv 2401.10695."""
    choices = {
        "mapper": Option("linear", ("linear", "ffn", "latent")),
        "latents": Option("64"),
        "train_lm_head": Option("false", ("false", "true")),
    }
    stages = {"task": Stage(data="english_task", with_prompt=False, encoder_text="prompt")}
    released = {"": "lb.alignment.", "lm_head.": "lb.lm_head."}
    # The output head is there too: released files hold it, whether or not it is trained here.
    released_others = ("lb.enc.", "lb.lm.", "lb.embeddings.", "lb.lm_head.")

    def __init__(self, *towers: int, **options):
        super().__init__(*towers, **options)
        encoder_width, llm_width = self.towers[:2]
        # Standard normal as released, where the other bridges' ends start at zero.
        self.enc_eos = nn.Parameter(torch.randn(llm_width))
        if self.options["mapper"] == "linear":
            self.linear = nn.Linear(encoder_width, llm_width)
        elif self.options["mapper"] == "ffn":
            self.ffn = nn.Sequential(
                nn.Linear(encoder_width, 2 * encoder_width), nn.GELU(), nn.Linear(2 * encoder_width, llm_width)
            )
        else:
            self.latents = nn.Parameter(torch.randn(int(self.options["latents"]), encoder_width))
            # Nested as in the released code, so that its keys, `layers.0.0.*` and `layers.0.1.*`, are these.
            self.layers = nn.ModuleList([nn.ModuleList([LatentAttention(encoder_width), _feed_forward(encoder_width)])])
            self.out_proj = nn.Linear(encoder_width, llm_width, bias=False)
            self.norm = nn.LayerNorm(llm_width)
        if self.options["train_lm_head"] == "true":
            # 2.1 GB of fp32 weights, gradient and Adam's moments for 32,000 tokens and width 4096.
            self.lm_head = nn.Linear(llm_width, self.towers.vocabulary, bias=False)

    @classmethod
    def stages_with(cls, options):
        """Returns the one stage, which trains the output head where the options say so."""
        trains = ("bridge", "lm_head") if options.get("train_lm_head") == "true" else ("bridge",)
        return {name: stage._replace(trains=trains) for name, stage in cls.stages.items()}

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns the mapped states, or the latents, and the end behind them, (B, S + 1, D) or (B, Q + 1, D)."""
        states = states_BSE[0].to(self.enc_eos.dtype)
        if self.options["mapper"] != "latent":
            return with_end(
                (self.linear if self.options["mapper"] == "linear" else self.ffn)(states), mask_BS, self.enc_eos
            )
        latents_BQE = self.latents.expand(len(states), -1, -1)
        for attention, feed_forward in self.layers:
            latents_BQE = latents_BQE + attention(states, latents_BQE, mask_BS)
            latents_BQE = latents_BQE + feed_forward(latents_BQE)
        prefix, *_ = with_end(self.out_proj(latents_BQE), mask_BS, self.enc_eos)
        # Over the end as well, as the released resampler has it.
        return BridgeOutput(self.norm(prefix), self.prefix_mask(mask_BS))

    def prefix_mask(self, mask_BS: torch.Tensor) -> torch.Tensor:
        """Returns the mask of the encoder's tokens, or of the latents, none of which is padding, and of the end."""
        if self.options["mapper"] == "latent":
            return mask_BS.new_ones(mask_BS.shape[0], int(self.options["latents"]) + 1)
        return super().prefix_mask(mask_BS)

    def prefix_length(self, encoder_tokens):
        """Returns one position for each encoder token, or for each latent, and one for the end."""
        if self.options["mapper"] == "latent":
            return 0 * encoder_tokens + int(self.options["latents"]) + 1
        return encoder_tokens + 1


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class LatentAttention(nn.Module):
    """Latents that attend to the encoder's states and to themselves."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, HEADS * HEAD_WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)

    def forward(self, states_BSE, latents_BQE, mask_BS) -> torch.Tensor:
        """Returns (B, Q, E)."""
        latents_BQE = self.norm_latents(latents_BQE)
        both = torch.cat([self.norm_media(states_BSE), latents_BQE], dim=1)

        def heads(projected):
            return projected.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)

        # Latents see real tokens and each other, never padding, which depends on a row's company.
        seen_B11K = F.pad(mask_BS.to(both.device).bool(), (0, latents_BQE.shape[1]), value=True)[:, None, None]
        queries, keys, values = self.to_q(latents_BQE), self.to_k(both), self.to_v(both)
        out_BHQW = F.scaled_dot_product_attention(heads(queries), heads(keys), heads(values), attn_mask=seen_B11K)
        return self.to_out(out_BHQW.transpose(1, 2).flatten(2))
