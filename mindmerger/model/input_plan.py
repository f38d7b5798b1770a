"""What the masks of a batch decide before the model sees it: rows of the encoder, rows of the LLM.

Dimension letters: B batch, S encoder tokens, T target tokens, M target tokens of the whole batch, N all segments of a
row side by side.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import masking_utils

from mindmerger.bridges import Bridge
from mindmerger.model.packing import Pack, Packing, plan_pack, plan_packing, to_device


@dataclass
class InputPlan:
    """How the segments of a batch become rows of the encoder and of the LLM: all that follows from their masks.

    It is made on the CPU, where the masks are, and then moved: a number that is read on a GPU waits for it.

    encoder: of the encoder's rows, None without one; padded: whether any of these has padding.
    rows: of the LLM's; token_M: flat index into B*T of the target's tokens, None without a target.
    width: N, all segments of a row side by side, padding included.
    pack: what keeps the LLM's rows apart where they are one, None where each is a row of its own.
    """

    encoder: Packing | None
    padded: bool
    rows: Packing
    token_M: torch.Tensor | None
    width: int
    pack: Pack | None = None

    @property
    def llm_arguments(self) -> dict:
        """What the LLM's forward takes besides embeddings: nothing where each row is one of its own."""
        return self.pack.arguments if self.pack is not None else {}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "InputPlan":
        """Returns the same plan with each tensor changed."""
        encoder = self.encoder.map(change) if self.encoder is not None else None
        token_M = change(self.token_M) if self.token_M is not None else None
        pack = self.pack.map(change) if self.pack is not None else None
        return replace(self, encoder=encoder, rows=self.rows.map(change), token_M=token_M, pack=pack)

    def to(self, device) -> "InputPlan":
        """Moves the plan to a device."""
        return self.map(lambda tensor: to_device(tensor, device))

    def pin(self) -> "InputPlan":
        """Copies the plan into pinned memory, from which a GPU reads while the CPU goes ahead."""
        return self.map(torch.Tensor.pin_memory)


def plan_encoder(mask_BS: torch.Tensor) -> tuple[Packing, bool]:
    """Plans the encoder's rows; returns with the plan whether any of them has padding."""
    # Encoders with absolute positions give other states under left padding.
    packing = plan_packing([mask_BS], "right")
    return packing, not bool(packing.mask_BL.all())


def plan_input(
    bridge: Bridge | None,
    has_bos: bool,
    encoder_mask_BS: torch.Tensor | None = None,
    prompt_mask_BP: torch.Tensor | None = None,
    target_mask_BT: torch.Tensor | None = None,
    packed: bool = False,
) -> InputPlan:
    """Plans the rows `<bos> prefix [prompt] [target]`, right-padded for training, left-padded without a target.

    Needs no state of the encoder and no weight, so that another thread can do it while the model is at work.

    Args:
        bridge: which says where its prefix has real positions; None for the LLM alone.
        has_bos: whether the LLM has a BOS token.
        encoder_mask_BS, prompt_mask_BP, target_mask_BT: padded on any side.
        packed: whether the rows, which then have a target, stand end to end in one without padding.
    """
    first = encoder_mask_BS if encoder_mask_BS is not None else prompt_mask_BP
    masks, encoder, padded = [], None, False
    if has_bos:
        masks.append(torch.ones(first.shape[0], 1, dtype=torch.long, device=first.device))
    if encoder_mask_BS is not None:
        encoder, padded = plan_encoder(encoder_mask_BS)
        masks.append(bridge.prefix_mask(encoder.mask_BL))
    if prompt_mask_BP is not None:
        masks.append(prompt_mask_BP)
    width = sum(mask.shape[1] for mask in masks)
    if target_mask_BT is None:
        return InputPlan(encoder, padded, plan_packing(masks, "left"), None, width)
    target, pack = len(masks), None
    masks.append(target_mask_BT)
    if packed:
        rows, pack = plan_pack(masks, target)
    else:
        rows = plan_packing(masks, "right", target)
    token_M = torch.nonzero(target_mask_BT.flatten()).squeeze(1)
    return InputPlan(encoder, padded, rows, token_M, width + target_mask_BT.shape[1], pack)


@contextmanager
def masks_known(pack: Pack | None = None):
    """Context manager: transformers takes it as known what it would read off a mask or position ids, which on a GPU
    waits: that a mask which is given has padding, and that positions count up by one, or else which rows are packed.

    Whoever enters it gives no mask where there is no padding.
    """
    sequence_1L = pack.sequence_1L if pack is not None else None
    names = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa", "find_packed_sequence_indices")
    looks = [getattr(masking_utils, name) for name in names]

    def unless_padded(look):
        return lambda padding_mask, *args, **kwargs: padding_mask is None and look(None, *args, **kwargs)

    known = [*map(unless_padded, looks[:2]), lambda position_ids: sequence_1L]
    for name, answer in zip(names, known, strict=True):
        setattr(masking_utils, name, answer)
    try:
        yield
    finally:
        for name, look in zip(names, looks, strict=True):
            setattr(masking_utils, name, look)
