"""MindMerger: a frozen multilingual encoder whose states a small trained mapping turns into input of a frozen LLM.

The method is that of Huang et al., "MindMerger: Efficiently Boosting LLM Reasoning in non-English Languages"
(NeurIPS 2024, arXiv 2405.17386), section 3. This module knows no task and no file but model weights.

Dimension letters, used as suffixes: B batch, S encoder tokens, P prompt tokens, T target tokens, L merged length,
N all segments of a row side by side before packing, M target tokens of the whole batch, E encoder width, D LLM width,
V vocabulary.
"""

import dataclasses
import hashlib
import os
import pickle
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    GenerationConfig,
    M2M100Config,
    MBartConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
from transformers.models.mbart.modeling_mbart import MBartEncoder
from transformers.utils import ModelOutput, cached_file, logging

from generation_utils import FiniteLogits, contiguous_input, decoding_attention, growing_cache
from model_files import (
    ModelError,
    check_quantisation,
    check_weights,
    end_token_ids,
    find_file,
    first_line,
    hub_advice,
    is_folder,
    llm_config,
    load_config,
    read_json_object,
    refuse_unreadable,
    special_token_ids,
    strip_slash,
)
from runtime_utils import is_out_of_memory, is_utf8, warn, write_bytes_atomic, write_json_atomic, write_text_atomic

FORMAT_VERSION = 1
MAPPING_FILE = "mapping.safetensors"
RELEASED_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
CHECK_WEIGHTS = "compare the files with where they come from, fetch or train them again"


# ---------------------------------------------------------------------------------------------------------------------
# The mapping, the only trained part


