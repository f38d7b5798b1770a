"""Model folders before their weights load: whole files, a class that can be used, tokens that have rows.

What a folder cannot do is said here in one line, from its small files and the headers of its large ones. Code that a
folder brings along is never run: nothing in this project passes anything but `trust_remote_code=False`.
"""

import copy
import inspect
import json
import os
import stat
import zipfile
from pathlib import Path

from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file, is_kernels_available, logging

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, "vocab.txt", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json",)
LFS_START = b"version https://git-lfs.github.com/spec/"
# Names of a language model's weights inside a multimodal one, as its files have had them, to those of its own class.
TEXT_WEIGHTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
# Methods that have a backward pass in some of the supported versions of transformers only.
INFERENCE_ONLY = ("fp8", "mxfp8")


class ModelError(UserError):
    """A model or mapping that cannot be used as asked; the message is one line."""


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 300 characters, its type where it has none or is a bare key."""
    prefix = "KeyError: " if isinstance(error, KeyError) else ""
    message = prefix + (" ".join(str(error).split()) or type(error).__name__)
    return message if len(message) <= 300 else message[:297] + "..."


def hub_advice(name: str, error: BaseException) -> str | None:
    """Says what to do about a hub name whose files cannot be fetched; None for another kind of error."""
    from huggingface_hub import constants, errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    statuses = {getattr(getattr(one, "response", None), "status_code", None) for one in chain}
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return f"it is gated: accept its licence at https://huggingface.co/{name}, then {log_in}"
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return f"the hub shows no such model: check the name, and for a private model {log_in}"
    if statuses & {401, 403}:
        return f"the hub refuses access (HTTP {max(statuses & {401, 403})}): {log_in}, with a token that may read it"
    if not any(isinstance(one, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) for one in chain):
        return None
    fetch = f"fetch it where there is network with 'hf download {name}' and keep that cache (HF_HOME)"
    lacking = f"the cache {constants.HF_HUB_CACHE} lacks it"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set and {lacking}: {fetch}, or unset HF_HUB_OFFLINE"
    return f"the hub cannot be reached and {lacking}: {fetch}; HF_HUB_OFFLINE=1 then asks the hub for nothing"


def refuse_unreadable(file) -> None:
    """Makes sure that a file can be opened and is not what Git LFS leaves in the place of a large file.

    Raises:
        ModelError: naming the file and the cause.
    """
    try:
        with open(file, "rb") as content:
            start = content.read(len(LFS_START))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    if start == LFS_START:
        raise ModelError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in its folder")


def read_json_object(file) -> dict:
    """Reads a JSON file that must hold an object.

    Raises:
        ModelError: naming the file, when it cannot be read, is not JSON or holds something else.
    """
    refuse_unreadable(file)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON, it may be cut short: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, it holds {json.dumps(values)[:40]}")
    return values


def is_folder(path: str) -> bool:
    """Whether a path is a folder.

    Raises:
        ModelError: when that cannot be told, for lack of a permission.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except OSError:
        return False


def find_file(path: str, name: str) -> Path | None:
    """A file of a model folder, or of a hub name's (fetched when it is not in the local cache); None without it."""
    if is_folder(path):
        file = Path(path) / name
        return file if os.path.lexists(file) else None
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found is not None else None


