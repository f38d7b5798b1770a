"""Files of a model folder or a hub name: found, read and checked before weights load.

What a file cannot give is said in one line, from small files and the headers of large ones.
"""

import json
import os
import stat
import zipfile
from pathlib import Path

from safetensors import safe_open
from transformers.utils import cached_file

from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.files import ENDLESS, model_path, what_is

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A clone without Git LFS leaves three lines in the place of each large file.
LFS_START = b"version https://git-lfs.github.com/spec/"


class ModelError(UserError):
    """A model or mapping that cannot be used as asked; the message is one line."""


def hub_advice(name: str, error: BaseException) -> str | None:
    """Says what to do about a hub name whose files cannot be fetched; None for another kind of error."""
    from huggingface_hub import constants, errors

    # transformers raises an error of its own around the hub's: the reason stands somewhere behind it.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    statuses = {getattr(getattr(one, "response", None), "status_code", None) for one in chain}
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    # First, since a gated model is a kind of model that is not found in the hub's library.
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
        # Before opening: a pipe would be waited for.
        if (found := what_is(file)) in ENDLESS:
            raise ModelError(f"{file} is {found}: a file is expected there")
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
    # RecursionError: a hostile file may nest brackets deeper than the parser goes.
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON, it may be cut short: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, it holds {json.dumps(values)[:40]}")
    return values


def is_folder(path: str) -> bool:
    """Returns whether a path is a folder.

    Raises:
        ModelError: when that cannot be told, for lack of a permission.
    """
    # os.path.isdir says no where it may not look, and the path would be asked of the hub.
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except OSError:
        return False


def find_file(path: str, name: str) -> Path | None:
    """Finds a file of a model folder or a hub name, which is fetched when the local cache lacks it; None without it."""
    if is_folder(path):
        file = Path(path) / name
        return file if os.path.lexists(file) else None  # a dangling link too: opening it names it
    # Many folders lack generation_config.json or a tokenizer's config: that is an answer, not an error.
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
    if is_folder(model_path(path)):
        for file in weight_files(path, config, must_exist):
            _check_weight_file(file)


def weight_files(path: str, config, must_exist: bool = True) -> list[Path]:
    """Finds the files of a model folder that its weights are read from, of a sharded one all shards.

    Args:
        config: the folder's, which may name a weight file of its own.

    Raises:
        ModelError: naming what is missing.
    """
    folder = Path(model_path(path))
    own = getattr(config, "transformers_weights", None)
    names = (own,) if own else WEIGHT_FILES
    source = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    if source is None:
        if must_exist:
            raise ModelError(f"{folder} holds no weights: expected one of {', '.join(names)}")
        return []
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
    return files


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
    """Returns whether a file that torch saved is a zip file and not the older pickle, by how it begins.

    Raises:
        ModelError: when it begins as neither and is not empty.
    """
    with open(file, "rb") as content:
        start = content.read(2)
    # 0x80 begins a pickle of protocol 2 and later, which torch wrote before version 1.6.
    if start and start != b"PK" and start[0] != 0x80:
        raise ModelError(f"{file} is not a file that torch saved, it begins with {start!r}: fetch it again")
    return start == b"PK"
