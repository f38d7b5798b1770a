"""LayAlign (Ruan et al., NAACL 2025 Findings, arXiv 2502.11405): MindMerger's prefix, and a memory for every LLM layer
that is mixed from all layers of the encoder.

Dimension letters: B batch, S encoder tokens, E encoder width, D LLM width, n encoder layers, N LLM layers, M = 2N.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mindmerger.bridges.base import BridgeOutput, LayerMemory, Option, Stage
from mindmerger.bridges.mapping import Mapping


class LayAlign(Mapping):
    """MindMerger's mapping beside an aligner, which gives every LLM layer keys and values of its own, and a gate per
    layer, which is zero at the start: the LLM then reads the prefix alone.

    The aligner mixes the n layers below the encoder's last (its embeddings included) into 2N, one weight for each pair
    of layers, and maps them to the LLM's width; keys and values of layer i come from the mixtures 2i and 2i + 1.
    """

    paper = """Ruan et al., "LayAlign: Enhancing Multilingual Reasoning in Large Language Models via Layer-Wise Adaptive
Fusion and Alignment Strategy", Findings of NAACL 2025, arXiv 2502.11405."""
    choices = {"structure": Option("linear", ("linear", "mlp"))}
    stages = {
        "translation": Stage(data="pairs", with_prompt=False),
        "task": Stage(data="task", with_prompt=True, starts_from="translation"),
    }
    uses_memory = True
    released = {"": "mapping.", "aligner.": "encoder_aligner.projector."}
    released_others = ("encoder_mt.", "model_llm.", "llm_embedding_layer.")

    def __init__(self, *towers: int, **options):
        super().__init__(*towers, **options)
        encoder_width, llm_width, encoder_depth, llm_depth, _ = self.towers
        # The final output feeds the prefix alone: the memory is mixed from the layers below it, embeddings included.
        self.encoder_layers = (-1, *range(encoder_depth))
        self.aligner = nn.Module()
        self.aligner.fc1 = nn.Linear(encoder_depth, 2 * llm_depth)
        self.aligner.fc2 = nn.Linear(encoder_width, llm_width)
        if self.options["structure"] == "mlp":
            self.aligner.fc3 = nn.Linear(llm_width, llm_width)
        # Of the bridge itself, not of a list in it: ZeRO-3 gathers a module's own parameters before its forward pass.
        for i in range(llm_depth):
            self.register_parameter(f"gate_{i}", nn.Parameter(torch.zeros(1)))

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns MindMerger's prefix and a memory for each LLM layer."""
        prefix = super().forward(states_BSE[:1], mask_BS)
        dtype = self.aligner.fc1.weight.dtype
        mixed_BSEM = F.relu(self.aligner.fc1(torch.stack([states.to(dtype) for states in states_BSE[1:]], dim=-1)))
        # One projection shared by all 2N mixtures: 537 million multiplications a token for mT5-xl and a 7B model, 8 %
        # of what the LLM takes for a position.
        sources_MBSD = self.aligner.fc2(mixed_BSEM.permute(3, 0, 1, 2))
        if self.options["structure"] == "mlp":
            sources_MBSD = self.aligner.fc3(F.relu(sources_MBSD))
        # At once: 2N sources in fp32 would take twice the memory of bf16.
        if self.llm_dtype is not None:
            sources_MBSD = sources_MBSD.to(self.llm_dtype)
        # Cloned: after the forward pass ZeRO-3 takes a parameter's values away.
        gates = [getattr(self, f"gate_{i}").clone() for i in range(self.towers.llm_depth)]
        memory = map(LayerMemory, sources_MBSD[0::2], sources_MBSD[1::2], gates)
        return prefix._replace(memory=list(memory))

    def released_names(self) -> dict[str, str]:
        """Returns the released key of each parameter; gates lie in the LLM's attention there."""
        # Their keys stand in the LLM's own names, since the released code builds them into its attention classes.
        gates = {
            f"gate_{i}": f"model_llm.model.model.layers.{i}.self_attn.adaption_gate"
            for i in range(self.towers.llm_depth)
        }
        return {gates.get(name, key): name for key, name in super().released_names().items()}
