"""`--cache_encoder_states`: the frozen encoder runs once over all rows, before training, and its states are then read
from disk, in every epoch and in every later run with the same rows, encoder, layers and dtype.

Dimension letters: B batch, S encoder tokens, n layers that the bridge reads, E encoder width.
"""

import argparse
import errno
import gc
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mindmerger.runtime.errors import ReportedError, UserError
from mindmerger.runtime.files import sha256_of_file, sync_folder
from mindmerger.runtime.processes import (
    explain_out_of_memory,
    gather_objects,
    local_rank,
    log,
    on_all_ranks,
    progress_bar,
    rank,
)
from mindmerger.runtime.signals import half_written

if TYPE_CHECKING:  # numpy and torch are imported where they are used: --help answers at once
    import numpy as np
    import torch

    from mindmerger.data.encoder_states import EncoderStates
    from mindmerger.data.loader import TrainingData
    from mindmerger.training.settings import Settings

# Raised when the meaning of a file of states changes, or the way in which they are computed.
VERSION = 1
FILE = "states.bin"
# Positions of a pass, padding included. Constant: states of a row may differ in their last bit by the rows beside it,
# and are to depend neither on the number of processes nor on the batches of the training.
TOKENS_PER_PASS = 8192
WHOLE, BUSY = "whole", "busy"  # what a node finds in the place of a folder that it is to fill
MEMORY_ADVICE = "lower --max_seq_len, use --precision bf16, or leave --cache_encoder_states out"


def add_arguments(add) -> None:
    """Adds the flag to a group of flags, by the group's `add_argument`."""
    add("--cache_encoder_states", action="store_true", help="run the frozen encoder once over all rows, before "
        "training, and read its states from disk from then on, in later runs too: they take tokens x layers x width x "
        "2 bytes in bf16 (--dry_run tells), and no memory is spent on the encoder in training")  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Refuses to keep states of an encoder that there is none of.

    Raises:
        UserError: beside --llm_only.
    """
    if args.cache_encoder_states and args.llm_only:
        raise UserError("--cache_encoder_states keeps what an encoder computes, and --llm_only has none: leave it out")


class Plan(NamedTuple):
    """A file of states: where it is or will be, and what is in it."""

    folder: Path  # appears by one rename, when it is whole
    rows: int
    tokens: int
    layers: tuple[int, ...]
    width: int
    dtype: "torch.dtype"

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return size_of(self.tokens, len(self.layers), self.width, self.dtype)

    def __str__(self) -> str:
        return describe(self.rows, self.tokens, self.bytes)


def size_of(tokens: int, layers: int, width: int, dtype: "torch.dtype") -> int:
    """Returns how many bytes states take."""
    return tokens * layers * width * dtype.itemsize


def describe(rows: int, tokens: int, size: int) -> str:
    """Returns what states are of, and how large they are."""
    return f"encoder states of {rows:,} rows, {tokens:,} tokens: {readable(size)}"


def readable(size: int) -> str:
    """Returns a number of bytes in GB of 10^9 bytes, a small one in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def cached_states(settings: "Settings", data: "TrainingData", device) -> "EncoderStates":
    """Opens the states of all rows, which the ranks of this node compute first where they are not on its disk.
    A collective call.

    Raises:
        UserError: on every rank, where there is no room for them, memory runs out, or they cannot be computed.
    """
    from mindmerger.data.encoder_states import EncoderStates

    plan = plan_states(settings, data.examples, device)
    # Nodes may share a disk, and other runs may be at work on it. Nobody waits for a lock while its holder may wait for
    # this rank in a collective call: in each round whoever gets a lock computes, and the others look again.
    has_them, waits = False, True
    while waits:
        has_them, waits = _round(plan, has_them, settings, data, device)
    return EncoderStates(plan.folder / FILE, data.examples.encoder_lengths, len(plan.layers), plan.width, plan.dtype)


def _round(plan: Plan, has_them: bool, settings, data, device) -> tuple[bool, bool]:
    """Computes the states on all nodes that lack them and hold their lock; returns whether this node has them, and
    whether any node has to look again. A collective call."""
    lock, found = on_all_ranks((lambda _: (None, WHOLE)) if has_them else _begin, plan)
    try:
        places = gather_objects((local_rank(), found))
        leaders = [number for number, (place, _) in enumerate(places) if place == 0]
        first = max(number for number in leaders if number <= rank())
        found = places[first][1]  # on the node's first process
        if found in (WHOLE, BUSY):
            on_all_ranks(lambda: None)
            on_all_ranks(lambda: None)
        else:
            behind = min((number for number in leaders if number > first), default=len(places))
            share = rank() - first, behind - first
            with half_written(Path(found)):
                on_all_ranks(_compute, plan, Path(found), share, settings, data, device)
                on_all_ranks(_finish if lock is not None else lambda *_: None, plan, Path(found))
    except (KeyboardInterrupt, SystemExit):
        log("stopped while the encoder's states were computed: none are kept, the same command computes them again")
        raise
    finally:
        if lock is not None:
            lock.release()
    waits = any(places[number][1] == BUSY for number in leaders)
    if waits:
        on_all_ranks(_wait_for_lock if found == BUSY and local_rank() == 0 else lambda _: None, plan)
    return found != BUSY, waits


