"""The frozen encoder's forward pass.

Dimension letters: B batch, S encoder tokens, E encoder width.
"""

from collections.abc import Iterable

import torch
from torch import nn

from mindmerger.hub.model_files import ModelError
from mindmerger.model.input_plan import masks_known
from mindmerger.model.packing import Packing, take_rows
from mindmerger.model.towers import _is_decoder_only


def run_encoder(
    encoder: nn.Module | None, layers: Iterable[int], ids_BS: torch.Tensor, packing: Packing, padded: bool
) -> list[torch.Tensor]:
    """Returns the states (B, S, E) of each of `layers`, -1 for the encoder's final output, without a gradient.

    Args:
        ids_BS: as they come, with padding on any side.
        packing: `plan_encoder`'s, on the ids' device; padded: what it says of padding.

    Raises:
        ModelError: where the model was built without its encoder.
    """
    if encoder is None:
        raise ModelError("this model was built without its encoder: give it encoder_states beside the ids")
    packed_BS = take_rows(ids_BS, packing.source_BL)
    pad = encoder.config.pad_token_id
    # M2M100 and RoBERTa count positions by what is not their pad id, whatever the mask says.
    if pad is not None:
        packed_BS = packed_BS.masked_fill(packing.mask_BL == 0, pad)
    extra = {}
    if _is_decoder_only(encoder.config):
        extra["use_cache"] = False  # keys and values that nobody reads
    if any(layer != -1 for layer in layers):
        extra["output_hidden_states"] = True  # n + 1 times the memory of the last states alone
    with torch.no_grad(), masks_known():
        output = encoder(input_ids=packed_BS, attention_mask=packing.mask_BL if padded else None, **extra)
    return [output.last_hidden_state if i == -1 else output.hidden_states[i] for i in layers]
