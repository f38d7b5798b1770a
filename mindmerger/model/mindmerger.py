"""MindMerger: a frozen multilingual encoder whose states a small trained mapping turns into input of a frozen LLM.

The method is that of Huang et al., "MindMerger: Efficiently Boosting LLM Reasoning in non-English Languages"
(NeurIPS 2024, arXiv 2405.17386), section 3. This module knows no task and no file.

Dimension letters, used as suffixes: B batch, S encoder tokens, P prompt tokens, T target tokens, L merged length,
M target tokens of the whole batch, E encoder width, D LLM width.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from transformers import GenerationConfig

from mindmerger.bridges import Towers
from mindmerger.hub.chat_template import read_template
from mindmerger.hub.model_files import ModelError
from mindmerger.hub.quantisation import finite
from mindmerger.hub.tokenizer_files import end_token_ids, load_tokenizer, special_token_ids
from mindmerger.model.adapters import (
    ADAPTER_FOLDER,
    adapter_parameters,
    check_adapter,
    load_adapter,
    save_adapter,
    set_mode,
)
from mindmerger.model.attention_memory import (
    attention_memory,
    check_attention_function,
    check_attention_memory,
    checkpoint_layers,
    normalises_keys,
)
from mindmerger.model.decoding import FiniteLogits, end_at, fast_decoding, growing_cache
from mindmerger.model.encoding import run_encoder
from mindmerger.model.input_plan import InputPlan, masks_known, plan_encoder, plan_input
from mindmerger.model.likelihood import score_labels
from mindmerger.model.loss import MindMergerOutput, next_token_loss
from mindmerger.model.mapping_files import (
    CONFIG_FILE,
    MAPPING_FILE,
    MindMergerConfig,
    build_bridge,
    check_mapping,
    new_config,
)
from mindmerger.model.model_card import model_card
from mindmerger.model.packing import take_rows, to_device
from mindmerger.model.sharing import SharedOnHub, fetch_mapping, open_mapping
from mindmerger.model.towers import CHECK_WEIGHTS, _pad_token_id, load_encoder, load_llm
from mindmerger.model.trained_head import hand_over_head
from mindmerger.runtime.files import write_bytes_atomic, write_json_atomic, write_text_atomic


class MindMerger(SharedOnHub, nn.Module):
    """Frozen encoder, trained mapping, frozen LLM.

    Build it with `from_models` (fresh mapping) or `from_pretrained` (saved one). The towers are always frozen and in
    eval mode, so `train()` changes nothing in them; only `mapping` has trainable parameters, in fp32, until
    `add_adapter` freezes it too. With a bridge and without an encoder it reads the states that `forward` is given.
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
        self.adapter: dict | None = None  # what PEFT knows of it
        self.linear_loss = None  # for `next_token_loss`
        self.encoder = encoder
        self.llm = llm
        for tower in (encoder, llm):
            if tower is not None:
                tower.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in self.parameters()), "a frozen part is trainable"
        self.mapping = build_bridge(config) if config.mt_path is not None else None
        if self.mapping is not None:
            config.encoder_layers = list(self.mapping.encoder_layers)
            if self.mapping.uses_memory:
                check_attention_memory(config.llm_path, llm.config)
                check_attention_function(llm.config.get_text_config()._attn_implementation)
                config.memory_key_norm = normalises_keys(llm)  # recorded, since the paper is silent on it
        if hasattr(self.mapping, "lm_head"):
            hand_over_head(llm, self.mapping.lm_head, config.llm_path)
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
        bridge: str = "mindmerger",
        bridge_options: dict | None = None,
        quantization: str = "none",
    ) -> "MindMerger":
        """Loads both frozen towers from folders or hub names and puts a fresh fp32 bridge between them.

        Args:
            mt_path: the multilingual encoder; of an encoder-decoder only the encoder half is loaded. None gives the
                LLM alone, for evaluation.
            llm_path: a causal language model that can generate from embeddings.
            dtype: of the towers; "auto" is what their files hold.
            attn_implementation: handed to transformers (`sdpa`, `eager`, `flash_attention_2`, ...).
            bridge: a name of `mindmerger.bridges.BRIDGES`.
            bridge_options: of that bridge, as `--bridge_option KEY=VALUE` gives them; the others have their defaults.
            quantization: of the LLM: none, nf4 or int8.

        Raises:
            UserError: for a missing or unusable folder, weights that leave parameters unset, or an unknown bridge or
                option.
        """
        llm = load_llm(llm_path, dtype, attn_implementation, quantization)
        encoder = load_encoder(mt_path, dtype, attn_implementation) if mt_path is not None else None
        return cls.from_towers(encoder, llm, mt_path, llm_path, bridge, bridge_options)

    @classmethod
    def from_towers(
        cls,
        encoder: nn.Module | None,
        llm: nn.Module,
        mt_path: str | None,
        llm_path: str,
        bridge: str = "mindmerger",
        bridge_options: dict | None = None,
        towers: Towers | None = None,
    ) -> "MindMerger":
        """Puts a fresh bridge between two loaded towers; paths and bridge are what `config.json` will record.

        Args:
            towers: the shapes of both, for a bridge whose encoder is not loaded; None reads them off the models.
        """
        text, head = llm.config.get_text_config(), llm.get_output_embeddings()
        towers = towers or Towers(
            encoder.config.hidden_size if encoder is not None else None,
            llm.get_input_embeddings().embedding_dim,
            encoder.config.num_hidden_layers if encoder is not None else None,
            text.num_hidden_layers,
            getattr(head, "out_features", None),
        )
        config = new_config(mt_path, llm_path, towers, bridge, bridge_options)
        return cls(encoder, llm, config, *special_token_ids(llm_path, llm.config))

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        mt_path: str | None = None,
        llm_path: str | None = None,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        quantization: str = "none",
        **download,
    ) -> "MindMerger":
        """Rebuilds what `save_pretrained` wrote; the paths override those in its `config.json`.

        `folder` may be an id of the Hugging Face hub: `sharing.fetch_mapping` says what `revision` and `download` are.

        Raises:
            ModelError: when the folder has no readable `config.json`, or a part of it does not fit the other.
        """
        folder, config = open_mapping(folder, revision, **download)
        paths = mt_path or config.mt_path, llm_path or config.llm_path
        model = cls.from_models(*paths, dtype, attn_implementation, config.bridge, config.bridge_options, quantization)
        if model.mapping is not None:
            model.load_mapping(folder)
        if config.adapter is not None:
            place = Path(folder) if Path(folder).is_dir() else Path(folder).parent
            load_adapter(model, check_adapter(str(place / ADAPTER_FOLDER), model.config.llm_path))
        for name in ("stage", "task", "augmentation", "precision", "quantization", "languages", "chat_template"):
            setattr(model.config, name, getattr(config, name))
        if (chat := read_template(config.chat_template, folder)) is not None:
            end_at(model, chat.end_id(load_tokenizer(model.config.llm_path), model.config.llm_path))
        return model

    def load_mapping(self, path: str) -> None:
        """Fills the bridge from a saved folder or its id on the hub, a `.safetensors` file or a released `.bin`.

        Every parameter must be there with the right shape and none besides, but for the towers' in released weights.

        Raises:
            ModelError: naming the file and what does not fit.
        """
        state = check_mapping(fetch_mapping(path), self.config)
        # Released weights may lack an output head: then the LLM's own stays, which the bridge has already.
        self.mapping.load_state_dict(self.mapping.state_dict() | state, strict=True)

    def save_pretrained(
        self,
        folder: str,
        state: dict[str, torch.Tensor] | None = None,
        adapter_state: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes `mapping.safetensors`, `config.json` and a model card `README.md`, each file whole or not at all; an
        adapter in the PEFT folder `adapter/`.

        Args:
            folder: created when missing.
            state: the mapping's parameters when they live elsewhere (sharded by ZeRO-3); default the module's own.
            adapter_state: the adapter's, by the names of its file; as for `state`.
        """
        folder, tensors = Path(folder), {}
        if self.mapping is not None:
            state = self.mapping.state_dict() if state is None else state
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            # Not `save_file`: before safetensors 0.8 one that fails destroys the earlier file.
            write_bytes_atomic(folder / MAPPING_FILE, save(tensors, metadata={"format": "pt"}))
        if self.adapter is not None:
            save_adapter(folder / ADAPTER_FOLDER, self.adapter, adapter_state or self.trained_parameters())
        write_json_atomic(folder / CONFIG_FILE, dataclasses.asdict(self.config))
        write_text_atomic(folder / "README.md", model_card(self.config, tensors))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what is trained, by the names that a checkpoint holds it under: the bridge, or the adapter if any."""
        return dict(self.mapping.named_parameters()) if self.adapter is None else adapter_parameters(self.llm)

    def load_trained(self, state: dict[str, torch.Tensor]) -> None:
        """Fills what is trained with the tensors of a checkpoint, which were checked."""
        own = self.trained_parameters()
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)

    def released_names(self) -> dict[str, str]:
        """Returns the keys of the bridge's released weights: key → name of the bridge's parameter."""
        return self.mapping.released_names()

    # -- running

    @property
    def device(self) -> torch.device:
        """Where the LLM's parameters are."""
        return next(self.llm.parameters()).device

    def train(self, mode: bool = True) -> "MindMerger":
        """Sets the mode of what is trained; what is frozen stays in eval mode (no dropout) whatever is asked."""
        super().train(mode)
        for frozen in (self.encoder, self.llm, self.mapping if self.adapter is not None else None):
            if frozen is not None:
                frozen.eval()  # the released code trains with the encoder's dropout on
        if self.adapter is not None:
            set_mode(self.llm, mode)
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes the LLM's layers in the backward pass: less memory, about a third more arithmetic."""
        checkpoint_layers(self.llm, self.mapping is not None and self.mapping.uses_memory)

    def forward(
        self,
        encoder_input_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        plan: InputPlan | None = None,
        encoder_states: Sequence[torch.Tensor] | None = None,
    ) -> MindMergerOutput:
        """Computes the next-token loss on the target of `<bos> mapped-source boundary [prompt] target` (paper, 3.2).

        Args:
            encoder_input_ids, encoder_attention_mask: (B, S), any padding side; None for the LLM alone.
            target_ids, target_mask: (B, T), ending in EOS where they should; (B, C, T) for C labels to choose from,
                whose `label_losses` and `label_greedy` are then the only output, without gradient.
            prompt_ids, prompt_mask: (B, P), or None for the form without a prompt.
            plan: what `plan_input` returns for these masks, which may have been moved; None makes it here.
            encoder_states: (B, S, E) for each layer that the bridge reads, right-padded; None runs the encoder.
            Masks may stay on the CPU while ids are on the model's device: packing is planned where they are.
        """
        inputs = encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask, encoder_states
        # Here, though nothing is trained on it: ZeRO 3 gathers weights within the engine's own call alone.
        if target_ids.dim() == 3:
            with torch.no_grad():
                losses_BC, greedy_BC = score_labels(self.llm, *self._merged(*inputs), target_ids, target_mask)
            return MindMergerOutput(label_losses=losses_BC, label_greedy=greedy_BC)
        plan = (plan or self.plan_input(encoder_attention_mask, prompt_mask, target_mask)).to(target_ids.device)
        embeds, memory = self._segments(plan, encoder_input_ids, prompt_ids, encoder_states)
        embeds_BLD = self._rows([*embeds, self.llm.get_input_embeddings()(target_ids)], plan)
        labels_M = target_ids.flatten().index_select(0, plan.token_M)
        with memory, masks_known(plan.pack):
            # Causal attention on right-padded rows never looks at padding: no mask, so the fused kernels apply.
            inputs = {"inputs_embeds": embeds_BLD, **plan.llm_arguments}
            loss_sum = next_token_loss(self.llm, plan.rows.predictor_M, labels_M, self.linear_loss, **inputs)
        # A sum, for the mean depends on how a batch is split: training divides by the whole batch's tokens.
        tokens = loss_sum.new_full((), labels_M.numel())
        return MindMergerOutput(loss=loss_sum / tokens, loss_sum=loss_sum, target_tokens=tokens)

    def score(
        self, target_ids: torch.Tensor, target_mask: torch.Tensor, **inputs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probability of each target behind its row's input, in nats and fp64, and whether greedy
        decoding would give it, both (B, C); -inf and False where the mask has no token. An input is read once.

        Args:
            target_ids, target_mask: (B, C, T), C targets of each row, ending in EOS where it is to count.
            inputs: the other arguments of `forward`.
        """
        output = self(**inputs, target_ids=target_ids, target_mask=target_mask)
        return -output.label_losses, output.label_greedy

    @torch.no_grad()
    def merged_embeddings(
        self,
        encoder_input_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Builds the LLM's input before the answer: `<bos> mapped-source boundary [prompt]`, or `<bos> prompt` without
        `encoder_input_ids`. Uses no part of the LLM but its input embedding.

        Returns:
            the left-padded embeddings (B, L, D), and their mask (B, L) on the masks' device.

        Raises:
            ModelError: when neither an encoder input nor a prompt is given, or the bridge gives the LLM a memory too.
        """
        if encoder_input_ids is not None and self.mapping.uses_memory:
            raise ModelError(
                f"bridge {self.config.bridge} also gives the LLM's attention a memory: its embeddings alone are not "
                "what the LLM reads"
            )
        embeds_BLD, mask_BL, _ = self._merged(encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask)
        return embeds_BLD, mask_BL

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
        """Decodes greedily after `<bos> mapped-source boundary [prompt]`; new ids only, (B, at most max_new_tokens).

        Without `encoder_input_ids` it is the LLM alone: `<bos> prompt`. Rows that end early are filled with the LLM's
        pad id. Further arguments go to transformers' `generate`; sampling is refused.

        Raises:
            ModelError: when neither an encoder input nor a prompt is given, sampling is asked for, or the LLM's logits
                are not numbers.
        """
        if generation_kwargs.get("do_sample"):
            raise ModelError("generate() is greedy: do_sample=True is not available")
        if generation_kwargs.get("num_beams", 1) > 1 and self.mapping is not None and self.mapping.uses_memory:
            raise ModelError(f"bridge {self.config.bridge} keeps one memory for each row: num_beams must be 1")
        watch = FiniteLogits()  # of NaN logits argmax makes token 0, which would be scored as an answer
        for name, own in (("logits_processor", watch.note), ("stopping_criteria", watch.stop)):
            generation_kwargs[name] = [own, *generation_kwargs.get(name, ())]
        embeds_BLD, mask_BL, memory = self._merged(encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask)
        if not generation_kwargs.keys() & {"past_key_values", "cache_implementation", "use_cache"}:
            generation_kwargs |= growing_cache(self.llm)
        with fast_decoding(self.llm), memory:
            ids = self.llm.generate(
                inputs_embeds=embeds_BLD,
                attention_mask=mask_BL.to(embeds_BLD.device),
                **{"max_new_tokens": max_new_tokens, "do_sample": False, **generation_kwargs},
            )
        if watch.found():
            raise self.not_finite_error()
        return ids

    def bad_weight(self) -> str | None:
        """Names the first weight that is not finite, found by reading them all, with its model."""
        whole = {"encoder": f"encoder {self.config.mt_path}", "llm": f"LLM {self.config.llm_path}"}
        for name, parameter in self.named_parameters():
            if not finite(self, name, parameter):
                part = name.partition(".")[0]
                return f"{name} of the {whole.get(part, part)}"
        return None

    def not_finite_error(self) -> ModelError:
        """Returns the error to raise where numbers are not finite; reads all weights to name the first that is not."""
        weight = self.bad_weight()
        if weight is not None:
            return ModelError(f"{weight} has values that are NaN or infinite: {CHECK_WEIGHTS}")
        return ModelError(
            f"LLM {self.config.llm_path} computes logits that are NaN or infinite although all weights are finite: use "
            "--precision fp32, and check that encoder, mapping and LLM belong together"
        )

    def plan_input(
        self,
        encoder_attention_mask: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        packed: bool = False,  # all rows end to end in one, for LLMs that `training/packing.py` knows
    ) -> InputPlan:
        """Plans how `forward` lays out a batch with these masks, (B, n) each, or `generate` without a target."""
        masks = encoder_attention_mask, prompt_mask, target_mask
        return plan_input(self.mapping, self.bos_token_id is not None, *masks, packed)

    def _merged(self, encoder_input_ids, encoder_attention_mask, prompt_ids, prompt_mask, encoder_states=None):
        """Returns left-padded embeddings (B, L, D) of all before the answer, their mask on the masks' device, and the
        memory beside them."""
        if encoder_input_ids is None and prompt_ids is None:
            raise ModelError("generation needs encoder_input_ids, prompt_ids, or both")
        plan = self.plan_input(encoder_attention_mask, prompt_mask)
        moved = plan.to((encoder_input_ids if encoder_input_ids is not None else prompt_ids).device)
        embeds, memory = self._segments(moved, encoder_input_ids, prompt_ids, encoder_states)
        return self._rows(embeds, moved), plan.rows.mask_BL, memory

    def _segments(
        self, plan: InputPlan, encoder_input_ids: torch.Tensor | None, prompt_ids: torch.Tensor | None, given=None
    ) -> tuple[list[torch.Tensor], AbstractContextManager]:
        """Returns embeddings (B, n, D) of everything before the target, in merged order, and a context manager within
        which the LLM attends to the bridge's memory. The plan is on the ids' device."""
        embeds, memory = [], nullcontext()
        embed = self.llm.get_input_embeddings()
        some_ids = encoder_input_ids if encoder_input_ids is not None else prompt_ids
        if self.bos_token_id is not None:
            embeds.append(embed(some_ids.new_full((some_ids.shape[0], 1), self.bos_token_id)))
        if encoder_input_ids is not None:
            needed = self.mapping.encoder_layers, encoder_input_ids, plan.encoder, plan.padded
            states_BSE = run_encoder(self.encoder, *needed) if given is None else [*given]
            self.mapping.llm_dtype = embed.weight.dtype  # other parameters may be codes of quantised layers
            prefix = self.mapping(states_BSE, plan.encoder.mask_BL)
            memory = attention_memory(self.llm, prefix.memory, plan.encoder.mask_BL)
            embeds.append(prefix.prefix_BKD.to(self.mapping.llm_dtype))  # the bridge computes in fp32
        if prompt_ids is not None:
            embeds.append(embed(prompt_ids))
        return embeds, memory

    def _rows(self, embeds: list[torch.Tensor], plan: InputPlan) -> torch.Tensor:
        embeds_BND = torch.cat(embeds, dim=1)
        if embeds_BND.shape[1] != plan.width:
            raise RuntimeError(f"bridge {self.config.bridge}: prefix_mask() and forward() differ in their positions")
        return take_rows(embeds_BND, plan.rows.source_BL)

    def encode(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns the frozen encoder's states (B, S', E) that the bridge reads and their mask (B, S'), right-padded."""
        packing, padded = plan_encoder(mask_BS)
        moved = packing.map(lambda tensor: to_device(tensor, ids_BS.device))
        return run_encoder(self.encoder, self.mapping.encoder_layers, ids_BS, moved, padded), packing.mask_BL
