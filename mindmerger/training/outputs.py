"""Files of a training run, written and resumed from: mappings, checkpoints, settings."""

import contextlib
import os
import sys
from pathlib import Path

from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import remove, write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import is_main, locked_folder, log, on_all_ranks, warn, world_size
from mindmerger.training.checkpoints import (
    check_state,
    check_tensors,
    choose_checkpoint,
    later_checkpoints,
    list_checkpoints,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from mindmerger.training.dev_split import ROWS
from mindmerger.training.flags import CHANGEABLE_ON_RESUME
from mindmerger.training.record import TENSORBOARD_FOLDER, TRACKIO_FILE, WANDB_FILE
from mindmerger.training.settings import FAULTS_FILE, Settings
from mindmerger.training.trainer import Progress, Run

# Entries of a checkpoint's identity that older checkpoints lack: they are compared where both have them.
ABSENT_IN_OLD_CHECKPOINTS = {"bridge", "bridge_options", "skip_faulty_rows", "init_checkpoint", "languages"}
ABSENT_IN_OLD_CHECKPOINTS |= {"train_num", "max_seq_len", "max_gen_len", "select_by"}
# And those whose absence says what the run had: there was nothing else.
MEANT_BY_ABSENCE = {"dev_split": ROWS, "quantization": "none"}


@contextlib.contextmanager
def locked(output_dir: Path, start_over: bool):
    """Context manager: the output folder belongs to this run alone, without what a killed one left half-done.

    Args:
        start_over: whether an earlier run's outputs are removed.

    Raises:
        UserError: when another run holds the folder, or something cannot be removed.
    """
    with locked_folder(output_dir):
        if is_main():
            # Under the lock: without it they could be those of a run at work.
            remove_leftovers(output_dir)
        if start_over:
            on_all_ranks(clear_outputs, output_dir)
        yield


def save_mapping(run: Run, folder: Path) -> None:
    """Writes the mapping in the safe and in the released format, an adapter beside the mapping in the safe one alone:
    the released code would run it without the adapter. All ranks gather, rank 0 writes."""
    from mindmerger.model.mapping_files import RELEASED_FILE, save_released
    from mindmerger.training.deepspeed_engine import frozen_bridge_state, trained_state

    # On every rank: at ZeRO 3 each holds a part, and gathering is collective.
    state = trained_state(run.engine)
    bridge = state if run.settings.adapter is None else frozen_bridge_state(run.engine)

    def write():
        if is_main():
            model = run.engine.module
            model.save_pretrained(folder, bridge, None if bridge is state else state)
            if bridge is state:
                # Beside the safe form, because the published commands point at this file.
                released = {key: state[name] for key, name in model.released_names().items()}
                save_released(folder / RELEASED_FILE, released)

    with run.signals.saving():
        on_all_ranks(write)


def save_checkpoint(run: Run, progress: Progress) -> None:
    """Writes the complete training state; all ranks gather, rank 0 writes."""
    from mindmerger.training.deepspeed_engine import optimizer_state, trained_state

    # Out here and not in `write`: gathering is collective, and one rank alone writes.
    trained = {f"{run.settings.trains}.{name}": tensor for name, tensor in trained_state(run.engine).items()}
    tensors = trained | optimizer_state(run.engine)
    if run.clock.limit_s is not None:
        progress.minutes = run.clock.minutes()
    state = progress.state(run.args.train_batch_size) | {"identity": identity(run.settings, run.data)}

    def write():
        if is_main():
            write_checkpoint(run.settings.output_dir, progress.step, tensors, state, run.args.save_total_limit)

    with run.signals.saving():
        on_all_ranks(write)


def identity(settings: Settings, data) -> dict:
    """Returns what identifies a run: what must not change when it is resumed, and what may when the user says so."""
    args = settings.args
    fixed = {
        "task": settings.task.training_name,
        "stage_name": args.stage_name,
        "bridge": None if args.llm_only else args.bridge,
        "bridge_options": settings.bridge.options,
        **adapter_identity(settings),
        "augmentation": settings.with_prompt,
        # None in checkpoints that are older than the flag, which had none.
        "chat_template": settings.chat.record() if settings.chat is not None else None,
        "seed": args.seed,
        "llm": settings.models[0],
        "encoder": settings.models[1],
        "precision": args.precision,
        "quantization": args.quantization,
        "dev_size": args.dev_size,
        "dev_split": args.dev_split,
        "select_by": args.select_by,
        # Where the loss selects, an accuracy is only shown.
        "dev_accuracy_rows": args.dev_accuracy_rows if args.select_by == "accuracy" else None,
        "skip_faulty_rows": args.skip_faulty_rows,
        # These make other data too; before its hash, so that the difference has a name.
        "languages": [language.code for language in settings.languages] if settings.languages else None,
        "train_num": args.train_num,
        "max_seq_len": args.max_seq_len,
        "max_gen_len": args.max_gen_len,
        "data": data.fingerprint,
    }
    # Not the initial mapping's path: another file may stand there, and the same one elsewhere.
    changeable = {name: getattr(args, name) for name in sorted(CHANGEABLE_ON_RESUME)}
    return fixed | changeable | {"init_checkpoint": settings.init_hash}


def adapter_identity(settings: Settings) -> dict:
    """Returns what an adapter is and the hash of the mapping that it stands on, nothing in another stage."""
    from mindmerger.model.adapters import describe_adapter

    if settings.adapter is None:
        return {}
    return describe_adapter(settings.adapter) | {"mapping under the adapter": settings.init_hash}


def clear_outputs(output_dir: Path) -> None:
    """Removes what an earlier run left in the output folder, on rank 0.

    Raises:
        UserError: when something stays, naming the first such path: the run would resume from it.
    """
    if not is_main():
        return
    # By name, not the whole folder: it may hold what is not ours.
    others = ("pytorch_model.bin", "mapping.safetensors", "config.json", "README.md", "log.jsonl", "loss.png", "last")
    others += ("adapter", FAULTS_FILE, TENSORBOARD_FOLDER, WANDB_FILE, TRACKIO_FILE)
    for path in (*list_checkpoints(output_dir), *(output_dir / name for name in others)):
        remove(path)
        if os.path.lexists(path):
            raise UserError(f"--overwrite_output_dir cannot remove {path}: remove it, or use another --save_name")


def find_checkpoint_to_resume(settings: Settings, data) -> tuple:
    """Returns the checkpoint to resume from as (folder, tensors, state), or three times None. For rank 0.

    Raises:
        UserError: when it belongs to another run, naming the first difference, or a named one is damaged, or its
            content is not training state of these models.
    """
    args = settings.args
    folder, skipped = choose_checkpoint(args.resume_from_checkpoint, settings.output_dir)
    for line in skipped:
        warn(f"skipped {line}")
    # Nothing to continue is a fresh start only where nobody named a checkpoint.
    if folder is None and args.resume_from_checkpoint == "auto":
        return None, None, None
    if folder is None:
        raise UserError(f"no checkpoint in {Path(args.resume_from_checkpoint)} is whole: pass another folder, or auto")
    tensors, state = read_checkpoint(folder)
    check_state(folder, state)
    recorded = MEANT_BY_ABSENCE | state["identity"]
    for name, value in identity(settings, data).items():
        before = recorded.get(name)
        if before == value or name in ABSENT_IN_OLD_CHECKPOINTS and name not in recorded:
            continue
        # Exact resume is a promise: what would break it is refused, or named by the user.
        if name not in CHANGEABLE_ON_RESUME:
            hint = " - a file, a template or a tokenizer has changed" if name == "data" else ""
            if name == "precision":  # that auto finds on another device
                hint = f" - pass --precision {before}"
            raise UserError(
                f"{folder} was trained with another {name} ({before!r}, this run has {value!r}{hint}): use the same, "
                "or another --save_name, or --overwrite_output_dir to start over"
            )
        if name not in args.allow_changed:
            raise UserError(
                f"{folder} was trained with --{name} {before}, this run has {value}: use the same, or say "
                f"--allow_changed {name} to continue with the new value, or --overwrite_output_dir to start over"
            )
        log(f"--{name} was {before}, from here on {value}")
    # After the identity: another model has a name there, here it would be a tensor of another shape.
    check_tensors(folder, tensors, settings.shapes, settings.trains)
    later = later_checkpoints(settings.output_dir, state["step"])
    if later:
        names = ", ".join(entry.name for entry in later)
        warn(f"resumes from step {state['step']}: the first new checkpoint replaces {names}")
    return folder, tensors, state


def write_settings(settings: Settings, data, dev_examples: int) -> None:
    """Writes what really ran: arguments, versions, data fingerprint, and DeepSpeed's effective config."""
    if not is_main():
        return
    ran = {
        "arguments": vars(settings.args),
        "command": sys.argv,
        "world_size": world_size(),
        "task": settings.task.training_name,
        "augmentation": settings.with_prompt,
        "init_file": settings.init_file,
        "versions": versions(),
        "data": {
            "fingerprint": data.fingerprint,
            "counts": data.counts,
            "files": data.files,
            "dev_examples": dev_examples,
        },
    }
    write_json_atomic(settings.output_dir / "args.json", ran)
    if data.faults:
        lines = "".join(f"{fault}\n" for fault in data.faults)
        write_text_atomic(settings.output_dir / FAULTS_FILE, lines)
    write_json_atomic(settings.output_dir / "ds_config.json", settings.config)
