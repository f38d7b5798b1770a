"""Configs of models: which class loads a folder, and whether it can be used with a mapping.

Code that a folder brings along is never run: nothing in this project passes anything but `trust_remote_code=False`.
"""

import copy
import inspect
import json
import os
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_kernels_available, logging

from mindmerger.hub.model_files import ModelError, hub_advice, is_folder, read_json_object, refuse_unreadable
from mindmerger.runtime.errors import one_line
from mindmerger.runtime.files import find_endless, model_path

# Names of a language model's weights inside a multimodal one, as its files have had them, to those of its own class.
TEXT_WEIGHTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
# Of the files that the libraries read in a model folder.
READ_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")
# Methods that have a backward pass in some of the supported versions of transformers only.
INFERENCE_ONLY = ("fp8", "mxfp8")


def load_config(path: str):
    """Reads the transformers config of a model folder or hub name, without a pad id that has no embedding row.

    Raises:
        ModelError: when there is no such folder or model, or its `config.json` cannot be used.
    """
    path = model_path(path)
    if path.startswith((".", "/", "~")) and not is_folder(path):
        raise ModelError(f"no model folder {path}: pass an existing folder or a Hugging Face hub name")
    # transformers would open a pipe that stands in a file's place, and wait for its writer for ever.
    if (endless := find_endless(path, READ_SUFFIXES)) is not None:
        refuse_unreadable(endless)
    try:
        # False and not left out: else transformers asks on standard input, where a script's `yes` counts as consent.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the configs' own validation raises nearly every type
        file = Path(path) / "config.json"
        if os.path.lexists(file):
            values = read_json_object(file)
            if not isinstance(kind := values.get("model_type"), str | None):
                raise ModelError(f"{file}: model_type must be a text, not {json.dumps(kind)[:40]}") from error
            # Only where transformers lacks the class: a folder of a type that it has may name code of its own too.
            refuse_own_code(path, values, kind not in CONFIG_MAPPING)
        if not is_folder(path) and (advice := hub_advice(path, error)) is not None:
            raise ModelError(f"cannot fetch {path} from the Hugging Face hub: {advice}") from error
        raise ModelError(
            f"cannot load a model config from {path}: neither a folder with a usable config.json here nor a reachable "
            f"hub name ({one_line(error)})"
        ) from error
    _ignore_unusable_pad(config)
    return config


def refuse_own_code(path: str, values: dict, needed: bool) -> None:
    """Refuses a model whose config names code in its own folder, where it is `needed` to load the model."""
    if needed and isinstance(values.get("auto_map"), dict):
        raise ModelError(
            f"{path} needs code of its own ({', '.join(sorted(values['auto_map']))} in auto_map), which is never run "
            "here: use a model whose class transformers has"
        )


def _ignore_unusable_pad(config) -> None:
    """Puts the class's default in the place of a pad id that is negative or beyond the embedding table."""
    # torch refuses a padding id beyond its table, and takes -1 for the table's last row.
    for part in {id(one): one for one in (config, getattr(config, "text_config", None))}.values():
        rows, pad = (getattr(part, name, None) for name in ("vocab_size", "pad_token_id"))
        if isinstance(rows, int) and isinstance(pad, int) and not 0 <= pad < rows:
            default = type(part)().pad_token_id
            part.pad_token_id = default if default is not None and 0 <= default < rows else None


def embedding_rows(config) -> int | None:
    """Returns how many rows the input embedding of a model with this config has, where the config says so."""
    return getattr(config.get_text_config(encoder=config.is_encoder_decoder or None), "vocab_size", None)


