"""Packing: segments padded on any side become rows whose real tokens are contiguous.

Dimension letters: B batch, L merged length, N all segments of a row side by side, M target tokens of the whole batch,
D LLM width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Packing:
    """Where each position of the merged rows comes from: every tensor lives on the masks' device.

    source_BL: index into the N unpacked positions of the row; mask_BL: 1 on real positions;
    predictor_M: flat index into B*L of the position that predicts each target token, row by row.
    """

    source_BL: torch.Tensor
    mask_BL: torch.Tensor
    predictor_M: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Packing":
        """Returns the same plan with each tensor changed."""
        return Packing(change(self.source_BL), change(self.mask_BL), change(self.predictor_M))


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Moves a tensor without waiting for the device, which only a copy out of pinned memory allows."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def plan_packing(masks: list[torch.Tensor], padding_side: str, target_segment: int | None = None) -> Packing:
    """Plans how segments, each padded on any side, become rows with contiguous real tokens.

    Args:
        masks: one (B, n_i) mask of 0/1 for each segment, in merged order, all on one device, which may be the
            CPU while the model is elsewhere.
        padding_side: "right" for training, "left" for generation.
        target_segment: the segment whose tokens are predicted.
    """
    mask_BN = torch.cat([mask.bool() for mask in masks], dim=1)
    # Reading a number waits for the device where the masks are on one.
    length = int(mask_BN.sum(1).max())
    right = padding_side == "right"
    # A stable sort by "is padding" keeps the order of the real tokens.
    order_BN = torch.argsort(mask_BN.to(torch.uint8), dim=1, descending=right, stable=True)
    source_BL = order_BN[:, :length] if right else order_BN[:, order_BN.shape[1] - length :]
    mask_BL = mask_BN.gather(1, source_BL)
    predictor_M = torch.empty(0, dtype=torch.long, device=mask_BN.device)
    if target_segment is not None:
        is_target_BN = torch.cat(
            [
                mask.bool() if i == target_segment else torch.zeros_like(mask, dtype=torch.bool)
                for i, mask in enumerate(masks)
            ],
            dim=1,
        )
        # A target token at position p is predicted at p - 1; there always is one before it (the boundary at least).
        predictor_M = torch.nonzero(is_target_BN.gather(1, source_BL).flatten()).squeeze(1) - 1
    return Packing(source_BL, mask_BL.long(), predictor_M)


def take_rows(values_BND: torch.Tensor, source_BL: torch.Tensor) -> torch.Tensor:
    """Gathers (B, L, D) from (B, N, D) along the second dimension."""
    rows, wide = values_BND.shape[:2]
    start_B1 = torch.arange(rows, device=source_BL.device).unsqueeze(1) * wide
    # Flat rows: `gather` would need an index as wide as the values.
    flat = to_device((source_BL + start_B1).flatten(), values_BND.device)
    return values_BND.flatten(0, 1).index_select(0, flat).view(rows, source_BL.shape[1], *values_BND.shape[2:])
