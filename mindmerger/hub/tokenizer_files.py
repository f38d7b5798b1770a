"""Tokenizers of model folders, and the special tokens of an LLM: what goes before a text and what ends it."""

import os
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mindmerger.hub.model_configs import llm_config, refuse_own_code
from mindmerger.hub.model_files import (
    ModelError,
    find_file,
    hub_advice,
    is_folder,
    read_json_object,
    refuse_unreadable,
)
from mindmerger.runtime.errors import one_line
from mindmerger.runtime.files import model_path

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, "vocab.txt", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json",)


def load_tokenizer(path: str):
    """Loads the tokenizer of a model folder or hub name.

    Raises:
        ModelError: when there is none, or it is damaged.
    """
    path = model_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the libraries raise nearly every type here, the Rust one bare Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        try:
            # Only once loading has failed, since the check parses every file a second time.
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
                refuse_own_code(path, values, needed=True)
            if file.name == "tokenizer.json":
                try:
                    Tokenizer.from_file(str(file))
                except Exception as error:  # its own bare type
                    raise ModelError(f"{file} is not a tokenizer: {one_line(error)}") from error
    vocabularies = (*VOCABULARY_FILES, "vocab.txt")
    if files and not any(os.path.lexists(file) for file in files if file.name in vocabularies):
        raise ModelError(f"it holds none of {', '.join(vocabularies)}")


def special_token_ids(llm_path: str, config) -> tuple[int | None, int | None]:
    """Returns BOS and EOS of an LLM's tokenizer; without a tokenizer in the folder, the config's BOS and None.

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
    """Returns an `eos_token_id` as a list; `where` is the file or the folder that an error names."""
    found = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    # True is an int in Python, and would end a text at id 1.
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise ModelError(f"{where}: eos_token_id must be a number or a list of numbers, not {str(ids)[:80]}")
    return list(found)


def end_token_ids(path: str, configured: list, tokenizer_eos: int | None) -> list[int]:
    """Returns every id that ends a generation: those of the configs, of which an instruction-tuned LLM may have
    several, and the tokenizer's, in which the targets of the training end.

    Args:
        configured: the `eos_token_id` of every config, each None, a number or a list of numbers.

    Raises:
        ModelError: when there is none, or one is not a number.
    """
    found = list(dict.fromkeys(one for ids in (*configured, tokenizer_eos) for one in _end_tokens(path, ids)))
    # Old configs say -1 for none.
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
