"""A second attention of each LLM layer, over states that the bridge gives it (LayAlign: Ruan et al., NAACL 2025
Findings, arXiv 2502.11405, section 3).

The layer's own queries attend to a memory of keys and values with a softmax of its own; the result, times the layer's
gate, is added to what the layer attends to before its output projection. It is registered with transformers as an
attention function beside each stock one, which it calls twice: so grouped heads, Gemma 2's soft cap and the choice of a
kernel stay the stock function's, and no class of transformers is replaced.

Dimension letters: B batch, S encoder tokens, L positions of the LLM's input, D LLM width, H heads of keys and values,
W head width.
"""

import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from mindmerger.bridges import LayerMemory
from mindmerger.hub.model_files import ModelError
from mindmerger.model.decoding import ONE_QUERY

# Attention modules with k_proj and v_proj of their own, whose classes call the registered function: each is tested.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt")
MASKS = {"sdpa": sdpa_mask, ONE_QUERY: sdpa_mask, "eager": eager_mask}  # by stock attention function
SUFFIX = "_memory"
KEPT = "_kept_memory"  # name of the attribute on an attention module


class Kept(NamedTuple):
    """Memory as an attention module needs it: keys and gated values, and what is added to their scores."""

    key_BHSW: torch.Tensor
    value_BHSW: torch.Tensor
    mask_B11S: torch.Tensor


def check_attention_memory(path: str, config) -> None:
    """Makes sure that a memory can be added to the attention of an LLM, from its config alone.

    Raises:
        ModelError: for another type of model, and for embeddings and layers of two widths.
    """
    config = config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"this bridge adds a memory to the attention of each LLM layer, but {path} is a {config.model_type} model: "
            f"take one of the types {', '.join(MODEL_TYPES)}, or a --bridge without memory"
        )
    embeds = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if embeds != config.hidden_size:  # OPT-350m
        raise ModelError(
            f"this bridge gives prefix and memory one width, but {path} has embeddings of width {embeds}, layers of "
            f"{config.hidden_size}: take another LLM, or a --bridge without memory"
        )


def check_attention_function(name: str | None, engine: str = "hf") -> None:
    """Makes sure that a memory can be added to the attention that is asked for; None is transformers' own choice.

    Raises:
        ModelError: for an attention function, or an engine, that takes no second attention beside its own.
    """
    if engine != "hf":
        raise ModelError(
            f"this bridge adds a memory to the attention of each LLM layer, which --engine {engine} does not allow: "
            "leave it out"
        )
    if name not in (None, *MASKS):
        raise ModelError(
            "this bridge adds a memory to the attention of each LLM layer, which --attn_implementation "
            f"{name} does not allow: use sdpa or eager"
        )


def normalises_keys(llm: nn.Module) -> bool:
    """Returns whether the LLM's attention normalises its keys, as Qwen3's and Gemma 3's do, and so a memory's."""
    return hasattr(llm.get_decoder().layers[0].self_attn, "k_norm")


