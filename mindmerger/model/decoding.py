"""Cheaper and safer decoding with transformers' `generate`: a cache that is not copied at every token, no detours on a
CPU, and an end to logits that are not numbers.

Dimension letters: B batch, H key-value heads, G queries of one such head, L positions so far, D head width,
V vocabulary.
"""

import inspect
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ONE_QUERY = "sdpa_one_query"
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
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
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
    """Returns the cache that `generate` would make for this LLM, as an argument for it; its plain layers grow in place.

    Sliding-window and recurrent layers stay transformers' own. Empty for an LLM that keeps its past in another way.
    """
    if "past_key_values" not in inspect.signature(llm.forward).parameters or not llm._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=llm.config)
    # The copies of transformers' own layers took 37 to 45 % of the time of a batch (docs/performance.md).
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}


def one_query_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Computes attention as `sdpa` does, with one new token per row as two batched matrix products.

    torch's kernel for a CPU takes every row and head on its own, which in bf16 costs several times as much. Grouped
    heads need no copies of their keys and values this way.

    Args: as transformers hands them to an attention function: query (B, H * G, new, D), key and value (B, H, L, D).
    """
    per_head = attention_mask is not None and attention_mask.shape[1] > 1
    # Reading the input has many queries, for which torch's kernel never lays out the scores.
    if query.shape[2] > 1 or per_head or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # For 48 rows torch's kernel takes 13 ms a layer, the two products below 4 ms.
    rows, heads, _, width = query.shape
    query_BHGD = query.reshape(rows, key.shape[1], -1, width)
    # Keys first: turning the queries over is cheap, turning the cache over is not.
    scores_BHGL = torch.matmul(key, query_BHGD.transpose(2, 3)).transpose(2, 3).float()
    # In fp32 up to the softmax: bf16 keeps two to three digits of a score.
    scores_BHGL = scores_BHGL * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # (B, 1, 1, L), the same for all heads
        scores_BHGL = scores_BHGL.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    elif attention_mask is not None:
        scores_BHGL = scores_BHGL + attention_mask
    out_BHGD = torch.matmul(scores_BHGL.softmax(dim=-1).to(value.dtype), value)
    return out_BHGD.reshape(rows, 1, heads, -1), None


AttentionInterface.register(ONE_QUERY, one_query_attention)
AttentionMaskInterface.register(ONE_QUERY, sdpa_mask)


@contextmanager
def decoding_attention(llm: nn.Module):
    """Context manager: an LLM in bf16 on a CPU uses `one_query_attention` in the place of `sdpa`."""
    dtype = llm.get_input_embeddings().weight.dtype
    if llm.device.type != "cpu" or dtype != torch.bfloat16 or llm.config._attn_implementation != "sdpa":
        yield
        return
    llm.set_attn_implementation(ONE_QUERY)
    try:
        yield
    finally:
        llm.set_attn_implementation("sdpa")


# Bytes of weights beyond which no second copy of them is made: a model that just fits must go on fitting.
MOST_PACKED = 4 * 2**30


@contextmanager
def packed_weights(llm: nn.Module):
    """Context manager: the linear layers of an LLM in bf16 on a CPU multiply by copies that are laid out for oneDNN.

    torch lays them out anew at every call, which took a third of the time of products on up to 96 rows. The copies of
    134 million weights take 0.1 s to make, and memory as the weights do.
    """
    layers = [layer for layer in llm.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    layers = [layer for layer in layers if layer.weight.dtype == torch.bfloat16]
    size = sum(layer.weight.nbytes for layer in layers)
    # Without bf16 instructions oneDNN has no such product.
    if llm.device.type != "cpu" or size > MOST_PACKED or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        layer.forward = partial(_linear_by_packed, packed, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear_by_packed(packed: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


@contextmanager
def fast_decoding(llm: nn.Module):
    """Context manager: an LLM decodes by the cheapest ways that this module knows for its device and dtype."""
    with contiguous_input(llm.get_output_embeddings()), decoding_attention(llm), packed_weights(llm):
        yield


def end_at(model: nn.Module, token_id: int) -> None:
    """Lets a token end the generation of a `MindMerger` besides those that the LLM's configs and tokenizer name."""
    if token_id not in model.eos_token_ids:
        model.eos_token_ids.append(token_id)
        model.llm.generation_config.eos_token_id = model.eos_token_ids


@contextmanager
def contiguous_input(layer: nn.Module):
    """Context manager: a linear layer gets its input in one piece.

    The last position of each row, cut out of (B, L, D), is not. torch then multiplies a *frozen* weight row by row, for
    which it lays out a copy of the weight per row: 2.3 GB for 48 rows and a 32,000 x 768 output head in bf16.
    """
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


class FiniteLogits:
    """A watch on the logits of one generation, which ends it where the largest logit of a row is not finite.

    Of NaN, infinity and nothing but -inf `argmax` makes a token, as if it were an answer. A mask of single tokens, -inf
    each, is legal. `generate` gets `note` as a logits processor and `stop` as a stopping criterion. The result stays on
    the device, where `generate` looks at it with its own end-of-text flags.
    """

    def __init__(self):
        self.bad = None

    def note(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Returns the logits as they are."""
        bad = ~scores_BV.amax(dim=-1).isfinite().all()  # amax hands NaN on
        self.bad = bad if self.bad is None else self.bad | bad
        return scores_BV

    def stop(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Returns for every row, (B,), whether generation ends."""
        return self.bad.expand(input_ids.shape[0])

    def found(self) -> bool:
        """Returns whether any logits were not finite."""
        return self.bad is not None and bool(self.bad)