def check_weights(path: str, config, must_exist: bool = True) -> None:
    """Makes sure that a model folder's weight files are there and whole, as far as their headers tell.

    A hub name is left alone: its files are fetched whole.

    Args:
        config: the folder's, which may name a weight file of its own.

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    folder = Path(model_path(path))
    if not is_folder(folder):
        return
    own = getattr(config, "transformers_weights", None)
    names = (own,) if own else WEIGHT_FILES
    source = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    if source is None:
        if must_exist:
            raise ModelError(f"{folder} holds no weights: expected one of {', '.join(names)}")
        return
    files = [source]
    if source.suffix == ".json":
        weight_map = read_json_object(source).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(f"{source} has no weight_map from names to files")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not os.path.lexists(file)]
        if absent:
            raise ModelError(
                f"{folder} lacks {len(absent)} of the {len(files)} weight files that {source.name} names (first: "
                f"{absent[0]}): fetch the folder again"
            )
    for file in files:
        _check_weight_file(file)


def _check_weight_file(file: Path) -> None:
    refuse_unreadable(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):  # compares the header with the file's size
                return
    except Exception as error:  # its own type and OSError
        raise ModelError(f"{file} is damaged or cut short: {one_line(error)}; fetch it again") from error
    # The directory of a zip file is at its end. Files of the older format tell only when they are read.
    if file.stat().st_size == 0 or begins_as_zip(file) and not zipfile.is_zipfile(file):
        raise ModelError(f"{file} is cut short: fetch it again")


def begins_as_zip(file) -> bool:
    """Whether a file that torch saved is a zip file and not the older pickle, by how it begins.

    Raises:
        ModelError: when it begins as neither and is not empty.
    """
    with open(file, "rb") as content:
        start = content.read(2)
    if start and start != b"PK" and start[0] != 0x80:
        raise ModelError(f"{file} is not a file that torch saved, it begins with {start!r}: fetch it again")
    return start == b"PK"


def load_config(path: str):
    """The transformers config of a model folder or hub name, without a pad id that has no embedding row.

    Raises:
        ModelError: when there is no such folder or model, or its `config.json` cannot be used.
    """
    path = model_path(path)
    if path.startswith((".", "/", "~")) and not is_folder(path):
        raise ModelError(f"no model folder {path}: pass an existing folder or a Hugging Face hub name")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the configs' own validation raises nearly every type
        file = Path(path) / "config.json"
        if os.path.lexists(file):
            values = read_json_object(file)
            if not isinstance(kind := values.get("model_type"), str | None):
                raise ModelError(f"{file}: model_type must be a text, not {json.dumps(kind)[:40]}") from error
            _refuse_own_code(path, values, kind not in CONFIG_MAPPING)
        if not is_folder(path) and (advice := hub_advice(path, error)) is not None:
            raise ModelError(f"cannot fetch {path} from the Hugging Face hub: {advice}") from error
        raise ModelError(
            f"cannot load a model config from {path}: neither a folder with a usable config.json here nor a reachable "
            f"hub name ({one_line(error)})"
        ) from error
    _ignore_unusable_pad(config)
    return config


def _refuse_own_code(path: str, values: dict, needed: bool) -> None:
    if needed and isinstance(values.get("auto_map"), dict):
        raise ModelError(
            f"{path} needs code of its own ({', '.join(sorted(values['auto_map']))} in auto_map), which is never run "
            "here: use a model whose class transformers has"
        )


def _ignore_unusable_pad(config) -> None:
    """Puts the class's default in the place of a pad id that is negative or beyond the embedding table."""
    for part in {id(one): one for one in (config, getattr(config, "text_config", None))}.values():
        rows, pad = (getattr(part, name, None) for name in ("vocab_size", "pad_token_id"))
        if isinstance(rows, int) and isinstance(pad, int) and not 0 <= pad < rows:
            default = type(part)().pad_token_id
            part.pad_token_id = default if default is not None and 0 <= default < rows else None


def embedding_rows(config) -> int | None:
    """How many rows the input embedding of a model with this config has, where the config says so."""
    return getattr(config.get_text_config(encoder=config.is_encoder_decoder or None), "vocab_size", None)


def llm_config(path: str) -> tuple[object, dict[str, str] | None]:
    """The config to load an LLM with, and the names of its weights where the files have others.

    That is the folder's own, or its text model's where the class of the whole cannot generate from embeddings.

    Raises:
        ModelError: for a model that is not a causal language model, or cannot generate from embeddings.
    """
    config, classes = load_config(path), AutoModelForCausalLM._model_mapping
    if type(config) not in classes:
        raise ModelError(f"{path} is a {config.model_type} model, not a causal language model: pass another --llm_path")
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
    text.tie_word_embeddings = config.tie_word_embeddings
    for name in ("bos_token_id", "eos_token_id", "quantization_config"):
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text, TEXT_WEIGHTS


def takes_embeddings(model_class: type) -> bool:
    """Whether a class can generate from embeddings: the signatures that transformers' `generate` looks at."""
    methods = (model_class.forward, model_class.prepare_inputs_for_generation) if model_class.can_generate() else ()
    takes = ["inputs_embeds" in inspect.signature(method).parameters for method in methods]
    return model_class.main_input_name == "input_ids" and bool(takes) and all(takes)


def reads_token_ids(config) -> bool:
    """Whether layers behind the embedding look at token ids: per-layer embeddings of Gemma 3n and 4, n-grams of
    Qwen4-Exp, hash routing of DeepSeek V4, patches of BLT. transformers leaves them out without ids, or fails."""
    names = ("hidden_size_per_layer_input", "ple_layer_ids", "patching_mode")
    return any(getattr(config, name, None) for name in names) or "hash_moe" in (
        getattr(config, "mlp_layer_types", None) or ()
    )


def check_quantisation(path: str, config, backward: bool) -> None:
    """Makes sure that a model whose weights are quantised can be used here, before they load.

    Args:
        backward: whether gradients go through the model.

    Raises:
        ModelError: naming the method, when its package or device is missing or it has no backward pass.
    """
    parts = (config, getattr(config, "text_config", None))
    settings = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else type(settings).__name__
    if isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
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


