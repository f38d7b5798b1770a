"""The two frozen towers: which class loads a folder, what its config says, one-line errors for what does not fit."""

import hashlib
import os
import pickle
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding, M2M100Config, MBartConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
from transformers.models.mbart.modeling_mbart import MBartEncoder
from transformers.utils import cached_file, logging

from mindmerger.hub.model_configs import check_quantisation, llm_config, load_config
from mindmerger.hub.model_files import (
    ModelError,
    check_weights,
    find_file,
    hub_advice,
    is_folder,
    read_json_object,
)
from mindmerger.hub.quantisation import (
    check_packed,
    check_requested,
    computing_in,
    forbid_repacking,
    is_packed,
    settings_of,
)
from mindmerger.hub.tokenizer_files import check_eos_token
from mindmerger.runtime.errors import one_line
from mindmerger.runtime.files import is_utf8, model_path
from mindmerger.runtime.processes import is_out_of_memory, warn

CHECK_WEIGHTS = "compare the files with where they come from, fetch or train them again"


def load_llm(
    path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization: str = "none",
    device: torch.device | None = None,
) -> nn.Module:
    """Loads any causal language model, in eval mode, in `dtype`, its weights memory-mapped where the files allow it.

    Of a multimodal one whose class cannot generate from embeddings, the text model alone is loaded.

    Args:
        quantization: of its linear layers: none, nf4 or int8. Where there is a GPU, a quantised model is placed on the
            current one at once.
        device: where the weights go as they are read, so that the host holds no copy of them; None for the CPU.

    Raises:
        ModelError: when the folder is unusable, leaves parameters unset, its class cannot generate from embeddings, or
            it cannot be quantised here.
    """
    config, names = llm_config(path)
    if (file := find_file(model_path(path), "generation_config.json")) is not None:
        read_json_object(file)  # transformers takes a damaged one for none
    extra = {} if names is None else {"key_mapping": names}
    check_requested(path, config, quantization)
    if quantization != "none":
        computing = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
        extra["quantization_config"] = settings_of(quantization, computing)
    elif device is not None:
        extra["device_map"] = {"": device}
    return _from_pretrained(AutoModelForCausalLM, path, config, dtype, attn_implementation, **extra)


