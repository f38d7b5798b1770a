"""Model folders read and written block by block, so that merging needs no more memory for a larger model.

`open_model` checks a folder against its own `config.json` and reads nothing but headers. `check_compatible` refuses
experts that do not fit each other. `write_merged` asks for one block of rows at a time, streams the blocks into
safetensors shards, and leaves either a complete folder or nothing.

Vocabulary rows may differ by added tokens. *(ours)*: the task expert's tokenizer and row count are kept, rows that all
models have are merged, rows beyond them are the task expert's.
"""

import glob
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import runtime_utils
from checkpoint_utils import sync_folder
from model_files import refuse_unreadable
from runtime_utils import UserError, versions, warn, write_json_atomic

BLOCK_ELEMENTS = 1 << 22  # 16 MiB in fp32: large enough for the disk, small enough to hold a dozen at once
# Pages of a memory-mapped file stay in the process until it is unmapped: a file is reopened after this many bytes.
REOPEN_BYTES = 1 << 26
MARGIN_BYTES = 1 << 24  # what tokenizer, configs and file system take besides the weights
MERGE_FILE = "merge.json"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}
WEIGHT_FILES = ("model.safetensors", INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
READ_ERRORS = (OSError, SafetensorError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
PROJECTION = re.compile(rf"(?:self_attn|mlp)\.({'|'.join(KINDS)})_proj\.(weight|bias)")
OUTER_KINDS = {"model.embed_tokens": "embeddings", "model.norm": "norm", "lm_head": "head"}

# Settings of config.json that decide what a weight means: experts must agree on them.
SAME_SETTINGS = {
    "model_type": "architecture",
    "num_hidden_layers": "number of layers",
    "hidden_size": "hidden width",
    "intermediate_size": "MLP width",
    "num_attention_heads": "number of attention heads",
    "num_key_value_heads": "number of key-value heads",
    "head_dim": "head width",
    "hidden_act": "activation",
    "rope_parameters": "rope settings",
    "tie_word_embeddings": "tie_word_embeddings",
}
# Settings that the task expert's config decides for the merged model; the other one's weights were tuned with its own.
WARNED_SETTINGS = ("rms_norm_eps", "sliding_window")


class MergeError(UserError):
    """Models that cannot be merged as asked; the message is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Place:
    """What a tensor is: its layer (None outside the layers) and its kind.

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
        """Rows `start` to `stop` of a tensor in its stored dtype. Use the block and let it go: it may map the file.

        Raises:
            MergeError: when the file cannot be read.
        """
        stored = self.tensors[name]
        if self._open is None or self._open[0] != stored.file or self._bytes_read > REOPEN_BYTES:
            self._open = (stored.file, _open_weights(stored.file))
            self._bytes_read = 0
        try:
            block = _entry(self._open[1], name)[start:stop]
        except READ_ERRORS as error:
            raise MergeError(f"cannot read {name} from {stored.file}: {_first_line(error)}") from error
        self._bytes_read += block.numel() * block.element_size()
        return block

    def weight_files(self) -> list[Path]:
        """The files that hold tensors, sorted by name."""
        return sorted({stored.file for stored in self.tensors.values()})

    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in self.tensors.values())


def open_model(role: str, path: str) -> ModelFolder:
    """Opens a model folder and checks that every parameter its `config.json` calls for is stored with the right shape.

    Arguments:
        role: what messages call it, for instance "math expert".
        path: a folder, or a hub name whose files are in the local cache already.

    Raises:
        MergeError: for a missing folder, file or tensor, a wrong shape, quantised weights, or an adapter.
    """
    from modeling_mindmerger import load_config

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
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise MergeError(
                f"{role} {folder}: {name} is stored with shape {found[name].shape}, its config.json says {shape}"
            )
    model = ModelFolder(role, folder, config, {name: found[name] for name in expected})
    _check_surplus(model, {name: stored for name, stored in found.items() if name not in expected})
    return model


def _resolve(role: str, path: str) -> Path:
    path = path.rstrip("/") or "/"
    folder = Path(path).expanduser()
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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # A tied head is no parameter of its own and is left out here.
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _locate(role: str, folder: Path) -> dict[str, Stored]:
    """Every tensor that a folder's weight files hold, from their headers."""
    source = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if source is None:
        raise MergeError(f"{role} {folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    names_of: dict[str, list[str]] = {}
    if source.endswith(".index.json"):
        try:
            weight_map = json.loads((folder / source).read_text(encoding="utf-8"))["weight_map"]
            for name, file in weight_map.items():
                names_of.setdefault(file, []).append(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise MergeError(f"{folder / source} cannot be read: {_first_line(error)}") from error
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
    for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
        entry = _entry(handle, name)
        if not hasattr(entry, "get_shape") and not isinstance(entry, torch.Tensor):
            raise MergeError(f"{file}: {name} is no tensor; expected a plain state dict of a whole model")
        safe = hasattr(entry, "get_shape")
        shape = tuple(entry.get_shape() if safe else entry.shape)
        dtype = DTYPE_CODES.get(entry.get_dtype()) if safe else entry.dtype
        if dtype not in CODE_OF and not name.endswith("rotary_emb.inv_freq"):
            raise MergeError(f"{file}: {name} is neither fp32, fp16 nor bf16: quantised weights cannot be merged")
        header[name] = Stored(file, shape, dtype)
    return header


def _open_weights(file: Path):
    refuse_unreadable(file)
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except READ_ERRORS as error:
        raise MergeError(f"{file} cannot be read without running code or is cut short: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} holds a {type(content).__name__}, expected a state dict")
    return content


def _entry(handle, name: str):
    return handle[name] if isinstance(handle, dict) else handle.get_slice(name)


def _check_surplus(model: ModelFolder, surplus: dict[str, Stored]) -> None:
    """Stored tensors that the architecture does not have: harmless buffers, a copy of a tied head, or a warning."""
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if head in surplus and model.config.tie_word_embeddings:
        stored = surplus.pop(head)
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
    """Row ranges that cover `start` to `stop` (default: all rows), each of at most `BLOCK_ELEMENTS` scalars."""
    stop = shape[0] if stop is None else stop
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Do they fit each other


def check_compatible(task: ModelFolder, others: list[ModelFolder]) -> dict[str, int]:
    """Makes sure that every model can be merged with the task expert.

    Returns the number of rows of each tensor that all models have; it is below the task expert's own only where
    vocabularies differ by added tokens.

    Raises:
        MergeError: naming both models and both values.
    """
    for other in others:
        for setting, meaning in SAME_SETTINGS.items():
            values = [_setting(model.config, setting) for model in (task, other)]
            if values[0] != values[1]:
                raise MergeError(
                    f"different {meaning}: {task} has {values[0]}, {other} has {values[1]}; only experts tuned from "
                    "the same base can be merged"
                )
        for setting in WARNED_SETTINGS:
            values = [getattr(model.config, setting, None) for model in (task, other)]
            if values[0] != values[1]:
                warn(f"{task} has {setting} {values[0]}, {other} has {values[1]}: the former's is kept")
        if task.tensors.keys() != other.tensors.keys():
            name = min(task.tensors.keys() ^ other.tensors.keys())
            holder, lacking = (task, other) if name in task.tensors else (other, task)
            raise MergeError(f"{holder} has a tensor {name}, {lacking} has none")
        _check_shapes(task, other)
        _check_vocabulary(task, other)
    for name in task.tensors:
        place_of(name)
    return {name: min(model.tensors[name].shape[0] for model in (task, *others)) for name in task.tensors}


def _setting(config, name: str):
    value = getattr(config, name, None)
    if name == "head_dim" and value is None:
        value = config.hidden_size // config.num_attention_heads
    if name == "num_key_value_heads" and value is None:
        value = config.num_attention_heads
    return value


def _check_shapes(task: ModelFolder, other: ModelFolder) -> None:
    for name, stored in task.tensors.items():
        shapes = stored.shape, other.tensors[name].shape
        if place_of(name).kind in ("embeddings", "head"):
            shapes = shapes[0][1:], shapes[1][1:]
        if shapes[0] != shapes[1]:
            raise MergeError(f"different shapes of {name}: {task} has {shapes[0]}, {other} has {shapes[1]}")


def _check_vocabulary(task: ModelFolder, other: ModelFolder) -> None:
    """Refuses vocabularies in which one id means two tokens; added tokens, which users name freely, only warn."""
    for name in VOCABULARY_FILES:
        files = [model.path / name for model in (task, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
            return
    vocabularies = [_vocabulary(model) for model in (task, other)]
    if None in vocabularies:
        return
    (tokens, added), (other_tokens, other_added) = vocabularies
    rows = min(model.tensors["model.embed_tokens.weight"].shape[0] for model in (task, other))
    different = sorted(i for i in tokens.keys() & other_tokens.keys() if i < rows and tokens[i] != other_tokens[i])
    if not different:
        return
    serious = [i for i in different if not (i in added and i in other_added)]
    i = (serious or different)[0]
    message = (
        f"{len(different)} token ids mean different tokens: {i} is {tokens[i]!r} in {task}, {other_tokens[i]!r} in "
        f"{other}"
    )
    if serious:
        raise MergeError(f"{message}; only experts with the same base vocabulary can be merged")
    warn(f"{message}; their embedding rows are merged all the same")


def _vocabulary(model: ModelFolder) -> tuple[dict[int, str], set[int]] | None:
    """Token of each id, and the ids of added tokens; None for a folder without a tokenizer."""
    from model_files import ModelError, load_tokenizer

    if not any((model.path / name).is_file() for name in VOCABULARY_FILES):
        return None
    try:
        tokenizer = load_tokenizer(model.path)
    except ModelError as error:
        raise MergeError(f"{model.role}: {error}") from error
    return {i: token for token, i in tokenizer.get_vocab().items()}, set(tokenizer.added_tokens_decoder)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def check_output(output: str, overwrite: bool, inputs: list[str], marker: str = MERGE_FILE) -> Path:
    """Makes sure that `output` may be written, before anything is read.

    Arguments:
        inputs: paths of the models that are read.
        marker: the file that shows that a folder is an earlier result of ours, which `overwrite` may replace.

    Raises:
        MergeError: when it exists and must stay.
    """
    path = Path(output).expanduser().resolve()
    for one in inputs:
        source = Path(one).expanduser().resolve()
        if path == source or path in source.parents:
            raise MergeError(f"--output {output} would replace the input {one}: choose another folder")
    if not os.path.lexists(path):
        return path
    if not path.is_dir():
        raise MergeError(f"--output {output} is a file: choose a folder that does not exist")
    if not any(path.iterdir()):
        return path
    if not (path / marker).is_file():
        raise MergeError(
            f"--output {output} exists and holds no {marker}, so it is not ours to replace: choose another"
        )
    if not overwrite:
        raise MergeError(f"--output {output} exists: choose another folder, or --overwrite to replace it")
    return path


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `output` that takes its place when the block ends well.

    When it does not (an error, Ctrl-C, SIGTERM), nothing new is left behind and an older `output` is untouched.

    Raises:
        MergeError: when the disk refuses to write, naming the folder.
    """
    created = [folder for folder in reversed(output.parents) if not folder.exists()]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.old")
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        warn(f"{left} is what a killed merge left behind; remove it unless another one is running")
    done = moved = False
    try:
        with _sigterm_as_exit():
            temporary.mkdir(parents=True)
            yield temporary
            sync_folder(temporary)
            if output.exists():
                os.replace(output, replaced)
                moved = True
            os.replace(temporary, output)
            done = True
            sync_folder(output.parent)
    except OSError as error:
        raise MergeError(f"cannot write {output}: {error.strerror or error}; nothing is left behind") from error
    finally:
        if moved and not done:
            os.replace(replaced, output)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in [] if done else reversed(created):
            with suppress(OSError):  # someone else has put something into it meanwhile
                folder.rmdir()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """A job scheduler's SIGTERM ends Python without clean-up unless it becomes an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum, _):
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_merged(
    output: Path,
    task: ModelFolder,
    inputs: list[ModelFolder],
    common_rows: dict[str, int],
    combine: Callable[[str, int, int], torch.Tensor],
    record: dict,
    *,
    dtype: str = "auto",
    max_shard_gb: float = 5.0,
) -> None:
    """Writes the merged model folder: config, tokenizer and generation config of the task expert, shards, merge.json.

    Arguments:
        output: as `check_output` returned it.
        inputs: every model that was read, the task expert included; their files' sha256 go into merge.json.
        common_rows: from `check_compatible`; rows beyond are copied from the task expert.
        combine: gives rows start to stop of a tensor, in its stored dtype (written as it is where that is the output's
            dtype) or in fp32 (cast once).
        record: what merge.json says of the method: its name, formula, arguments and plan.
        dtype: "auto" keeps the task expert's dtype of each tensor.

    Raises:
        MergeError: too little disk, an unreadable input, a value that the output's dtype cannot hold; nothing is left.
    """
    layout, total = plan_output(output, task, dtype)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        shape, wanted = layout[name]
        for rows in row_blocks(shape, 0, common_rows[name]):
            yield _cast(combine(name, *rows), wanted, name)
        for rows in row_blocks(shape, common_rows[name]):
            yield _cast(task.read(name, *rows), wanted, name)

    with new_folder(output) as folder:
        checksums = _describe_inputs(inputs)
        outputs, weight_map = {}, {}
        with progress_bar(total, "writing") as bar:
            for file, names in plan_shards(layout, int(max_shard_gb * 10**9)).items():
                outputs[file] = _write_shard(folder / file, {name: layout[name] for name in names}, blocks, bar)
                weight_map |= dict.fromkeys(names, file)
        write_json_atomic(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _copy_settings(task.path, folder, dtype)
        dtypes = sorted({str(wanted).removeprefix("torch.") for _, wanted in layout.values()})
        write_json_atomic(
            folder / MERGE_FILE,
            {
                **record,
                "command": sys.argv,
                "inputs": checksums,
                "outputs": outputs,
                "dtype": {"arithmetic": "float32", "stored": ", ".join(dtypes)},
                "versions": versions(),
            },
        )


def plan_output(output: Path, task: ModelFolder, dtype: str) -> tuple[dict, int]:
    """Shape and dtype of every tensor that will be written, and their bytes; call it before anything slow.

    Raises:
        MergeError: when the disk has no room for them.
    """
    fixed = None if dtype == "auto" else getattr(torch, dtype)
    layout = {name: (stored.shape, fixed or stored.dtype) for name, stored in task.tensors.items()}
    total = sum(_size(*entry) for entry in layout.values())
    there = next(folder for folder in output.parents if folder.exists())
    free, needed = shutil.disk_usage(there).free, total + MARGIN_BYTES
    if free < needed:
        raise MergeError(
            f"--output {output} needs {needed / 10**9:.2f} GB, but {there} has {free / 10**9:.2f} GB free: make room, "
            "or choose another disk"
        )
    return layout, total


def plan_shards(layout: dict[str, tuple[tuple[int, ...], torch.dtype]], max_bytes: int) -> dict[str, list[str]]:
    """Deals tensors, in order, into files of at most `max_bytes` of tensor data; a larger tensor gets its own file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, entry in layout.items():
        if groups[-1] and filled + _size(*entry) > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _size(*entry)
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _cast(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if block.dtype == dtype:
        return block
    cast = block.to(dtype)
    # The extremes are one fast look; only values beyond the dtype's largest can have become infinite.
    if torch.stack(block.aminmax()).abs().max() > torch.finfo(dtype).max:
        lost = cast.isinf() & block.isfinite()
        if lost.any():
            value, kind = block[lost][0].item(), str(dtype).removeprefix("torch.")
            raise MergeError(f"{name} has a value of {value:.4g}, which {kind} cannot hold: pass --dtype float32")
    return cast


def _write_shard(path: Path, layout: dict, blocks: Callable[[str], Iterator[torch.Tensor]], bar) -> dict:
    """Streams tensors into one safetensors file; returns its bytes and sha256.

    The library's own writer wants all tensors of a file in memory. The format (huggingface/safetensors, README,
    "Format"): a little-endian uint64 with the length of a JSON header, the header, the tensors' bytes without gaps.
    """
    # Wider dtypes first keeps every tensor aligned to its item size, as the library does.
    ordered = sorted(layout, key=lambda name: -layout[name][1].itemsize)
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        shape, dtype = layout[name]
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": CODE_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    written = 0
    with open(path, "wb") as file:

        def put(data) -> None:
            nonlocal written
            file.write(data)
            digest.update(data)
            written += len(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in ordered:
            for block in blocks(name):
                data = block.contiguous().view(torch.uint8).numpy().reshape(-1).data
                put(data)
                bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
    if written != 8 + len(text) + end:
        raise RuntimeError(f"{path.name}: wrote {written} bytes, planned {8 + len(text) + end}")
    return {"bytes": written, "sha256": digest.hexdigest()}


def _describe_inputs(models: list[ModelFolder]) -> dict[str, dict]:
    """Path, bytes and sha256 of every file that the merge depends on, by role."""
    files = {model.role: [model.path / "config.json", *model.weight_files()] for model in models}
    total = sum(file.stat().st_size for group in files.values() for file in group)
    described = {}
    with progress_bar(total, "checksums of the inputs") as bar:
        for model in models:
            entries = {}
            for file in files[model.role]:
                digest = hashlib.sha256()
                with open(file, "rb") as stream:
                    while data := stream.read(1 << 20):
                        digest.update(data)
                        bar.update(len(data))
                entries[file.name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
            described[model.role] = {"path": str(model.path), "files": entries}
    return described


def _copy_settings(source: Path, target: Path, dtype: str) -> None:
    """Config, tokenizer, generation config and licence texts, as they are but for a changed dtype."""
    names = [name for name in COPIED_FILES if (source / name).is_file()]
    names += [file.name for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*") for file in source.glob(pattern)]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if dtype == "auto":
        shutil.copyfile(source / "config.json", target / "config.json")
        return
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's older name
    config["dtype"] = dtype
    write_json_atomic(target / "config.json", config)


def progress_bar(total_bytes: int, what: str):
    """A bar over bytes on standard error."""
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1000, "dynamic_ncols": True}
    return runtime_utils.progress_bar(total=total_bytes, desc=what, **options)