def _with_memory(base: str):
    """Returns the attention function `base` with a memory added where the module keeps one."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        stock = AttentionInterface().get_interface(base, None)
        if stock is None:  # transformers registers no "eager": each model has its own
            stock = sys.modules[type(module).__module__].eager_attention_forward
        out_BLHW, weights = stock(module, query, key, value, attention_mask, **kwargs)
        kept = vars(module).get(KEPT)
        if kept is None:
            return out_BLHW, weights
        same = {name: kwargs[name] for name in ("scaling", "softcap", "dropout") if kwargs.get(name) is not None}
        extra_BLHW, _ = stock(module, query, kept.key_BHSW, kept.value_BHSW, kept.mask_B11S, is_causal=False, **same)
        return out_BLHW + extra_BLHW, weights

    return attention


for _base, _mask in MASKS.items():
    AttentionInterface.register(_base + SUFFIX, _with_memory(_base))
    AttentionMaskInterface.register(_base + SUFFIX, _mask)


class _Attached:
    """Context manager: attention modules keep their memory and use it. It can be entered again, as a backward pass does
    that recomputes layers."""

    def __init__(self, config, base: str, kept: list[tuple[nn.Module, Kept]]):
        self.config, self.base, self.kept = config, base, kept

    def __enter__(self):
        for module, memory in self.kept:
            vars(module)[KEPT] = memory
        self.config._attn_implementation = self.base + SUFFIX

    def __exit__(self, *_):
        self.config._attn_implementation = self.base
        for module, _ in self.kept:
            vars(module).pop(KEPT, None)


@contextmanager
def attention_memory(llm: nn.Module, memory: list[LayerMemory] | None, mask_BS: torch.Tensor | None):
    """Context manager: each layer of the LLM also attends to its memory, where the mask is 1; None changes nothing.

    Keys and values are computed once, on entering. A call of the layer's own projections, not of their weights: ZeRO-3
    gathers them then, and an adapter on them takes part.
    """
    if memory is None:
        yield
        return
    decoder = llm.get_decoder()
    check_attention_function(decoder.config._attn_implementation)  # someone may have set another since it was loaded
    dtype = decoder.get_input_embeddings().weight.dtype
    # The lowest number and not -inf: a row without a token would be NaN. The released code masks nothing here, so that
    # results depend on a batch's padding.
    mask_BS = mask_BS.new_zeros(mask_BS.shape, dtype=dtype).masked_fill(mask_BS == 0, torch.finfo(dtype).min)
    mask_B11S = mask_BS[:, None, None].to(memory[0].key_BSD.device, non_blocking=True)
    pairs = zip((layer.self_attn for layer in decoder.layers), memory, strict=True)
    kept = [(attention, _project(attention, layer_memory, mask_B11S)) for attention, layer_memory in pairs]
    # Of all layers the sources are wider than keys and values with grouped heads: 2ND for each encoder token.
    del memory, pairs
    with _Attached(decoder.config, decoder.config._attn_implementation, kept):
        yield


def _project(attention: nn.Module, memory: LayerMemory, mask_B11S: torch.Tensor) -> Kept:
    """Returns a layer's memory behind the layer's own frozen projections."""

    def in_heads(states_BSD):
        return states_BSD.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    dtype = mask_B11S.dtype
    key_BHSW = in_heads(attention.k_proj(memory.key_BSD.to(dtype)))
    if hasattr(attention, "k_norm"):  # of Qwen3 and Gemma 3, whose queries expect keys of that size (ours)
        key_BHSW = attention.k_norm(key_BHSW)
    # The gate scales the values: once for each encoder token, not once for each position of the answer. The product is
    # taken in the gate's fp32. No rotation: a memory has no position.
    value_BHSW = (in_heads(attention.v_proj(memory.value_BSD.to(dtype))) * memory.gate_1).to(dtype)
    return Kept(key_BHSW.contiguous(), value_BHSW.contiguous(), mask_B11S)


def checkpoint_layers(llm: nn.Module, remembers: bool) -> None:
    """Has the backward pass compute the LLM's layers again.

    Args:
        remembers: whether they may have a memory, which they then need again.
    """
    for layer in llm.modules():
        # Not transformers' own switch, which acts in train mode only: frozen towers are never in it.
        if isinstance(layer, GradientCheckpointingLayer):
            more = {"context_fn": partial(contexts_of_memory, layer)} if remembers else {}
            layer.forward = partial(checkpointed, layer.forward, more)


def checkpointed(forward, more: dict, *args, **kwargs):
    """Calls a layer's forward, so that the backward pass computes it again.

    Args:
        more: `contexts_of_memory` as torch's checkpoint takes it, where the layer may have a memory.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)  # generation and the dev split: nothing is recomputed
    if torch.compiler.is_compiling():  # what a compiled layer recomputes is given the memory as an input
        more = {}
    # The reentrant form takes no `context_fn` and no keyword arguments.
    return checkpoint(forward, *args, use_reentrant=False, **more, **kwargs)


def contexts_of_memory(layer: nn.Module):
    """Returns the pair of contexts that torch's checkpoint asks for: a layer has its memory again while the backward
    pass recomputes it, when the forward pass is long over."""
    kept = [(module, vars(module)[KEPT]) for module in layer.modules() if KEPT in vars(module)]
    if not kept:
        return nullcontext(), nullcontext()
    config = kept[0][0].config
    return nullcontext(), _Attached(config, config._attn_implementation.removesuffix(SUFFIX), kept)