class Mapping(nn.Module):
    """Encoder states to vectors in the LLM's input-embedding space, plus the learned end boundary (paper, section 3.1).

    Parameter names and shapes are those of the released checkpoints: `mlp.linear1` (2E, E), `mlp.linear2` (D, 2E),
    both with bias, and `end_boundary` (1, 1, D), which starts at zero.
    """

    def __init__(self, encoder_width: int, llm_width: int):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.linear1 = nn.Linear(encoder_width, 2 * encoder_width)
        self.mlp.linear2 = nn.Linear(2 * encoder_width, llm_width)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_width))

    def forward(self, states_BSE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mapped states (B, S, D) and the boundary (1, 1, D), in the mapping's own dtype.

        The boundary is returned, not read from outside, because ZeRO-3 gathers a parameter only inside its module's
        forward.
        """
        hidden = F.relu(self.mlp.linear1(states_BSE.to(self.mlp.linear1.weight.dtype)))
        return self.mlp.linear2(hidden), self.end_boundary


@dataclass
class MindMergerConfig:
    """What `config.json` beside a mapping records: which models it belongs to and what it was trained for."""

    mt_path: str | None
    llm_path: str
    encoder_width: int | None
    llm_width: int
    stage: str | None = None
    task: str | None = None
    augmentation: bool | None = None
    model_type: str = "mindmerger"
    format_version: int = FORMAT_VERSION


@dataclass
class MindMergerOutput(ModelOutput):
    """`loss`: mean next-token cross-entropy over target tokens; `loss_sum`: its sum; `target_tokens`: their number."""

    loss: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    target_tokens: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Packing


@dataclass
class Packing:
    """Where each position of the merged rows comes from: every tensor lives on the masks' device.

    source_BL: index into the N unpacked positions of the row; mask_BL: 1 on real positions;
    predictor_M: flat index into B*L of the position that predicts each target token, row by row.
    """

    source_BL: torch.Tensor
    mask_BL: torch.Tensor
    predictor_M: torch.Tensor


def plan_packing(masks: list[torch.Tensor], padding_side: str, target_segment: int | None = None) -> Packing:
    """Plans how segments, each padded on any side, become rows with contiguous real tokens.

    Arguments:
        masks: one (B, n_i) mask of 0/1 for each segment, in merged order, all on one device. On the CPU the plan
            costs no device synchronisation, which is why callers may leave masks there.
        padding_side: "right" for training, "left" for generation.
        target_segment: the segment whose tokens are predicted.
    """
    mask_BN = torch.cat([mask.bool() for mask in masks], dim=1)
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
    flat = (source_BL + start_B1).flatten().to(values_BND.device, non_blocking=True)
    return values_BND.flatten(0, 1).index_select(0, flat).view(rows, source_BL.shape[1], *values_BND.shape[2:])


@contextmanager
def head_on_positions(head: nn.Module, flat_M: torch.Tensor):
    """Within it, the LLM's output head sees hidden states of the given flat positions only, as (1, M, D).

    Going through the head's own call leaves what a model does to its logits afterwards (Gemma 2's soft cap, Cohere's
    and Granite's scales) and ZeRO-3's gathering as they are, while the (B, L, V) logits never exist.
    """
    calls = []

    def select(_, inputs):
        calls.append(1)
        return (inputs[0].flatten(0, 1).index_select(0, flat_M).unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
    if len(calls) != 1:
        raise RuntimeError(f"the LLM's output head was called {len(calls)} times in one forward pass, expected once")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits (M, V) against labels (M,), in fp32 whatever the logits' dtype.

    Like `F.cross_entropy(logits.float(), labels, reduction="sum")`, but fp32 copies exist for a few rows at a time:
    at 256,000 tokens of vocabulary the copies that autograd keeps would outgrow the rest of the step.
    """

    CHUNK = 2**23  # elements, 32 MB in fp32: enough to keep a GPU busy

    @classmethod
    def chunks(cls, logits_MV: torch.Tensor, *others: torch.Tensor):
        """Slices of all the tensors, for as many rows as a chunk may have."""
        rows = max(1, cls.CHUNK // logits_MV.shape[1])
        return zip(*(tensor.split(rows) for tensor in (logits_MV, *others)), strict=True)

    @staticmethod
    def forward(ctx, logits_MV, labels_M):
        ctx.save_for_backward(logits_MV, labels_M)
        chunks = ChunkedCrossEntropy.chunks(logits_MV, labels_M)
        losses = [F.cross_entropy(logits.float(), labels, reduction="sum") for logits, labels in chunks]
        return torch.stack(losses).sum()  # without rows there is one empty chunk, of loss 0

    @staticmethod
    def backward(ctx, grad):
        logits_MV, labels_M = ctx.saved_tensors
        grad_MV = torch.empty_like(logits_MV)
        for logits, labels, out in ChunkedCrossEntropy.chunks(logits_MV, labels_M, grad_MV):
            probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
            probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
            out.copy_(probabilities.mul_(grad))
        return grad_MV, None


# ---------------------------------------------------------------------------------------------------------------------
# The whole


class MindMerger(nn.Module):
    """Frozen encoder, trained mapping, frozen LLM.

    Build it with `from_models` (fresh mapping) or `from_pretrained` (saved one). The towers are always frozen and in
    eval mode, so `train()` changes nothing in them; only `mapping` has trainable parameters, in fp32.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        llm: nn.Module,
        config: MindMergerConfig,
        bos_token_id: int | None,
        tokenizer_eos: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.llm = llm
        for tower in (encoder, llm):
            if tower is not None:
                tower.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in self.parameters()), "a frozen part is trainable"
        self.mapping = Mapping(config.encoder_width, config.llm_width) if encoder is not None else None
        self.bos_token_id = bos_token_id
        configured = [llm.generation_config.eos_token_id, llm.config.get_text_config().eos_token_id]
        self.eos_token_ids = end_token_ids(config.llm_path, configured, tokenizer_eos)
        self.pad_token_id = _pad_token_id(llm, self.eos_token_ids)
        # Whatever sampling settings the LLM's folder ships, decoding here is plain greedy.
        llm.generation_config = GenerationConfig(
            bos_token_id=bos_token_id, eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id
        )
        self.train(False)

    # -- building, loading, saving

    @classmethod
    def from_models(
        cls,
        mt_path: str | None,
        llm_path: str,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
    ) -> "MindMerger":
        """Loads both frozen towers from folders or hub names and puts a fresh fp32 mapping between them.

        Arguments:
            mt_path: the multilingual encoder; of an encoder-decoder only the encoder half is loaded. None gives the
                LLM alone, for evaluation.
            llm_path: any causal language model.
            dtype: of the towers; "auto" is what their files hold.
            attn_implementation: handed to transformers (`sdpa`, `eager`, `flash_attention_2`, ...).

        Raises:
            ModelError: for a missing or unusable folder, or weights that leave parameters unset.
        """
        llm = load_llm(llm_path, dtype, attn_implementation)
        encoder = load_encoder(mt_path, dtype, attn_implementation) if mt_path is not None else None
        return cls.from_towers(encoder, llm, mt_path, llm_path)

    @classmethod
    def from_towers(cls, encoder: nn.Module | None, llm: nn.Module, mt_path: str | None, llm_path: str) -> "MindMerger":
        """Puts a fresh mapping between two loaded towers; the paths are what `config.json` will record."""
        config = MindMergerConfig(
            mt_path=strip_slash(mt_path),
            llm_path=strip_slash(llm_path),
            encoder_width=encoder.config.hidden_size if encoder is not None else None,
            llm_width=llm.get_input_embeddings().embedding_dim,
        )
        return cls(encoder, llm, config, *special_token_ids(llm_path, llm.config))

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        mt_path: str | None = None,
        llm_path: str | None = None,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
    ) -> "MindMerger":
        """Rebuilds what `save_pretrained` wrote; the paths override those in its `config.json`.

        Raises:
            ModelError: when the folder has no readable `config.json`, or a part of it does not fit the other.
        """
        config = read_config(folder)
        if config is None:
            raise ModelError(
                f"{folder} has no {CONFIG_FILE}: use from_models and load_mapping, naming both base models"
            )
        model = cls.from_models(mt_path or config.mt_path, llm_path or config.llm_path, dtype, attn_implementation)
        model.load_mapping(folder)
        model.config.stage, model.config.task, model.config.augmentation = (
            config.stage,
            config.task,
            config.augmentation,
        )
        return model

    def load_mapping(self, path: str) -> None:
        """Fills the mapping from a saved folder, a `.safetensors` file or a released `pytorch_model.bin`.

        Every parameter must be there with the right shape and none besides.

        Raises:
            ModelError: naming the file and what does not fit.
        """
        state = check_mapping(path, self.config)
        self.mapping.load_state_dict(state, strict=True)

    def save_pretrained(self, folder: str, state: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `mapping.safetensors`, `config.json` and a model card `README.md`, each file whole or not at all.

        Arguments:
            folder: created when missing.
            state: the mapping's parameters when they live elsewhere (sharded by ZeRO-3); default the module's own.
        """
        folder = Path(folder)
        state = self.mapping.state_dict() if state is None else state
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_bytes_atomic(folder / MAPPING_FILE, save(tensors, metadata={"format": "pt"}))
        write_json_atomic(folder / CONFIG_FILE, dataclasses.asdict(self.config))
        write_text_atomic(folder / "README.md", _model_card(self.config, tensors))

    # -- running

    @property
    def device(self) -> torch.device:
        """Where the LLM's parameters are."""
        return next(self.llm.parameters()).device

    def train(self, mode: bool = True) -> "MindMerger":
        """Sets the mapping's mode; the frozen towers stay in eval mode (no dropout) whatever is asked."""
        super().train(mode)
        for tower in (self.encoder, self.llm):
            if tower is not None:
                tower.eval()
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes the LLM's layers in the backward pass: less memory, about a third more arithmetic.

        transformers' own switch acts in train mode only, which frozen towers never are in.
        """
        for layer in self.llm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(_checkpointed, layer.forward)

    def forward(
        self,
        encoder_input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        target_ids: torch.Tensor,
        target_mask: torch.Tensor,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> MindMergerOutput:
        """Next-token loss on the target tokens of `<bos> mapped-source boundary [prompt] target` (paper, section 3.2).

        Arguments:
            encoder_input_ids, encoder_attention_mask: (B, S), any padding side.
            target_ids, target_mask: (B, T), ending in EOS where they should.
            prompt_ids, prompt_mask: (B, P), or None for the form without a prompt.
            Masks may stay on the CPU while ids are on the model's device: packing then costs no synchronisation.
        """
        embeds, masks = self._segments(encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask)
        embeds.append(self.llm.get_input_embeddings()(target_ids))
        masks.append(target_mask)
        plan = plan_packing(masks, "right", target_segment=len(masks) - 1)
        embeds_BLD = take_rows(torch.cat(embeds, dim=1), plan.source_BL)
        predictor_M = plan.predictor_M.to(embeds_BLD.device, non_blocking=True)
        token_M = torch.nonzero(target_mask.flatten()).squeeze(1).to(target_ids.device, non_blocking=True)
        labels_M = target_ids.flatten().index_select(0, token_M)
        with head_on_positions(self.llm.get_output_embeddings(), predictor_M):
            # Causal attention on right-padded rows never looks at padding: no mask, so the fused kernels apply.
            logits_MV = self.llm(inputs_embeds=embeds_BLD, use_cache=False).logits[0]
        loss_sum = ChunkedCrossEntropy.apply(logits_MV, labels_M)
        tokens = loss_sum.new_tensor(labels_M.numel())
        return MindMergerOutput(loss=loss_sum / tokens, loss_sum=loss_sum, target_tokens=tokens)

    @torch.no_grad()
    def merged_embeddings(
        self,
        encoder_input_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the LLM reads before it answers: `<bos> mapped-source boundary [prompt]`, or `<bos> prompt` without
        `encoder_input_ids`. Uses no part of the LLM but its input embedding.

        Returns:
            the left-padded embeddings (B, L, D), and their mask (B, L) on the masks' device.

        Raises:
            ModelError: when neither an encoder input nor a prompt is given.
        """
        if encoder_input_ids is None and prompt_ids is None:
            raise ModelError("generation needs encoder_input_ids, prompt_ids, or both")
        embeds, masks = self._segments(encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask)
        plan = plan_packing(masks, "left")
        return take_rows(torch.cat(embeds, dim=1), plan.source_BL), plan.mask_BL

    @torch.no_grad()
    def generate(
        self,
        encoder_input_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        max_new_tokens: int = 512,
        **generation_kwargs,
    ) -> torch.Tensor:
        """Greedy decoding after `<bos> mapped-source boundary [prompt]`; new ids only, (B, at most max_new_tokens).

        Without `encoder_input_ids` it is the LLM alone: `<bos> prompt`. Rows that end early are filled with the LLM's
        pad id. Further arguments go to transformers' `generate`; sampling is refused.

        Raises:
            ModelError: when neither an encoder input nor a prompt is given, sampling is asked for, or the LLM's logits
                are not numbers.
        """
        if generation_kwargs.get("do_sample"):
            raise ModelError("generate() is greedy: do_sample=True is not available")
        watch = FiniteLogits()
        for name, own in (("logits_processor", watch.note), ("stopping_criteria", watch.stop)):
            generation_kwargs[name] = [own, *generation_kwargs.get(name, ())]
        embeds_BLD, mask_BL = self.merged_embeddings(encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask)
        if not generation_kwargs.keys() & {"past_key_values", "cache_implementation", "use_cache"}:
            generation_kwargs |= growing_cache(self.llm)
        with contiguous_input(self.llm.get_output_embeddings()), decoding_attention(self.llm):
            ids = self.llm.generate(
                inputs_embeds=embeds_BLD,
                attention_mask=mask_BL.to(embeds_BLD.device),
                **{"max_new_tokens": max_new_tokens, "do_sample": False, **generation_kwargs},
            )
        if watch.found():
            raise self.not_finite()
        return ids

    def bad_weight(self) -> str | None:
        """The name of the first weight that is not finite, found by reading them all, with its model."""
        whole = {"encoder": f"encoder {self.config.mt_path}", "llm": f"LLM {self.config.llm_path}"}
        for name, parameter in self.named_parameters():
            # isfinite does not know the 8-bit floats
            values = parameter.float() if parameter.element_size() == 1 else parameter
            if not torch.isfinite(values).all():
                part = name.partition(".")[0]
                return f"{name} of the {whole.get(part, part)}"
        return None

    def not_finite(self) -> ModelError:
        """The error to raise where numbers are not finite; it reads all weights to name the first that is not."""
        weight = self.bad_weight()
        if weight is not None:
            return ModelError(f"{weight} has values that are NaN or infinite: {CHECK_WEIGHTS}")
        return ModelError(
            f"LLM {self.config.llm_path} computes logits that are NaN or infinite although all weights are finite: use "
            "--precision fp32, and check that encoder, mapping and LLM belong together"
        )

    def _segments(self, encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask):
        """Embeddings (B, n, D) and masks (B, n) of everything before the target, in merged order."""
        embeds, masks = [], []
        embed = self.llm.get_input_embeddings()
        some_ids = encoder_input_ids if encoder_input_ids is not None else prompt_ids
        some_mask = encoder_attention_mask if encoder_input_ids is not None else prompt_mask
        rows = some_ids.shape[0]
        one_B1 = torch.ones(rows, 1, dtype=torch.long, device=some_mask.device)
        if self.bos_token_id is not None:
            embeds.append(embed(some_ids.new_full((rows, 1), self.bos_token_id)))
            masks.append(one_B1)
        if encoder_input_ids is not None:
            states_BSE, states_mask_BS = self.encode(encoder_input_ids, encoder_attention_mask)
            mapped_BSD, boundary_11D = self.mapping(states_BSE)
            dtype = next(self.llm.parameters()).dtype
            embeds += [mapped_BSD.to(dtype), boundary_11D.to(dtype).expand(rows, 1, -1)]
            masks += [states_mask_BS, one_B1]
        if prompt_ids is not None:
            embeds.append(embed(prompt_ids))
            masks.append(prompt_mask)
        return embeds, masks

    def encode(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen encoder's last states (B, S', E) and their mask (B, S'), packed to the right-padded form.

        Encoders with absolute positions give other states under left padding, so every input is packed first.
        """
        plan = plan_packing([mask_BS], "right")
        packed_BS = take_rows(ids_BS, plan.source_BL)
        mask_BS = plan.mask_BL.to(ids_BS.device, non_blocking=True)
        pad = self.encoder.config.pad_token_id
        if pad is not None:
            packed_BS = packed_BS.masked_fill(mask_BS == 0, pad)
        extra = (
            {}
            if self.encoder.config.is_encoder_decoder or not _is_decoder_only(self.encoder.config)
            else {"use_cache": False}
        )
        with torch.no_grad():
            states_BSE = self.encoder(input_ids=packed_BS, attention_mask=mask_BS, **extra).last_hidden_state
        return states_BSE, plan.mask_BL


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Loading the frozen towers


def load_llm(path: str, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None) -> nn.Module:
    """Any causal language model, in eval mode, in `dtype`, its weights memory-mapped where the files allow it.

    Of a multimodal one whose class cannot generate from embeddings, the text model alone is loaded.

    Raises:
        ModelError: when the folder is unusable, leaves parameters unset, or its class cannot generate from embeddings.
    """
    config, names = llm_config(path)
    if (file := find_file(strip_slash(path), "generation_config.json")) is not None:
        read_json_object(file)  # transformers takes a damaged one for none
    extra = {} if names is None else {"key_mapping": names}
    return _from_pretrained(AutoModelForCausalLM, path, config, dtype, attn_implementation, **extra)


def load_encoder(path: str, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None) -> nn.Module:
    """The encoder half of an encoder-decoder, an encoder, or a decoder-only model used as one, by its config's class.

    Raises:
        ModelError: when the folder is unusable, leaves parameters unset, or is a T5 asked for in fp16 (it overflows).
    """
    config = load_config(path)
    if dtype == torch.float16 and config.model_type in ("t5", "mt5", "umt5"):
        raise ModelError(f"{path}: {config.model_type} overflows in fp16, use bf16 or fp32")
    own_encoders = {M2M100Config: M2M100Encoder, MBartConfig: MBartEncoder}
    mappings = (own_encoders, MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel._model_mapping)
    cls = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if "flash" in (attn_implementation or "") and not getattr(cls, "_supports_flash_attn", True):
        # The LLM, nearly all of the arithmetic, keeps it. T5's relative positions are a bias that flash kernels lack.
        warn(f"the encoder {path} cannot use {attn_implementation}: it takes its own default, the LLM uses it")
        attn_implementation = None
    if type(config) in own_encoders:
        # These classes share one embedding between both halves, stored under a name the encoder alone does not have.
        names = {
            r"^(model\.)?encoder\.embed_tokens\.": "embed_tokens.",
            r"^(model\.)?encoder\.": "",
            r"^(model\.)?shared\.": "embed_tokens.",
        }
        return _from_pretrained(own_encoders[type(config)], path, config, dtype, attn_implementation, key_mapping=names)
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        import inspect

        takes = inspect.signature(MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)].__init__).parameters
        extra = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
        return _from_pretrained(AutoModelForTextEncoding, path, config, dtype, attn_implementation, **extra)
    model = _from_pretrained(AutoModel, path, config, dtype, attn_implementation)
    return model.get_encoder() if config.is_encoder_decoder else model


def _from_pretrained(auto_class, path, config, dtype, attn_implementation, **extra):
    check_quantisation(path, config, backward=False)
    check_weights(path, config)
    previous = logging.get_verbosity()
    logging.set_verbosity_error()  # an unused decoder half is no news; what is missing is an error below
    logging.disable_progress_bar()  # one bar for each tower and rank would bury the run's own lines
    try:
        model, info = auto_class.from_pretrained(
            strip_slash(path),
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
            **extra,
        )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the weights in {path} are a pickle of more than tensors and were not read, since that could run code: if "
            "you trust their origin, load them where that is safe and save them as safetensors with save_pretrained"
        ) from error
    except Exception as error:  # a damaged config may bring about nearly every type
        if is_out_of_memory(error):
            raise
        reason = None if is_folder(path) else hub_advice(strip_slash(path), error)
        raise ModelError(f"cannot load the model in {path}: {reason or first_line(error)}") from error
    finally:
        logging.set_verbosity(previous)
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys") or ())
    if absent:
        raise ModelError(
            f"{path} leaves {len(absent)} parameters of {type(model).__name__} unset (first: {absent[0]}): the weight "
            "files are incomplete or belong to another architecture"
        )
    if getattr(config, "quantization_config", None) is not None and isinstance(dtype, torch.dtype):
        # What transformers turns back into numbers (fp8 on a CPU) it leaves in the dtype of their scales.
        for parameter in model.parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                parameter.data = parameter.data.to(dtype)
    return model.eval()


def _is_decoder_only(config) -> bool:
    return not config.is_encoder_decoder and type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING


def check_roles(llm_path: str, mt_path: str | None) -> None:
    """Makes sure that the LLM is none of the encoders, and warns of an LLM that is given as the encoder.

    Raises:
        ModelError: for an encoder or an encoder-decoder as the LLM.
    """
    for flag, path in (("llm_path", llm_path), ("mt_path", mt_path or "")):
        if not is_utf8(path):
            raise ModelError(
                f"--{flag} {path}: the name is not UTF-8, and the libraries that read models open no such folder: "
                "rename it, or pass a link to it"
            )
    llm = load_config(llm_path)
    # Some encoders have a causal head in the library: it would attend to both sides and generate noise.
    encoder = type(llm) in MODEL_FOR_TEXT_ENCODING_MAPPING and getattr(llm, "is_decoder", None) is False
    if llm.is_encoder_decoder or encoder:
        kind = "an encoder-decoder" if llm.is_encoder_decoder else "an encoder"
        raise ModelError(
            f"{llm_path} is a {llm.model_type} model, {kind} and not a causal language model: pass it to --mt_path, "
            "and an LLM to --llm_path"
        )
    if mt_path is None:
        return
    encoder = load_config(mt_path)
    if strip_slash(mt_path) == strip_slash(llm_path) or Path(mt_path).resolve() == Path(llm_path).resolve():
        warn(f"--mt_path and --llm_path are the same model, {mt_path}: the mapping then has no encoder's states to add")
    elif _is_decoder_only(encoder) and type(encoder) in AutoModelForCausalLM._model_mapping:
        warn(
            f"--mt_path {mt_path} is a decoder-only model ({encoder.model_type}): each of its states knows only the "
            "text before it, those of mT5 or NLLB know all of it"
        )


def usable_positions(config) -> int | None:
    """How many positions a model's tables of positions reach, None where the config names no limit.

    RoBERTa and its kin count positions from behind their padding id, whose rows of the table are lost.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    lost = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return None if positions is None else positions - lost


def check_positions(path: str, longest: int, what: str, instead: str) -> None:
    """Refuses inputs longer than a model's table of positions; warns where rotary positions merely get worse.

    Arguments:
        what: the input of `longest` positions, in words.
        instead: the flags to lower.

    Raises:
        ModelError: for a model whose positions end in a table.
    """
    config = load_config(path)
    limit = usable_positions(config)
    if limit is None or longest <= limit:
        return
    message = f"{what} needs {longest} positions but {path} has {limit}: lower {instead}"
    if getattr(config.get_text_config(), "rope_parameters", None) is None:
        raise ModelError(message)
    warn(message)


def _pad_token_id(llm: nn.Module, eos_token_ids: list[int]) -> int:
    """The LLM's pad id, an EOS where it has none with a row in the embedding table (-1, as some old configs say)."""
    named = [source.pad_token_id for source in (llm.generation_config, llm.config.get_text_config())]
    rows = llm.get_input_embeddings().num_embeddings
    return next((one for one in (*named, *eos_token_ids) if one is not None and 0 <= one < rows), 0)


def model_fingerprint(path: str) -> str:
    """A short hash by which a model folder with other content is told apart without reading all of its weights.

    Small files count whole; of large ones the size and 64 evenly spaced blocks count. A hub name gives its commit.
    """
    if not Path(path).is_dir():
        return f"commit {Path(cached_file(path, 'config.json')).parent.name}"
    digest, block = hashlib.sha256(), 16 * 1024
    try:
        for file in sorted(Path(path).iterdir()):
            if file.suffix not in (".json", ".safetensors", ".bin", ".model", ".txt", ".py") or not file.is_file():
                continue
            size = file.stat().st_size
            digest.update(os.fsencode(file.name) + f" {size}\n".encode())
            with open(file, "rb") as content:
                if size <= 64 * block:
                    digest.update(content.read())
                    continue
                for i in range(64):
                    content.seek((size - block) * i // 63)
                    digest.update(content.read(block))
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Mapping files


def mapping_shapes(config: MindMergerConfig) -> dict[str, torch.Tensor]:
    """Names and shapes of the mapping's parameters, as tensors without storage."""
    with torch.device("meta"):
        return dict(Mapping(config.encoder_width, config.llm_width).named_parameters())


def config_of_models(mt_path: str, llm_path: str) -> MindMergerConfig:
    """The configuration of a mapping between two models, from their configs alone.

    Raises:
        ModelError: when one of them has no usable config.
    """
    llm, encoder = load_config(llm_path).get_text_config(), load_config(mt_path)
    return MindMergerConfig(
        mt_path=strip_slash(mt_path),
        llm_path=strip_slash(llm_path),
        encoder_width=encoder.get_text_config(encoder=encoder.is_encoder_decoder or None).hidden_size,
        # OPT-350m's embeddings are narrower than its layers.
        llm_width=getattr(llm, "word_embed_proj_dim", None) or llm.hidden_size,
    )


def read_config(path: str) -> MindMergerConfig | None:
    """The `config.json` of a saved mapping, given its folder or a file in it; None where there is none of ours.

    Raises:
        ModelError: when it is there but cannot be read, or comes from a newer format.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    values = read_json_object(file)
    if values.get("model_type") != "mindmerger":
        return None
    known = {field.name: field.type for field in dataclasses.fields(MindMergerConfig)}
    for name, value in values.items():
        if name in known and not isinstance(value, known[name]):
            raise ModelError(f"{file}: {name} cannot be {str(value)[:80]!r}")
    if values.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ModelError(f"{file} has format version {values['format_version']}, this program knows {FORMAT_VERSION}")
    try:
        return MindMergerConfig(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise ModelError(f"{file} is incomplete: {first_line(error)}") from error


def find_mapping_file(path: str) -> Path:
    """The file a mapping is read from, given itself or its folder.

    Raises:
        ModelError: when there is none, listing what the folder holds.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"no mapping at {path}: pass a saved folder, a .safetensors file or a pytorch_model.bin")
    for name in (MAPPING_FILE, RELEASED_FILE):
        if (path / name).is_file():
            return path / name
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise ModelError(f"{path} holds neither {MAPPING_FILE} nor {RELEASED_FILE} (it holds: {there})")


def read_mapping(path: str) -> dict[str, torch.Tensor]:
    """Reads a mapping's tensors, without executing anything a file may contain.

    Raises:
        ModelError: when the file cannot be read or is a pickle of more than tensors.
    """
    file = find_mapping_file(path)
    refuse_unreadable(file)
    if file.suffix == ".safetensors":
        try:
            return load(file.read_bytes())  # not by name: the library opens no path that is not UTF-8
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {first_line(error)}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle's protocol, before the error that matters
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} is not a plain file of tensors and was not read, since unpickling it could run code: if you trust "
            "its origin, save its tensors alone with safetensors.torch.save_file and pass that"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} cannot be read, it may be cut short: {first_line(error)}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no 'model_state_dict' of tensors, as released mappings do")
    return dict(state)


def check_mapping(path: str, config: MindMergerConfig) -> dict[str, torch.Tensor]:
    """Reads a mapping and makes sure that it fits the two models of `config`; needs no model.

    Raises:
        ModelError: naming both shapes and both models, the parameters that are missing or too many, or the first one
            with values that are not finite.
    """
    state = read_mapping(path)
    expected = {name: tuple(p.shape) for name, p in mapping_shapes(config).items()}
    if state.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise ModelError(f"{path} is not a mapping: missing {missing or 'nothing'}, unknown {extra or 'nothing'}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(state[name].shape)} but encoder {config.mt_path} (width "
                f"{config.encoder_width}) and LLM {config.llm_path} (width {config.llm_width}) need {shape}: pass the "
                "models this mapping was trained with"
            )
        if not torch.isfinite(state[name]).all():
            raise ModelError(
                f"{path}: {name} has values that are NaN or infinite: the file is damaged or its training diverged; "
                "take an earlier checkpoint, or train again with a lower --lr"
            )
    return state


def save_released(path: str, state: dict[str, torch.Tensor]) -> None:
    """Writes a mapping in the released code's format, whole or not at all."""
    import io

    buffer = io.BytesIO()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    torch.save({"model_state_dict": tensors}, buffer, _use_new_zipfile_serialization=False)
    write_bytes_atomic(path, buffer.getvalue())


def _model_card(config: MindMergerConfig, tensors: dict[str, torch.Tensor]) -> str:
    parameters = sum(tensor.numel() for tensor in tensors.values())
    form = {True: "Soft (mapped source and prompt)", False: "Hard (mapped source only)", None: "not recorded"}
    return f"""---
library_name: mindmerger
tags: [mindmerger, multilingual]
---

# MindMerger mapping

A mapping of {parameters:,} parameters from the states of the multilingual encoder `{config.mt_path}` (width
{config.encoder_width}) into the input embeddings of the LLM `{config.llm_path}` (width {config.llm_width}).
Both models stay as they are; only this mapping was trained.

| | |
|---|---|
| task | {config.task or "not recorded"} |
| stage | {config.stage or "not recorded"} |
| form | {form[config.augmentation]} |

```python
from modeling_mindmerger import MindMerger

model = MindMerger.from_pretrained("this/folder")
```

Method: Huang et al., "MindMerger: Efficiently Boosting LLM Reasoning in non-English Languages", NeurIPS 2024,
arXiv 2405.17386.
"""
