"""Packing: segments padded on any side become rows whose real tokens are contiguous, or one row of all of them.

Dimension letters: B batch, L merged length (of the one row, the sum of all), N all segments of a row side by side,
M target tokens of the whole batch, D LLM width.
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


@dataclass
class Pack:
    """What keeps rows apart that stand end to end in one: every tensor lives on the masks' device.

    position_1L: of each position in its own row, from 0; sequence_1L: which row it belongs to, None where there is one
    alone; start_B1: (B + 1,) int32, where each row starts, and the last one ends; longest: positions of the longest.
    """

    position_1L: torch.Tensor
    sequence_1L: torch.Tensor | None
    start_B1: torch.Tensor
    longest: int  # a number of the CPU: read off a GPU, it would be waited for in every layer

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Pack":
        """Returns the same pack with each tensor changed."""
        sequence_1L = change(self.sequence_1L) if self.sequence_1L is not None else None
        return Pack(change(self.position_1L), sequence_1L, change(self.start_B1), self.longest)

    @property
    def arguments(self) -> dict:
        """Arguments of the LLM's forward; flash attention reads the lengths, the others the positions alone."""
        lengths = {f"cu_seq_lens_{side}": self.start_B1 for side in "qk"}
        return {"position_ids": self.position_1L, **lengths} | {f"max_length_{side}": self.longest for side in "qk"}


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
        is_target_BN = _segment(masks, target_segment)
        # A target token at position p is predicted at p - 1; there always is one before it (the boundary at least).
        predictor_M = torch.nonzero(is_target_BN.gather(1, source_BL).flatten()).squeeze(1) - 1
    return Packing(source_BL, mask_BL.long(), predictor_M)


def _segment(masks: list[torch.Tensor], number: int) -> torch.Tensor:
    """Returns where the real positions of one segment are, (B, N)."""
    kept = [mask.bool() if i == number else torch.zeros_like(mask, dtype=torch.bool) for i, mask in enumerate(masks)]
    return torch.cat(kept, dim=1)


def plan_pack(masks: list[torch.Tensor], target_segment: int) -> tuple[Packing, Pack]:
    """Plans how segments, each padded on any side, become one row (1, L) of all real positions, row after row.

    Args: as for `plan_packing`.

    Returns:
        the plan, whose `source_BL` (1, L) indexes the B*N unpacked positions, and what keeps the rows apart.
    """
    mask_BN = torch.cat([mask.bool() for mask in masks], dim=1)
    source_L = torch.nonzero(mask_BN.flatten()).squeeze(1)
    length_B = mask_BN.sum(1)
    start_B1 = torch.nn.functional.pad(length_B.cumsum(0), (1, 0))
    row_L = torch.arange(len(length_B), device=mask_BN.device).repeat_interleave(length_B)
    position_L = torch.arange(len(source_L), device=mask_BN.device) - start_B1[row_L]
    predictor_M = torch.nonzero(_segment(masks, target_segment).flatten()[source_L]).squeeze(1) - 1
    # One row alone needs no mask: the kernels for plain causal attention apply.
    sequence_1L = row_L[None] if len(length_B) > 1 else None
    pack = Pack(position_L[None], sequence_1L, start_B1.int(), int(length_B.max()))
    return Packing(source_L[None], torch.ones_like(source_L)[None], predictor_M), pack


def take_rows(values_BND: torch.Tensor, source_BL: torch.Tensor) -> torch.Tensor:
    """Gathers (B, L, D) from (B, N, D) along the second dimension, or (1, L, D) of all rows by `plan_pack`'s index."""
    if len(source_BL) != len(values_BND):
        values_BND = values_BND.flatten(0, 1).unsqueeze(0)
    rows, wide = values_BND.shape[:2]
    start_B1 = torch.arange(rows, device=source_BL.device).unsqueeze(1) * wide
    # Flat rows: `gather` would need an index as wide as the values.
    flat = to_device((source_BL + start_B1).flatten(), values_BND.device)
    return values_BND.flatten(0, 1).index_select(0, flat).view(rows, source_BL.shape[1], *values_BND.shape[2:])
