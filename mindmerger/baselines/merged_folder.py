"""Merged folders, streamed to disk block by block and left whole or not at all."""

import glob
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mindmerger.baselines.model_folder import CODE_OF, INDEX_FILE, MERGE_FILE, MergeError, ModelFolder, row_blocks
from mindmerger.runtime import processes
from mindmerger.runtime.command import versions
from mindmerger.runtime.files import sync_folder, write_json_atomic
from mindmerger.runtime.processes import warn

MARGIN_BYTES = 1 << 24  # for tokenizer, configs and file system, besides the weights


# By name, since a model folder may hold anything else: optimizer states, logs, a second copy of the weights.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def check_output(output: str, overwrite: bool, inputs: list[str], marker: str = MERGE_FILE) -> Path:
    """Makes sure that `output` may be written, before anything is read.

    Args:
        inputs: paths of the models that are read.
        marker: the file that shows that a folder is an earlier result of ours, which `overwrite` may replace.

    Raises:
        MergeError: when it exists and must stay.
    """
    path = Path(output).expanduser().resolve()
    for one in inputs:
        source = Path(one).expanduser().resolve()
        # Above an input too: replacing the output removes everything below it.
        if path == source or path in source.parents:
            raise MergeError(f"--output {output} would replace the input {one}: choose another folder")
    if not os.path.lexists(path):
        return path
    if not path.is_dir():
        raise MergeError(f"--output {output} is a file: choose a folder that does not exist")
    if not any(path.iterdir()):
        return path
    # --overwrite removes the folder: only what an earlier merge wrote may go, whatever else the name points to.
    if not (path / marker).is_file():
        raise MergeError(
            f"--output {output} exists and holds no {marker}, so it is not ours to replace: choose another"
        )
    if not overwrite:
        raise MergeError(f"--output {output} exists: choose another folder, or --overwrite to replace it")
    return path


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Context manager: a temporary folder beside `output` that takes its place when the block ends well.

    When it does not (an error, Ctrl-C, SIGTERM), nothing new is left behind and an older `output` is untouched.

    Raises:
        MergeError: when the disk refuses to write, naming the folder.
    """
    # Ours to take away again where the merge fails.
    created = [folder for folder in reversed(output.parents) if not folder.exists()]
    # Beside the output and so on its disk: only there is a rename one step, however large the folder.
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.old")
    # Named, not removed: it may be another merge's, at work on this very output.
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        warn(f"{left} is what a killed merge left behind; remove it unless another one is running")
    done = moved = False
    try:
        with _sigterm_as_exit():
            temporary.mkdir(parents=True)
            yield temporary
            sync_folder(temporary)
            if output.exists():
                # A folder that holds something cannot be renamed over: the old one steps aside for a moment.
                os.replace(output, replaced)
                moved = True
            os.replace(temporary, output)
            done = True
            sync_folder(output.parent)
    except OSError as error:
        raise MergeError(f"cannot write {output}: {error.strerror or error}; nothing is left behind") from error
    finally:
        if moved and not done:  # stopped between the two renames: the old one comes back
            os.replace(replaced, output)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in [] if done else reversed(created):
            with suppress(OSError):  # someone else has put something into it meanwhile
                folder.rmdir()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Context manager: SIGTERM becomes an exception; as a job scheduler sends it, it ends Python without clean-up."""
    # Python lets the main thread alone set handlers; in another one, as in tests, the clean-up is the caller's.
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

    Args:
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
    layout, total = lay_out(output, task, dtype)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        shape, wanted = layout[name]
        for rows in row_blocks(shape, 0, common_rows[name]):
            yield _cast(combine(name, *rows), wanted, name)
        for rows in row_blocks(shape, common_rows[name]):
            yield _cast(task.read(name, *rows), wanted, name)

    with new_folder(output) as folder:
        # Before the slow part: an input that cannot be read to its end is found out first.
        checksums = _describe_inputs(inputs)
        outputs = _write_weights(folder, layout, total, int(max_shard_gb * 10**9), blocks)
        _copy_settings(task.path, folder, dtype)
        dtypes = sorted({str(wanted).removeprefix("torch.") for _, wanted in layout.values()})
        evidence = {
            "command": sys.argv,
            "inputs": checksums,
            "outputs": outputs,
            "dtype": {"arithmetic": "float32", "stored": ", ".join(dtypes)},
            "versions": versions(),
        }
        write_json_atomic(folder / MERGE_FILE, record | evidence)


