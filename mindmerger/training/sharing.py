"""`--push_to_hub`: the finished mapping on the Hugging Face hub."""

import argparse
from typing import TYPE_CHECKING

from mindmerger.hub.repositories import add_upload_arguments, check_id, check_upload, upload_command
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, log, warn

if TYPE_CHECKING:
    from mindmerger.training.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the upload."""
    add_upload_arguments(parser.add_argument_group("upload").add_argument, "the finished mapping")


def check_sharing(args: argparse.Namespace) -> None:
    """Makes sure, before anything is trained, that the hub will take the mapping; rank 0 asks it.

    Raises:
        UserError: for an id of another form, offline mode, a token that is missing or may not write there.
    """
    given = [f"--{name}" for name in ("hub_private", "hub_license", "hub_dataset") if getattr(args, name)]
    if args.push_to_hub is None and given:
        warn(f"{', '.join(given)} is ignored: nothing is uploaded without --push_to_hub")
    if args.push_to_hub is None:
        return
    check_id(args.push_to_hub)
    if args.dry_run:
        warn("--push_to_hub is ignored: --dry_run uploads nothing, and does not ask the hub")
    elif is_main():  # one question for each run: the hub counts them
        check_upload(args.push_to_hub, args.hub_license, args.hub_dataset)


def share_mapping(settings: "Settings") -> None:
    """Uploads the run's best mapping, from rank 0 alone.

    Raises:
        UserError: when the hub does not take it, with the command that uploads it later.
    """
    from mindmerger.model.sharing import push_folder

    args, folder = settings.args, settings.output_dir
    if args.push_to_hub is None or not is_main():
        return
    own = settings.task.training_dataset if "task" in settings.stage.data else None
    datasets = args.hub_dataset or ([own] if own else [])
    log(f"uploads {folder} to {args.push_to_hub}")
    try:
        address = push_folder(str(folder), args.push_to_hub, args.hub_private, args.hub_license, datasets)
    except UserError as error:
        raise UserError(
            f"{error}; the run is finished and {folder} is whole: upload it with {upload_command(args, folder)}"
        ) from error
    log(f"uploaded ({address}): MindMerger.from_pretrained({args.push_to_hub!r}) loads it")