def llm_config(path: str) -> tuple[object, dict[str, str] | None]:
    """Returns the config to load an LLM with, and the names of its weights where the files have others.

    That is the folder's own, or its text model's where the class of the whole cannot generate from embeddings.

    Raises:
        ModelError: for a model that is not a causal language model, or cannot generate from embeddings.
    """
    config, classes = load_config(path), AutoModelForCausalLM._model_mapping
    if type(config) not in classes:
        raise ModelError(f"{path} is a {config.model_type} model, not a causal language model: pass another --llm_path")
    # Before the signatures: such a class may take embeddings, and then silently leaves out what it reads of the ids.
    if any(reads_token_ids(part) for part in (config, getattr(config, "text_config", None))):
        raise ModelError(
            f"{path} is a {config.model_type} model, whose layers look at token ids too, and a mapping's vectors have "
            "none: pass another --llm_path"
        )
    if takes_embeddings(classes[type(config)]):
        return config, None
    text = getattr(config, "text_config", None)
    if type(text) not in classes or not takes_embeddings(classes[type(text)]):
        raise ModelError(
            f"{path} is a {config.model_type} model, whose class {classes[type(config)].__name__} cannot generate from "
            "embeddings, as a mapping's output is: pass another --llm_path"
        )
    # What the whole model's config says of these is meant; the text model's own entries may be defaults.
    text.tie_word_embeddings = config.tie_word_embeddings
    for name in ("bos_token_id", "eos_token_id", "quantization_config"):
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text, TEXT_WEIGHTS


def takes_embeddings(model_class: type) -> bool:
    """Returns whether a class can generate from embeddings: the signatures that transformers' `generate` looks at."""
    # Both: without the second, `generate` refuses embeddings at the first question, with the weights loaded.
    methods = (model_class.forward, model_class.prepare_inputs_for_generation) if model_class.can_generate() else ()
    takes = ["inputs_embeds" in inspect.signature(method).parameters for method in methods]
    return model_class.main_input_name == "input_ids" and bool(takes) and all(takes)


def reads_token_ids(config) -> bool:
    """Returns whether layers behind the embedding look at token ids: per-layer embeddings of Gemma 3n and 4, n-grams of
    Qwen4-Exp, hash routing of DeepSeek V4, patches of BLT. transformers leaves them out without ids, or fails."""
    names = ("hidden_size_per_layer_input", "ple_layer_ids", "patching_mode")
    return any(getattr(config, name, None) for name in names) or "hash_moe" in (
        getattr(config, "mlp_layer_types", None) or ()
    )


def own_quantisation(config):
    """Returns the quantisation settings that a model's own config holds, None where its weights are numbers."""
    parts = (config, getattr(config, "text_config", None))
    return next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)


def quantisation_method(config) -> str | None:
    """Returns the method of a quantised model's config by the name that transformers has for it."""
    settings = own_quantisation(config)
    if isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return settings.get("quant_method") if isinstance(settings, dict) else type(settings).__name__


def check_quantisation(path: str, config, backward: bool) -> None:
    """Makes sure that a model whose weights are quantised can be used here, before they load.

    Args:
        backward: whether gradients go through the model.

    Raises:
        ModelError: naming the method, when its package or device is missing or it has no backward pass.
    """
    settings, method = own_quantisation(config), quantisation_method(config)
    if settings is None:
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # A copy: the check below turns on dequantising in what it is given where the device lacks the kernels.
        quantiser = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        quantiser.validate_environment(device_map=None, weights_only=True)
        trainable = bool(quantiser.is_trainable) and method not in INFERENCE_ONLY
        missing = method in INFERENCE_ONLY and not quantiser.quantization_config.dequantize
        if missing and not is_kernels_available():
            raise ImportError("its kernels need the package kernels")
    except Exception as error:  # each method has its own ways to say that something is missing
        raise ModelError(
            f"{path} is quantised ({method}) and cannot be loaded here: {one_line(error)}; pass weights in bf16, "
            "fp16 or fp32"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if backward and not trainable:
        raise ModelError(
            f"{path} is quantised ({method}), and gradients cannot go back through {method} to the mapping: train with "
            "its weights in bf16, fp16 or fp32"
        )