def plan_states(settings: "Settings", examples, device) -> Plan:
    """Returns what the states of a run are, and the folder that they have on each node. A collective call.

    Raises:
        UserError: for weight files that cannot be read, or that differ from node to node.
    """
    import torch

    from mindmerger.data.training_set import cache_root

    args, bridge = settings.args, settings.bridge
    # Once on each node: all of the encoder's weights are read for it.
    own = on_all_ranks(lambda: identity_of_weights(args.mt_path) if local_rank() == 0 else None)
    identities = {one for one in gather_objects(own) if one is not None}
    if len(identities) > 1:
        raise ReportedError(f"--mt_path {args.mt_path} has other weights on another node: every node needs the same")
    key = {
        "version": VERSION,
        "rows": examples.fingerprint,
        "encoder": identities.pop(),
        "layers": bridge.encoder_layers,
        "dtype": args.precision,
        "device": device.type,
        "attention": args.attn_implementation,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Plan(
        folder=cache_root() / f"states-{name}",
        rows=len(examples.encoder_lengths),
        tokens=int(examples.encoder_lengths.sum(dtype="int64")),
        layers=tuple(bridge.encoder_layers),
        width=bridge.towers.encoder_width,
        dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32,
    )


def identity_of_weights(path: str) -> str:
    """Returns a hash of an encoder's config and of all of its weights, of a hub name its commit.

    Raises:
        UserError: for a file that cannot be read.
    """
    from mindmerger.hub.model_configs import load_config
    from mindmerger.hub.model_files import is_folder, weight_files
    from mindmerger.model.towers import model_fingerprint

    if not is_folder(path):
        return model_fingerprint(path)
    files = [Path(path) / "config.json", *weight_files(path, load_config(path))]
    try:
        hashes = {file.name: sha256_of_file(file) for file in files}
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def is_whole(plan: Plan) -> bool:
    """Returns whether the folder holds what its manifest says, and that is what the plan is."""
    try:
        manifest = json.loads((plan.folder / "manifest.json").read_text("utf-8"))
        return manifest["bytes"] == plan.bytes == (plan.folder / FILE).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _begin(plan: Plan) -> tuple:
    """Returns on a node's first process what its disk has: nothing to do, a lock that somebody else holds, or a
    temporary folder to fill, and the lock on it; nothing on the others."""
    from filelock import FileLock, Timeout

    if local_rank() != 0:
        return None, None
    lock = FileLock(plan.folder.parent / f".{plan.folder.name}.lock")
    try:
        plan.folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        return None, BUSY
    except OSError as error:
        raise _unwritable(plan, error) from error
    try:
        if is_whole(plan):
            log(f"{plan} found in {plan.folder}: the encoder is not loaded")
            lock.release()
            return None, WHOLE
        return lock, str(_make_room(plan))
    except BaseException:
        lock.release()
        raise


def _make_room(plan: Plan) -> Path:
    """Returns a temporary folder with a file of the states' size, whose place on the disk is taken.

    Raises:
        UserError: where there is no room.
    """
    prefix = f".{plan.folder.name[:23]}-"
    # Nobody else holds the lock: what a killed run or a damaged disk left goes, and its room counts.
    for stale in [*plan.folder.parent.glob(f"{prefix}*.tmp"), plan.folder]:
        shutil.rmtree(stale, ignore_errors=True)
    log(f"{plan} in {plan.folder}")
    temporary = None
    try:
        free = shutil.disk_usage(plan.folder.parent).free
        if free < plan.bytes:
            raise OSError(errno.ENOSPC, f"only {readable(free)} are free")
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=plan.folder.parent))
        with open(temporary / FILE, "wb") as file:
            file.truncate(plan.bytes)
            # Else a disk that another program fills would be noticed after hours of computing.
            if plan.bytes and hasattr(os, "posix_fallocate"):  # not on macOS
                _reserve(file.fileno(), plan.bytes)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(plan, error) from error
    return temporary


def _reserve(file: int, size: int) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of a file system that reserves nothing
            raise


def _unwritable(plan: Plan, error: OSError) -> UserError:
    return UserError(
        f"cannot write the {plan}, to {plan.folder.parent}: {error.strerror or error}; make room, set "
        "HF_DATASETS_CACHE to another folder, or leave --cache_encoder_states out"
    )