def check_models(mt_path: str | None, llm_path: str, backward: bool, must_exist: bool = True) -> None:
    """Makes sure that both model folders can be used, as far as that shows before weights and data load.

    Args:
        mt_path: the encoder; None for the LLM alone.
        backward: whether gradients go through the LLM. None go through the encoder.
        must_exist: whether the weights have to be there.

    Raises:
        ModelError: for the first thing that is wrong.
    """
    config, _ = llm_config(llm_path)
    check_quantisation(llm_path, config, backward)
    check_eos_token(llm_path)
    check_weights(llm_path, config, must_exist)
    if mt_path is not None:
        config = load_config(mt_path)
        check_quantisation(mt_path, config, backward=False)
        check_weights(mt_path, config, must_exist)


def load_tokenizer(path: str):
    """The tokenizer of a model folder or hub name.

    Raises:
        ModelError: when there is none, or it is damaged.
    """
    path = model_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the libraries raise nearly every type here, the Rust one bare Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        try:
            _check_tokenizer_files(path)
        except ModelError as cause:
            reason = str(cause)
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        if not is_folder(path):
            reason = hub_advice(path, error) or reason
        raise ModelError(f"cannot load the tokenizer of {path}: {reason}") from error
    if is_folder(path):
        names = set(tokenizer.vocab_files_names.values()) - {"tokenizer_config.json"} | set(VOCABULARY_FILES)
        there = {name for name in names if os.path.exists(Path(path) / name)}
        if not there:
            # transformers makes an empty tokenizer out of a bare config.json for some model types.
            raise ModelError(f"the folder {path} holds no tokenizer: none of {', '.join(sorted(names))}")
        # A pointer is a text of three lines, which a vocabulary may be too.
        for name in {"tokenizer.json"} if "tokenizer.json" in there else there:
            refuse_unreadable(Path(path) / name)
    return tokenizer


def _check_tokenizer_files(path: str) -> None:
    """Raises for the first file of a tokenizer that is the reason why it does not load, where one is."""
    files = [Path(path) / name for name in TOKENIZER_FILES] if is_folder(path) else []
    for file in files:
        if os.path.lexists(file):
            values = read_json_object(file) if file.suffix == ".json" else refuse_unreadable(file)
            if file.name == "tokenizer_config.json":
                _refuse_own_code(path, values, needed=True)
            if file.name == "tokenizer.json":
                try:
                    Tokenizer.from_file(str(file))
                except Exception as error:  # its own bare type
                    raise ModelError(f"{file} is not a tokenizer: {one_line(error)}") from error
    vocabularies = (*VOCABULARY_FILES, "vocab.txt")
    if files and not any(os.path.lexists(file) for file in files if file.name in vocabularies):
        raise ModelError(f"it holds none of {', '.join(vocabularies)}")


def special_token_ids(llm_path: str, config) -> tuple[int | None, int | None]:
    """BOS and EOS of an LLM's tokenizer; without a tokenizer in the folder, the config's BOS and None.

    The BOS goes before every merged sequence. (Qwen's config names one that its tokenizer does not have.)

    Raises:
        ModelError: when the tokenizer is damaged.
    """
    path = model_path(llm_path)
    for name in ("tokenizer_config.json", *VOCABULARY_FILES):
        if find_file(path, name) is not None:
            tokenizer = load_tokenizer(path)
            return tokenizer.bos_token_id, tokenizer.eos_token_id
    return config.get_text_config().bos_token_id, None


def _end_tokens(where, ids) -> list[int]:
    """An `eos_token_id` as a list; `where` is the file or the folder that an error names."""
    found = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise ModelError(f"{where}: eos_token_id must be a number or a list of numbers, not {str(ids)[:80]}")
    return list(found)


def end_token_ids(path: str, configured: list, tokenizer_eos: int | None) -> list[int]:
    """Every id that ends a generation: those of the configs, of which an instruction-tuned LLM may have several, and
    the tokenizer's, in which the targets of the training end.

    Args:
        configured: the `eos_token_id` of every config, each None, a number or a list of numbers.

    Raises:
        ModelError: when there is none, or one is not a number.
    """
    found = list(dict.fromkeys(one for ids in (*configured, tokenizer_eos) for one in _end_tokens(path, ids)))
    found = [one for one in found if one >= 0]
    if not found:
        raise ModelError(f"the LLM {path} names no end token, neither its configs nor its tokenizer: set eos_token_id")
    return found


def check_eos_token(llm_path: str) -> None:
    """Makes sure that the LLM knows what ends a text, before its weights load.

    Raises:
        ModelError: when neither its configs nor its tokenizer name an end token, or one of their files is damaged.
    """
    path = model_path(llm_path)
    file, (config, _) = find_file(path, "generation_config.json"), llm_config(path)
    own = read_json_object(file).get("eos_token_id") if file is not None else None
    _end_tokens(file, own)
    configured = [own, config.get_text_config().eos_token_id]
    named = any(one is not None for one in configured)  # a tokenizer takes its time to load
    end_token_ids(path, configured, None if named else special_token_ids(path, config)[1])
