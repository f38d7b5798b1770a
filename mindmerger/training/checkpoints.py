"""Training checkpoints that can be trusted: written whole or not at all, verified before they are read, no pickle.

A checkpoint is a folder `checkpoint-000500/` with `training.safetensors` (what is trained in fp32, Adam's moments),
`state.json` (step, best dev loss, what the run is) and `manifest.json` (bytes and sha256 of every other file, written
last). It is written to `checkpoint-000500.tmp`, flushed to disk and then renamed, so a name without `.tmp` is a promise
that the manifest then proves.
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import describe_file, remove, sync_folder, write_bytes_atomic, write_json_atomic
from mindmerger.runtime.processes import warn

MANIFEST = "manifest.json"
TENSORS = "training.safetensors"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_path(output_dir, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` optimizer steps."""
    return Path(output_dir) / f"checkpoint-{step:06d}"


def write_checkpoint(output_dir, step: int, tensors: dict, state: dict, keep: int | None) -> Path:
    """Writes one checkpoint and then prunes older ones beyond `keep`. Call it on rank 0 only.

    Valid checkpoints of later steps are of a course that was abandoned when an earlier one was resumed from. They go
    once the new one is whole: the newest valid folder is what the next start takes.

    Args:
        tensors: name to CPU tensor.
        state: a JSON value with everything that is not a tensor.
        keep: how many checkpoints stay, this one included; None keeps all.

    Raises:
        UserError: naming path and bytes when the disk refuses them; earlier checkpoints stay untouched.
    """
    from safetensors.torch import save

    final = checkpoint_path(output_dir, step)
    temporary = final.with_name(final.name + ".tmp")
    remove(temporary)
    try:
        # Through bytes, one more copy in memory: each file is on the disk before the manifest vouches for it.
        write_bytes_atomic(temporary / TENSORS, save(tensors, metadata={"format": "pt"}))
        write_json_atomic(temporary / STATE, state)
        # Read back from the disk: the sums vouch for what is there, and cost one reading.
        files = {name: describe_file(temporary / name) for name in (TENSORS, STATE)}
        write_json_atomic(temporary / MANIFEST, {"files": files})
        sync_folder(temporary)  # its names too: the rename could reach the disk before them
        # Before the rename: a kill after it would leave two courses, of which the next start took the abandoned one.
        for abandoned in later_checkpoints(output_dir, step):
            remove_atomically(abandoned)
        # os.replace refuses a folder that is not empty.
        if os.path.lexists(final):
            remove_atomically(final)
        os.replace(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot write checkpoint {final}: {error.strerror or error}") from error
    finally:
        remove(temporary)
    try:
        prune(output_dir, keep)
    except OSError as error:  # the new checkpoint is whole: a run need not end because an old one stays
        warn(f"cannot remove an old checkpoint: {error.filename}: {error.strerror}")
    return final


def remove_leftovers(output_dir) -> None:
    """Removes what a killed writer left half-done. Call it under the output folder's lock."""
    for entry in Path(output_dir).glob("checkpoint-*.tmp"):
        remove(entry)
    for folder in (Path(output_dir) / part for part in ("", "last", "adapter", "last/adapter")):
        for entry in folder.glob(".*.tmp"):
            remove(entry)


def remove_atomically(folder: Path) -> None:
    """Removes a checkpoint such that a kill in between leaves no folder that looks like one."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    remove(doomed)
    os.replace(folder, doomed)
    remove(doomed)


def prune(output_dir, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond the newest `keep` valid ones; damaged ones in between go too."""
    # Damaged ones do not count: else they could push out the last one that works.
    valid = 0
    for folder in list_checkpoints(output_dir) if keep else []:
        if valid >= keep:
            remove_atomically(folder)
        elif damage_in(folder) is None:
            valid += 1


def list_checkpoints(output_dir) -> list[Path]:
    """Returns checkpoint folders and links to some, also dangling ones, newest first, verified or not."""
    if not Path(output_dir).is_dir():
        return []
    entries = (entry for entry in Path(output_dir).iterdir() if entry.is_dir() or entry.is_symlink())
    found = [entry for entry in entries if NAME.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: int(NAME.fullmatch(entry.name)[1]), reverse=True)


def later_checkpoints(output_dir, step: int) -> list[Path]:
    """Returns valid checkpoint folders of steps after `step`, newest first. Damaged ones are never resumed from."""
    later = [folder for folder in list_checkpoints(output_dir) if int(NAME.fullmatch(folder.name)[1]) > step]
    return [folder for folder in later if damage_in(folder) is None]


def damage_in(folder) -> str | None:
    """Says what is wrong with a checkpoint folder; None when its manifest proves it whole."""
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        if not text.endswith("}\n"):
            return f"{MANIFEST} is cut short"
        files = json.loads(text)["files"]
        for name in (TENSORS, STATE):
            path, expected = folder / name, files[name]
            if not path.is_file():
                return f"{name} is missing"
            found = describe_file(path)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes, the manifest says {expected['bytes']}"
            # safetensors loads a flipped byte of data without a word.
            if found["sha256"] != expected["sha256"]:
                return f"{name} differs from its sha256 in the manifest"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is missing or unreadable ({type(error).__name__})"
    return None


def newest_valid(output_dir) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint that verifies, and a line for each newer one that does not."""
    skipped = []
    for folder in list_checkpoints(output_dir):
        fault = damage_in(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {fault}")
    return None, skipped


def choose_checkpoint(given: str, output_dir) -> tuple[Path | None, list[str]]:
    """Finds what --resume_from_checkpoint means: a checkpoint, whole or not where it is named itself, else the newest
    that verifies, and a line for each newer one that does not."""
    if given != "auto" and not holds_checkpoints(given):
        return Path(given), []
    return newest_valid(output_dir if given == "auto" else given)


def holds_checkpoints(folder) -> bool:
    """Returns whether a folder is not a checkpoint itself but holds some, as a run's output folder does."""
    return not (Path(folder) / MANIFEST).exists() and bool(list_checkpoints(folder))


def read_checkpoint(folder) -> tuple[dict, dict]:
    """Reads tensors and state of a checkpoint.

    Raises:
        UserError: when the folder does not verify, naming what differs, or is another program's, saying how to convert
            its mapping.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, a checkpoint to resume from is a folder: to start from this mapping pass it to "
            "--init_checkpoint"
        )
    if not folder.is_dir():
        raise UserError(f"no checkpoint folder {folder}: pass one, or auto for the newest in the output folder")
    # Before the manifest is missed: DeepSpeed's own checkpoint is not damaged, and a mapping can be had from it.
    pickled = find_pickle(folder)
    if pickled is not None:
        raise UserError(
            f"{pickled} is a pickle and was not read, since unpickling it could run code: if you trust its origin, "
            "save the mapping's tensors alone with safetensors.torch.save_file (zero_to_fp32.py gathers DeepSpeed's) "
            "and start from them with --init_checkpoint"
        )
    fault = damage_in(folder)
    if fault is not None:
        raise UserError(f"checkpoint {folder} is damaged: {fault}; pass an older one, or auto")
    try:
        # Not by name: the library opens no path that is not UTF-8.
        return load((folder / TENSORS).read_bytes()), json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(
            f"checkpoint {folder}: {TENSORS} or {STATE} is not what its manifest promises: {error}"
        ) from error


def find_pickle(folder: Path) -> Path | None:
    """Finds the pickle that stands where a checkpoint's tensors should: in their file, or in other files when it is
    absent, as in DeepSpeed's and transformers' own checkpoints. Such folders hold no manifest of ours."""
    tensors = folder / TENSORS
    if tensors.is_file():
        with contextlib.suppress(OSError), open(tensors, "rb") as file:
            start = file.read(9)
            # As a pickle or torch's zip around one begins; safetensors has 8 bytes of length and then a JSON object.
            if start[8:] != b"{" and (start[:1] == b"\x80" or start[:2] == b"PK"):
                return tensors
        return None
    if (folder / MANIFEST).exists():
        return None
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in PICKLES]
    return min(found, default=None)


def check_state(folder, state) -> None:
    """Makes sure that a checkpoint's state has every field of a training state, with a value that can be one.

    Raises:
        UserError: naming the first field that has not.
    """

    def is_count(value) -> bool:
        return type(value) is int and 0 <= value < 2**53  # isinstance would take True for 1

    fields = {
        "step": is_count,
        "epoch": is_count,
        "examples_in_epoch": is_count,
        # None before the first evaluation: JSON has no infinity.
        "best_dev_loss": lambda value: value is None or type(value) in (int, float) and abs(value) < math.inf,
        # Absent in checkpoints of earlier versions.
        "best_dev_accuracy": lambda value: value is None or type(value) in (int, float) and 0 <= value <= 100,
        "evaluation_due": lambda value: type(value) is bool,
        "identity": lambda value: isinstance(value, dict),
    }
    if isinstance(state, dict) and "minutes" in state:  # of a run with a limit alone
        fields["minutes"] = lambda value: type(value) in (int, float) and 0 <= value < math.inf
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {folder}: {STATE} must hold an object: it is not training state, pass another")
    state = {"best_dev_accuracy": None} | state
    for name, fits in fields.items():
        if name not in state or not fits(state[name]):
            found = repr(state[name])[:80] if name in state else "missing"
            raise UserError(
                f"checkpoint {folder}: {name} in {STATE} is {found}: it is not training state, pass another"
            )


def check_tensors(folder, tensors: dict, shapes: dict, trains: str = "mapping") -> None:
    """Makes sure that a checkpoint holds what is trained, in fp32, and Adam's two moments, and nothing else.

    Args:
        shapes: name to shape of what is trained.
        trains: the mapping or the adapter.

    Raises:
        UserError: naming the tensors that are missing or too many, or the first of another shape or dtype.
    """
    import torch

    # Before any weight loads: torch would say the same after minutes, in many lines.
    expected = {f"{kind}.{name}": tuple(s) for kind in (trains, *MOMENTS) for name, s in shapes.items()}
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise UserError(
            f"checkpoint {folder}: {TENSORS} is not training state: missing {missing or 'nothing'}, unknown "
            f"{extra[:20] or 'nothing'}: pass another"
        )
    for name, shape in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != torch.float32:
            raise UserError(
                f"checkpoint {folder}: {name} is {tuple(found.shape)} in {found.dtype}, these models need {shape} in "
                "torch.float32: pass another, or the models it was trained with"
            )