def batches_by_length(lengths: "np.ndarray", tokens: int) -> list["np.ndarray"]:
    """Returns the row numbers of batches that have at most so many positions, padding included, the longest rows first;
    a longer row stands alone, and a row without tokens nowhere."""
    import numpy as np

    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    order = order[: np.count_nonzero(lengths)]
    batches, start = [], 0
    while start < len(order):
        end = start + max(1, tokens // int(lengths[order[start]]))
        batches.append(order[start:end])
        start = end
    return batches


def _compute(plan: Plan, folder: Path, share: tuple[int, int], settings: "Settings", data: "TrainingData", device):
    """Loads the encoder, writes the states of this rank's share of the batches, and lets the encoder go.

    Args:
        share: every `share[1]`-th batch from `share[0]` on.

    Raises:
        UserError: where memory runs out or the disk refuses, and as `_states` does.
    """
    import torch

    from mindmerger.model.towers import load_encoder
    from mindmerger.training.trainer import explain_placing_out_of_memory

    args = settings.args
    with explain_placing_out_of_memory(device):
        # Whole and alone on this device, at ZeRO 3 too: the LLM comes after it.
        place = device if device.type == "cuda" else None
        encoder = load_encoder(args.mt_path, plan.dtype, args.attn_implementation, place).to(device)
    mine = batches_by_length(data.examples.encoder_lengths, TOKENS_PER_PASS)[share[0] :: share[1]]
    try:
        write_states(plan, folder / FILE, mine, encoder, data, device)
    except OSError as error:
        raise _unwritable(plan, error) from error
    del encoder
    gc.collect()  # a model refers to itself, and its memory is the LLM's from here on
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_states(plan: Plan, file: Path, batches: list["np.ndarray"], encoder, data: "TrainingData", device) -> None:
    """Writes each row's states where they belong in the file."""
    from mindmerger.data.encoder_states import bits, starts_of

    lengths = data.examples.encoder_lengths
    starts, per_token = starts_of(lengths), len(plan.layers) * plan.width
    column = data.examples.dataset.select_columns("encoder_ids")
    # The bar is closed after an error too, whose line would else begin behind it.
    with open(file, "r+b") as out, progress_bar(batches, desc="encoding", unit="batch", delay=2) as bar:
        for number, rows in enumerate(bar):
            ids = column[rows.tolist()]["encoder_ids"]
            what = f"on rank {rank()} while the encoder computes the states of {len(rows)} rows"
            with explain_out_of_memory(what, {"encoder": int(lengths[rows[0]])}, MEMORY_ADVICE):
                states_BSnE = _states(encoder, plan, ids, data.tokenizers.encoder_pad_id, device)
            for i, row in enumerate(rows):
                out.seek(int(starts[row]) * per_token * plan.dtype.itemsize)
                out.write(bits(states_BSnE[i, : lengths[row]]))
            if number % 16 == 0:
                data.examples.release_pages()
        out.flush()
        os.fsync(out.fileno())


def _states(encoder, plan: Plan, ids: list, pad_id: int, device) -> "torch.Tensor":
    """Returns the states (B, S, n, E) of rows of ids on the host.

    Raises:
        UserError: for states that are not finite, or of another dtype than the run's.
    """
    import torch

    from mindmerger.data.batches import collate
    from mindmerger.model.encoding import run_encoder
    from mindmerger.model.input_plan import plan_encoder
    from mindmerger.model.packing import to_device
    from mindmerger.model.towers import CHECK_WEIGHTS

    batch = collate([{"encoder_ids": one} for one in ids], pad_id, 0)
    packing, padded = plan_encoder(batch.encoder_attention_mask)
    moved = packing.map(lambda tensor: to_device(tensor, device))
    states = run_encoder(encoder, plan.layers, batch.encoder_input_ids.to(device), moved, padded)
    # Else the file would hold something rounded, or it would not be what its name says.
    if any(one.dtype != plan.dtype for one in states):
        found = ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in states}))
        raise UserError(
            f"{encoder.config.name_or_path} gives states in {found}, this run's models are in "
            f"{str(plan.dtype).removeprefix('torch.')}: leave --cache_encoder_states out, or use --precision fp32"
        )
    states_BSnE = torch.stack(states, dim=2)
    real = moved.mask_BL.bool()
    if not torch.isfinite(states_BSnE[real]).all():  # every later run would read them
        raise UserError(
            f"encoder {encoder.config.name_or_path} computes states that are NaN or infinite: {CHECK_WEIGHTS}, or use "
            "--precision fp32"
        )
    return states_BSnE.cpu()


def _finish(plan: Plan, temporary: Path) -> None:
    """Gives a folder whose states all ranks have written its name.

    Raises:
        UserError: when the disk refuses.
    """
    try:
        manifest = {"bytes": plan.bytes, "rows": plan.rows, "tokens": plan.tokens, "layers": plan.layers}
        manifest |= {"width": plan.width, "dtype": str(plan.dtype).removeprefix("torch.")}
        with open(temporary / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, plan.folder)
        sync_folder(plan.folder.parent)
    except OSError as error:
        raise _unwritable(plan, error) from error


def _wait_for_lock(plan: Plan) -> None:
    from filelock import FileLock

    log("waiting for another process that computes the same encoder states")
    with FileLock(plan.folder.parent / f".{plan.folder.name}.lock"):
        pass
