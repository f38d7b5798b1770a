"""The mapping that a training run starts from: found, checked against the models, kept safe from the run's outputs."""

import os
from pathlib import Path

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, warn


def settle_start(args, stage, mapping_config, output_dir: Path) -> tuple[str | None, str | None]:
    """Finds the mapping that the run starts from and checks that it fits; rank 0 alone looks.

    It may lie in an output folder that rank 0 alone has: the other ranks are told.

    Returns:
        its file and the start of its sha256, or twice None for a fresh mapping.

    Raises:
        UserError: when it cannot be used, or would not survive the run.
    """
    from mindmerger.model.mapping_files import check_mapping, mapping_sha256

    if args.overwrite_output_dir and args.resume_from_checkpoint != "auto":
        raise UserError(
            "--overwrite_output_dir starts over and --resume_from_checkpoint continues from "
            f"{args.resume_from_checkpoint}: leave one of them out"
        )
    # The output folder may be on rank 0's node alone, and with it the mapping stage's result.
    init_file = find_initial_mapping(args, stage, mapping_config.bridge_options, output_dir) if is_main() else None
    if init_file is None:
        return None, None
    check_mapping(init_file, mapping_config)
    check_template(init_file, mapping_config)
    protect_initial_mapping(init_file, output_dir)
    return init_file, mapping_sha256(init_file)[:16]


def check_template(init_file: str, own) -> None:
    """Compares the chat template that a mapping was trained with, where it has seen prompts, with this run's.

    Args:
        own: the configuration of this run's mapping.

    Raises:
        UserError: where this run would drop or change it.
    """
    from mindmerger.model.mapping_files import read_config

    config, record = read_config(init_file), own.chat_template
    if not own.augmentation or config is None or not config.augmentation or config.chat_template == record:
        return
    if config.chat_template is None:
        warn(f"the mapping {init_file} was trained without a chat template, this run has one")
        return
    what = "with a chat template: pass --chat_template auto"
    if record is not None:
        what = "with another chat template than the LLM's own is now: train the earlier stage again"
    raise UserError(f"the mapping to start from, {init_file}, was trained {what}")


def find_initial_mapping(args, stage, options: dict[str, str], output_dir: Path) -> str | None:
    """Finds the mapping file to start from: the given one, or the best of the stage that this one continues.

    Raises:
        UserError: when a stage that continues another has none to start from, or the file holds another bridge.
    """
    from mindmerger.bridges.base import contradiction
    from mindmerger.model.mapping_files import find_mapping_file, read_config
    from mindmerger.model.sharing import fetch_mapping
    from mindmerger.tasks import find_task

    given = args.init_checkpoint
    if given and given.lower() == "none" and "adapter" in stage.trains:
        raise UserError(
            "--init_checkpoint none leaves the adapter a bridge that nobody trained: train one first, or pass "
            "--llm_only for an adapter without a bridge"
        )
    if given and given.lower() == "none" or stage.starts_from is None and not given:
        return None
    folder = fetch_mapping(given) if given else str(output_dir.parent / stage.starts_from)
    # An earlier stage of this very run may be named too, where this one starts from it in another curriculum.
    of_run = not given or Path(folder).parent == output_dir.parent
    if of_run and args.dry_run and not Path(folder).is_dir():
        warn(f"there is no {folder} yet: the {Path(folder).name} stage has to run first")
        return None
    if not given and not Path(folder).is_dir():
        raise UserError(
            f"the {args.stage_name} stage starts from the {stage.starts_from} stage's mapping, but there is no "
            f"{folder}: run --stage_name {stage.starts_from} first, or name a mapping with --init_checkpoint ('none' "
            "for a fresh one)"
        )
    file, recorded = find_mapping_file(folder), read_config(folder)
    if recorded is not None and recorded.adapter is not None:
        warn(f"the adapter beside {file} is not read: this run starts from the mapping alone")
    # Released files record no bridge: then names and shapes of the tensors decide.
    if recorded is not None and recorded.bridge != args.bridge:
        raise UserError(f"{file} holds the bridge {recorded.bridge}, this run trains --bridge {args.bridge}")
    if recorded is not None and (found := contradiction(recorded.bridge_options, options)) is not None:
        raise UserError(f"{file} was trained with --bridge_option {found[0]}, this run has {found[1]}: use the same")
    # A warning only: a copy elsewhere is the same model, and the shapes are compared next.
    for flag in ("llm_path", "mt_path"):
        before, now = getattr(recorded, flag, None), getattr(args, flag)
        if before is not None and Path(before).resolve() != Path(now).resolve():
            warn(f"the mapping {file} was trained with --{flag} {before}, not {now}")
    task = find_task(args.task).training_name
    if recorded is not None and recorded.task not in (None, task):
        warn(f"the mapping {file} was trained for task {recorded.task}, this run trains {task}")
    return str(file)


def protect_initial_mapping(init_file: str, output_dir: Path) -> None:
    """Makes sure that the mapping to start from survives what the run removes and writes.

    Raises:
        UserError: when it lies in the run's own output folder, where each new best mapping replaces it.
    """
    # Both as written and behind its links: starting over may remove either.
    places = (Path(os.path.abspath(init_file)), Path(init_file).resolve())
    folders = (Path(os.path.abspath(output_dir)), output_dir.resolve())
    if any(place.is_relative_to(folder) for place in places for folder in folders):
        raise UserError(
            f"the mapping to start from, {init_file}, lies in this run's own output folder {output_dir}, "
            "which the run overwrites: copy it elsewhere, or use another --save_name"
        )
