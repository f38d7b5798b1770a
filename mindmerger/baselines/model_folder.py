"""Model folders read block by block, so that merging needs no more memory for a larger model.

`open_model` checks a folder against its own `config.json` and reads nothing but headers.

Vocabulary rows may differ by added tokens. *(ours)*: the task expert's tokenizer and row count are kept, rows that all
models have are merged, rows beyond them are the task expert's.
"""

import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mindmerger.hub.model_files import WEIGHT_FILES, begins_as_zip, refuse_unreadable
from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.files import model_path
from mindmerger.runtime.processes import warn

BLOCK_ELEMENTS = 1 << 22  # 16 MiB in fp32: large enough for the disk, small enough to hold a dozen at once
# Pages of a memory-mapped file stay in the process until it is unmapped: a file is reopened after this many bytes.
REOPEN_BYTES = 1 << 26


MERGE_FILE = "merge.json"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}
READ_ERRORS = (OSError, SafetensorError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
PROJECTION = re.compile(rf"(?:self_attn|mlp)\.({'|'.join(KINDS)})_proj\.(weight|bias)")
OUTER_KINDS = {"model.embed_tokens": "embeddings", "model.norm": "norm", "lm_head": "head"}


class MergeError(UserError):
    """Models that cannot be merged as asked; the message is one line."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Place:
    """Place of a tensor in the model: its layer (None outside the layers) and its kind.

    Kinds: q, k, v, o, gate, up, down (weights and biases), norm, embeddings, head, other.
    """

    layer: int | None
    kind: str


def place_of(name: str) -> Place:
    """Reads layer and kind from a parameter's name, as Llama, Mistral and Qwen2 name theirs.

    Raises:
        MergeError: for a name of another scheme.
    """
    if match := LAYER_NAME.fullmatch(name):
        projection = PROJECTION.fullmatch(match[2])
        other = "norm" if "norm" in match[2] else "other"
        return Place(int(match[1]), projection[1] if projection else other)
    stem = name.rpartition(".")[0]
    if stem in OUTER_KINDS:
        return Place(None, OUTER_KINDS[stem])
    raise MergeError(
        f"cannot tell which layer tensor {name} belongs to: merging knows Llama, Mistral, Qwen2 and architectures with "
        "the same parameter names"
    )


class ModelFolder:
    """A model folder whose tensors are read a block of rows at a time; build it with `open_model`.

    `tensors` maps every parameter of the architecture, in its order, to where it is stored.
    """

    def __init__(self, role: str, path: Path, config, tensors: dict[str, Stored]):
        self.role = role
        self.path = path
        self.config = config
        self.tensors = tensors
        self._open: tuple[Path, object] | None = None
        self._bytes_read = 0

    def __str__(self) -> str:
        return f"{self.role} {self.path}"

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Reads rows `start` to `stop` of a tensor in its stored dtype. Use the block and let it go: it may map a file.

        Raises:
            MergeError: when the file cannot be read.
        """
        stored = self.tensors[name]
        # One file is open at a time: tensors are asked for in the architecture's order, which is nearly the shards'.
        if self._open is None or self._open[0] != stored.file or self._bytes_read > REOPEN_BYTES:
            self._open = (stored.file, _open_weights(stored.file))
            self._bytes_read = 0
        try:
            block = _entry(self._open[1], name)[start:stop]
        except READ_ERRORS as error:
            raise MergeError(f"cannot read {name} from {stored.file}: {one_line(error)}") from error
        self._bytes_read += block.numel() * block.element_size()
        return block

    def weight_files(self) -> list[Path]:
        """Returns the files that hold tensors, sorted by name."""
        return sorted({stored.file for stored in self.tensors.values()})

    def weight_bytes(self) -> int:
        """Returns the bytes of all tensors."""
        return sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in self.tensors.values())


