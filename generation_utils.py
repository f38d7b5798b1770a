"""What makes transformers' `generate` cheaper without changing an answer: a cache that is not copied at every token.

Dimension letters: B batch, H key-value heads, L positions so far, C positions there is room for, D head width.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # positions added when a buffer is full: its one copy is then a 64th of what copying at every token costs


class GrowingLayer(DynamicLayer):
    """A layer of the key-value cache that writes new positions into room kept behind the old ones.

    transformers' own layer concatenates, which reads and writes all keys and values at every token: with a large batch
    that was the most expensive part of a decoding step. Attention gets the filled part of the buffer, (B, H, L, D), a
    view; the numbers are the same.
    """

    def __init__(self):
        super().__init__()
        self._buffers: dict[str, torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends states (B, H, new, D); returns all keys and all values, (B, H, L, D) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length = old.shape[-2] if old.numel() else 0
        total = length + new.shape[-2]
        buffer = self._buffers.get(name)
        # What else changes a cache (cropping aside) leaves a tensor of its own, which is then not our buffer's start.
        if buffer is None or old.data_ptr() != buffer.data_ptr() or total > buffer.shape[-2]:
            buffer = new.new_empty(*new.shape[:2], total + ROOM, new.shape[-1])
            if length:
                buffer[:, :, :length] = old
            self._buffers[name] = buffer
        buffer[:, :, length:total] = new
        return buffer[:, :, :total]


def growing_cache(llm: nn.Module) -> dict[str, DynamicCache]:
    """The cache that `generate` would make for this LLM, its plain layers growing in place, as an argument for it.

    Sliding-window and recurrent layers stay transformers' own. Empty for an LLM that keeps its past in another way.
    """
    if "past_key_values" not in inspect.signature(llm.forward).parameters or not llm._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=llm.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}


@contextmanager
def contiguous_input(layer: nn.Module):
    """Within it, a linear layer gets its input in one piece.

    The last position of each row, cut out of (B, L, D), is not. torch then multiplies a *frozen* weight row by row, for
    which it lays out a copy of the weight per row: 2.3 GB for 48 rows and a 32,000 x 768 output head in bf16.
    """
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