def _write_weights(folder: Path, layout: dict, total: int, max_bytes: int, blocks) -> dict[str, dict]:
    """Writes all shards and their index; returns each shard's bytes and sha256."""
    outputs, weight_map = {}, {}
    with progress_bar(total, "writing") as bar:
        for file, names in deal_into_shards(layout, max_bytes).items():
            outputs[file] = _write_shard(folder / file, {name: layout[name] for name in names}, blocks, bar)
            weight_map |= dict.fromkeys(names, file)
    write_json_atomic(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return outputs


def lay_out(output: Path, task: ModelFolder, dtype: str) -> tuple[dict, int]:
    """Returns shape and dtype of every tensor that will be written, and their bytes; call it before anything slow.

    Raises:
        MergeError: when the disk has no room for them.
    """
    fixed = None if dtype == "auto" else getattr(torch, dtype)
    layout = {name: (stored.shape, fixed or stored.dtype) for name, stored in task.tensors.items()}
    total = sum(_size(*entry) for entry in layout.values())
    # Asked of the nearest folder that exists: the output's own comes only with the first byte.
    there = next(folder for folder in output.parents if folder.exists())
    free, needed = shutil.disk_usage(there).free, total + MARGIN_BYTES
    if free < needed:
        raise MergeError(
            f"--output {output} needs {needed / 10**9:.2f} GB, but {there} has {free / 10**9:.2f} GB free: make room, "
            "or choose another disk"
        )
    return layout, total


def deal_into_shards(layout: dict[str, tuple[tuple[int, ...], torch.dtype]], max_bytes: int) -> dict[str, list[str]]:
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

    The library's own writer needs all tensors of a file in memory. The format (huggingface/safetensors, README,
    "Format"): a little-endian uint64 with the length of a JSON header, the header, the tensors' bytes without gaps.
    """
    # Wider dtypes first keeps every tensor aligned to its item size, as the library does: a reader maps the file and
    # views its bytes in place.
    ordered = sorted(layout, key=lambda name: -layout[name][1].itemsize)
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        shape, dtype = layout[name]
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": CODE_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # or the tensors behind it would start at an odd byte
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
                # The bytes themselves: numpy has no bf16.
                data = block.contiguous().view(torch.uint8).numpy().reshape(-1).data
                put(data)
                bar.update(len(data))
        # Or the folder could be in place, under its final name, before its bytes are.
        file.flush()
        os.fsync(file.fileno())
    # The header came first: after a block of another size every tensor would be shifted, and load without an error.
    if written != 8 + len(text) + end:
        raise RuntimeError(f"{path.name}: wrote {written} bytes, expected {8 + len(text) + end}")
    return {"bytes": written, "sha256": digest.hexdigest()}


def _describe_inputs(models: list[ModelFolder]) -> dict[str, dict]:
    """Returns path, bytes and sha256 of every file that the merge depends on, by role."""
    files = {model.role: [model.path / "config.json", *model.weight_files()] for model in models}
    total = sum(file.stat().st_size for group in files.values() for file in group)
    described = {}
    with progress_bar(total, "checksums of the inputs") as bar:
        for model in models:
            entries = {}
            for file in files[model.role]:
                # In pieces, where hashlib.file_digest would do: minutes of a 70B model need a bar that moves.
                digest = hashlib.sha256()
                with open(file, "rb") as stream:
                    while data := stream.read(1 << 20):
                        digest.update(data)
                        bar.update(len(data))
                entries[file.name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
            described[model.role] = {"path": str(model.path), "files": entries}
    return described


def _copy_settings(source: Path, target: Path, dtype: str) -> None:
    """Copies config, tokenizer, generation config and licence texts, as they are but for a changed dtype."""
    names = [name for name in COPIED_FILES if (source / name).is_file()]
    names += [file.name for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*") for file in source.glob(pattern)]
    for name in names:
        if (source / name).is_file():  # NOTICE* may be a folder
            shutil.copyfile(source / name, target / name)
    if dtype == "auto":
        shutil.copyfile(source / "config.json", target / "config.json")
        return
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's older name
    config["dtype"] = dtype
    write_json_atomic(target / "config.json", config)


def progress_bar(total_bytes: int, what: str):
    """Returns a bar over bytes on standard error."""
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1000, "dynamic_ncols": True}
    return processes.progress_bar(total=total_bytes, desc=what, **options)