def open_model(role: str, path: str) -> ModelFolder:
    """Opens a model folder and checks that every parameter its `config.json` calls for is stored with the right shape.

    Args:
        role: what messages call it, for instance "math expert".
        path: a folder, or a hub name whose files are in the local cache already.

    Raises:
        MergeError: for a missing folder, file or tensor, a wrong shape, quantised weights, or an adapter.
    """
    from mindmerger.hub.model_configs import load_config

    folder = _resolve(role, path)
    config = load_config(str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(f"{role} {folder} holds quantised weights: merging needs them in fp32, fp16 or bf16")
    expected = _expected_shapes(role, folder, config)
    found = _locate(role, folder)
    absent = [name for name in expected if name not in found]
    if absent:
        raise MergeError(
            f"{role} {folder} lacks {len(absent)} of the {len(expected)} tensors of its config.json (first: "
            f"{absent[0]}): its weight files are incomplete or belong to another architecture"
        )
    # Now, from headers: a wrong shape met while merging would cost the minutes until then.
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise MergeError(
                f"{role} {folder}: {name} is stored with shape {found[name].shape}, its config.json says {shape}"
            )
    model = ModelFolder(role, folder, config, {name: found[name] for name in expected})
    _check_surplus(model, {name: stored for name, stored in found.items() if name not in expected})
    return model


def _resolve(role: str, path: str) -> Path:
    path = model_path(path)
    folder = Path(path).expanduser()
    # Only the local cache: a typing error must not become a download of 14 GB.
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise MergeError(
                f"no {role} {path}: neither a folder here nor in the local hub cache; fetch it with: hf download {path}"
            ) from error
    if not folder.is_dir():
        raise MergeError(f"no {role} {path}: pass an existing model folder")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise MergeError(f"{role} {folder} is an adapter, not a whole model: merge it into its base model first")
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise MergeError(f"{role} {folder} holds no config.json (it holds: {there}): pass a model folder")
    return folder


def _expected_shapes(role: str, folder: Path, config) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise MergeError(f"{role} {folder} is a {config.model_type} model, not a causal language model")
    with torch.device("meta"):  # shapes alone: no memory, whatever the model's size
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # A tied head is not a parameter of its own and is left out here.
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _locate(role: str, folder: Path) -> dict[str, Stored]:
    """Finds every tensor that a folder's weight files hold, from their headers."""
    # In the order in which transformers looks for them: what is merged is what would be loaded.
    source = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if source is None:
        raise MergeError(f"{role} {folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    # Headers are read once per file, which may hold hundreds of tensors.
    names_of: dict[str, list[str]] = {}
    if source.endswith(".index.json"):
        try:
            weight_map = json.loads((folder / source).read_text(encoding="utf-8"))["weight_map"]
            for name, file in weight_map.items():
                names_of.setdefault(file, []).append(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise MergeError(f"{folder / source} cannot be read: {one_line(error)}") from error
        missing = sorted(file for file in names_of if not (folder / file).is_file())
        if missing:
            raise MergeError(
                f"{role} {folder} lacks {len(missing)} of its {len(names_of)} weight files (first: {missing[0]}): "
                "fetch the folder again"
            )
    else:
        names_of[source] = []
    found = {}
    for file, names in sorted(names_of.items()):
        header = _read_header(folder / file)
        unknown = [name for name in names if name not in header]
        if unknown:
            raise MergeError(f"{folder / file} lacks {unknown[0]}, which {source} says it holds")
        # An index decides where a tensor is; a file may hold more than the index gives to it.
        found.update({name: header[name] for name in (names or header)})
    return found


def _read_header(file: Path) -> dict[str, Stored]:
    handle = _open_weights(file)
    header = {}
    for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
        entry = _entry(handle, name)
        if not hasattr(entry, "get_shape") and not isinstance(entry, torch.Tensor):
            raise MergeError(f"{file}: {name} is not a tensor; expected a plain state dict of a whole model")
        safe = hasattr(entry, "get_shape")
        shape = tuple(entry.get_shape() if safe else entry.shape)
        dtype = DTYPE_CODES.get(entry.get_dtype()) if safe else entry.dtype
        # Said from the headers: a quantised weight would come out of the merge as numbers that mean nothing.
        if dtype not in CODE_OF and not name.endswith("rotary_emb.inv_freq"):
            raise MergeError(f"{file}: {name} is neither fp32, fp16 nor bf16: quantised weights cannot be merged")
        header[name] = Stored(file, shape, dtype)
    return header


def _open_weights(file: Path):
    refuse_unreadable(file)
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        begins_as_zip(file)
        # mmap: otherwise the whole shard, gigabytes of it, would be in memory for one tensor.
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except READ_ERRORS as error:
        raise MergeError(f"{file} cannot be read without running code or is cut short: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} holds a {type(content).__name__}, expected a state dict")
    return content


def _entry(handle, name: str):
    return handle[name] if isinstance(handle, dict) else handle.get_slice(name)


def _check_surplus(model: ModelFolder, surplus: dict[str, Stored]) -> None:
    """Checks stored tensors that the architecture lacks: harmless buffers, a copy of a tied head, or a warning."""
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if head in surplus and model.config.tie_word_embeddings:
        stored = surplus.pop(head)
        # transformers drops the stored head of a tied model without a word; where it differs, a merge of what it would
        # load and one of what is stored are two models.
        twin = ModelFolder(model.role, model.path, model.config, {head: stored, embeddings: model.tensors[embeddings]})
        same = stored.shape == model.tensors[embeddings].shape and all(
            torch.equal(twin.read(head, *rows), twin.read(embeddings, *rows)) for rows in row_blocks(stored.shape)
        )
        if not same:
            raise MergeError(
                f"{model} says tie_word_embeddings but stores a {head} that differs from {embeddings}: correct its "
                "config.json or its weights"
            )
    # Old Llama checkpoints carry this buffer; it is computed from the config.
    names = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]
    if names:
        warn(f"{model} stores {len(names)} tensors its architecture does not have, left out (first: {names[0]})")


def row_blocks(shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields row ranges that cover `start` to `stop` (default: all rows), each of at most `BLOCK_ELEMENTS` scalars."""
    stop = shape[0] if stop is None else stop
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)