def load_encoder(
    path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Loads an encoder by its config's class: half of an encoder-decoder, an encoder, or a decoder-only model as one.

    Args:
        device: as for `load_llm`.

    Raises:
        ModelError: when the folder is unusable, leaves parameters unset, or is a T5 asked for in fp16 (it overflows).
    """
    config = load_config(path)
    if dtype == torch.float16 and config.model_type in ("t5", "mt5", "umt5"):
        raise ModelError(f"{path}: {config.model_type} overflows in fp16, use bf16 or fp32")
    # transformers does not count these two among its text encoders.
    own_encoders = {M2M100Config: M2M100Encoder, MBartConfig: MBartEncoder}
    mappings = (own_encoders, MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel._model_mapping)
    cls = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if "flash" in (attn_implementation or "") and not getattr(cls, "_supports_flash_attn", True):
        # The LLM, nearly all of the arithmetic, keeps it. T5's relative positions are a bias that flash kernels lack.
        warn(f"the encoder {path} cannot use {attn_implementation}: it takes its own default, the LLM uses it")
        attn_implementation = None
    extra = {"device_map": {"": device}} if device is not None else {}
    if type(config) in own_encoders:
        # These classes share one embedding between both halves, stored under a name the encoder alone does not have.
        names = {
            r"^(model\.)?encoder\.embed_tokens\.": "embed_tokens.",
            r"^(model\.)?encoder\.": "",
            r"^(model\.)?shared\.": "embed_tokens.",
        }
        extra["key_mapping"] = names
        return _from_pretrained(own_encoders[type(config)], path, config, dtype, attn_implementation, **extra)
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        import inspect

        takes = inspect.signature(MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)].__init__).parameters
        extra |= {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
        return _from_pretrained(AutoModelForTextEncoding, path, config, dtype, attn_implementation, **extra)
    model = _from_pretrained(AutoModel, path, config, dtype, attn_implementation, **extra)
    return model.get_encoder() if config.is_encoder_decoder else model


def _from_pretrained(auto_class, path, config, dtype, attn_implementation, **extra):
    check_quantisation(path, config, backward=False)
    # Before transformers opens anything: of a file cut short safetensors says what is wrong, not which file it is.
    check_weights(path, config)
    if (own := getattr(config, "quantization_config", None)) is not None:
        config.quantization_config = computing_in(own, dtype)
    previous = logging.get_verbosity()
    logging.set_verbosity_error()  # an unused decoder half is not news; what is missing is an error below
    logging.disable_progress_bar()  # one bar for each tower and rank would bury the run's own lines
    try:
        model, info = auto_class.from_pretrained(
            model_path(path),
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
        # Each program adds its own advice to this one.
        if is_out_of_memory(error):
            raise
        reason = None if is_folder(path) else hub_advice(model_path(path), error)
        raise ModelError(f"cannot load the model in {path}: {reason or one_line(error)}") from error
    finally:
        logging.set_verbosity(previous)
    # transformers fills these with random numbers, and says so in a warning only.
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys") or ())
    if absent:
        raise ModelError(
            f"{path} leaves {len(absent)} parameters of {type(model).__name__} unset (first: {absent[0]}): the weight "
            "files are incomplete or belong to another architecture"
        )
    _refuse_left_over_layers(path, model, info["unexpected_keys"])
    check_packed(path, model)
    forbid_repacking(model)
    if getattr(config, "quantization_config", None) is not None and isinstance(dtype, torch.dtype):
        # What transformers turns back into numbers (fp8 on a CPU) it leaves in the dtype of their scales.
        for parameter in model.parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and not is_packed(parameter):
                parameter.data = parameter.data.to(dtype)
    return model.eval()


def _refuse_left_over_layers(path: str, model: nn.Module, unexpected: set[str]) -> None:
    """Refuses weight files with more layers than the config: the model would answer without them, and badly.

    Other weights without a place are usual: buffers of earlier versions, a decoder that is not loaded, a vision tower,
    and the layers that predict further tokens (MTP), which are numbered after the others.

    Args:
        unexpected: names of weights in the files that the model has no place for.

    Raises:
        ModelError: naming the layers and how many of them the config has.
    """
    prefix, config = f"{model.base_model_prefix}.", model.config.get_text_config()
    further = getattr(config, "num_nextn_predict_layers", None) or 0
    lists = {name: len(one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)}
    for name, number in lists.items():
        inside = re.compile(rf"(?:{re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}\.(\d+)\.")
        # NLLB's files hold the decoder's layers too: only those under this list's own name count.
        held = {int(found[1]) for key in unexpected if (found := inside.match(key))}
        if held and max(held) >= number + further:
            raise ModelError(
                f"{path}: its weight files hold {max(held) + 1} layers in {name}, its config.json has {number}: "
                "correct the number there, or fetch the config that belongs to these weights"
            )


def _is_decoder_only(config) -> bool:
    return not config.is_encoder_decoder and type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING


def check_roles(llm_path: str, mt_path: str | None) -> None:
    """Makes sure that the LLM is none of the encoders, and warns of an LLM that is given as the encoder.

    Raises:
        ModelError: for an encoder or an encoder-decoder as the LLM, and a model without layers.
    """
    for flag, path in (("llm_path", llm_path), ("mt_path", mt_path or "")):
        if not is_utf8(path):
            raise ModelError(
                f"--{flag} {path}: the name is not UTF-8, and the libraries that read models open no such folder: "
                "rename it, or pass a link to it"
            )
    llm = load_config(llm_path)
    _check_number_of_layers(llm_path, llm)
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
    _check_number_of_layers(mt_path, encoder)
    if model_path(mt_path) == model_path(llm_path) or Path(mt_path).resolve() == Path(llm_path).resolve():
        warn(f"--mt_path and --llm_path are the same model, {mt_path}: the mapping then has no encoder's states to add")
    elif _is_decoder_only(encoder) and type(encoder) in AutoModelForCausalLM._model_mapping:
        warn(
            f"--mt_path {mt_path} is a decoder-only model ({encoder.model_type}): each of its states knows only the "
            "text before it, those of mT5 or NLLB know all of it"
        )


def _check_number_of_layers(path: str, config) -> None:
    layers = getattr(config.get_text_config(encoder=config.is_encoder_decoder or None), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ModelError(f"{path}: its config.json asks for {layers} layers: correct the number there")


def check_models(
    mt_path: str | None, llm_path: str, backward: bool, must_exist: bool = True, quantization: str = "none"
) -> None:
    """Makes sure that both model folders can be used, as far as that shows before weights and data load.

    Args:
        mt_path: the encoder; None for the LLM alone.
        backward: whether gradients go through the LLM. None go through the encoder.
        must_exist: whether the weights have to be there.
        quantization: that the LLM is to be given while it loads.

    Raises:
        ModelError: for the first thing that is wrong.
    """
    config, _ = llm_config(llm_path)
    check_requested(llm_path, config, quantization)
    check_quantisation(llm_path, config, backward)
    check_eos_token(llm_path)
    check_weights(llm_path, config, must_exist)
    if mt_path is not None:
        config = load_config(mt_path)
        check_quantisation(mt_path, config, backward=False)
        check_weights(mt_path, config, must_exist)


def max_positions(config) -> int | None:
    """Returns how many positions a model's tables of positions reach, None where the config names no limit.

    RoBERTa and its kin count positions from behind their padding id, whose rows of the table are lost.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    lost = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return None if positions is None else positions - lost


def check_positions(path: str, longest: int, what: str, instead: str) -> None:
    """Refuses inputs longer than a model's table of positions; warns where rotary positions merely get worse.

    Args:
        what: the input of `longest` positions, in words.
        instead: the flags to lower.

    Raises:
        ModelError: for a model whose positions end in a table.
    """
    config = load_config(path)
    limit = max_positions(config)
    if limit is None or longest <= limit:
        return
    message = f"{what} needs {longest} positions but {path} has {limit}: lower {instead}"
    if getattr(config.get_text_config(), "rope_parameters", None) is None:
        raise ModelError(message)
    warn(message)


def _pad_token_id(llm: nn.Module, eos_token_ids: list[int]) -> int:
    """Returns the LLM's pad id, an EOS where it has none with a row in the embedding table (old configs say -1)."""
    named = [source.pad_token_id for source in (llm.generation_config, llm.config.get_text_config())]
    rows = llm.get_input_embeddings().num_embeddings
    return next((one for one in (*named, *eos_token_ids) if one is not None and 0 <= one < rows), 0)


def model_fingerprint(path: str) -> str:
    """Returns a short hash by which a model folder with other content is told apart without reading all of its weights.

    Small files count whole; of large ones the size and 64 evenly spaced blocks count. A hub name gives its commit.
    """
    if not Path(path).is_dir():
        # The cache names a snapshot's folder after its commit.
        return f"commit {Path(cached_file(path, 'config.json')).parent.name}"
    # 1 MB of each large file, on every rank: all of a 7B model would be read for a minute before each start.
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
                    # By 63: the first block, with the header, and the last are among the 64.
                    content.seek((size - block) * i // 63)
                    digest.update(content.read(block))
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]
