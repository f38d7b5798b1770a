"""The dev split: its flags, and which one a run has that was begun without them."""

import argparse
import json
from pathlib import Path

from mindmerger.runtime.processes import log, on_rank_0, warn
from mindmerger.training.checkpoints import STATE, choose_checkpoint

ROWS, GROUPS = "rows", "groups"  # what a split keeps together; checkpoints without the entry are of the first


def _dev_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of examples of at least 0, or auto, got {text!r}")
    return text if text == "auto" else int(text)


def add_arguments(add) -> None:
    """Adds the flags, by a group's `add_argument`."""
    add("--dev_size", type=_dev_size, default=3000, help="examples kept aside to select the best mapping; auto takes "
        "3000, or a tenth of the examples where that is less")  # fmt: skip
    add("--dev_split", choices=(GROUPS, ROWS), help="what is kept aside: whole groups, so that no question or English "
        "sentence of the dev split is trained on in another language, or single rows, as the released code does "
        "(default: groups; a resumed run continues with its own)")  # fmt: skip


def settle_dev_split(args: argparse.Namespace, output_dir: Path) -> str:
    """Returns what the dev split keeps together, on all ranks what rank 0 finds."""
    if args.dev_split is not None:
        return args.dev_split
    return on_rank_0(_recorded_dev_split, args, output_dir)


def _recorded_dev_split(args: argparse.Namespace, output_dir: Path) -> str:
    fresh = args.overwrite_output_dir and args.resume_from_checkpoint == "auto"
    folder = None if fresh or args.dry_run else choose_checkpoint(args.resume_from_checkpoint, output_dir)[0]
    if folder is None:
        return GROUPS
    try:
        recorded = json.loads((folder / STATE).read_text(encoding="utf-8"))["identity"].get("dev_split", ROWS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return GROUPS  # what is wrong with it is said where it is resumed from
    return recorded if recorded == ROWS else GROUPS


def describe_dev_split(args: argparse.Namespace, stage, examples, dev) -> None:
    """Says how many examples whole groups come to, and where no question is known in two languages.

    Args:
        stage: a `StageData`. examples: a `TrainingSet`. dev: row numbers.
    """
    if examples.groups is None:
        return
    from mindmerger.data.groups import cross_languages

    if len(dev) != args.dev_size:
        log(f"--dev_split groups: {len(dev)} examples, as near to --dev_size {args.dev_size} as whole groups come")
    several = stage.stage == "augmentation" and len(examples.counts["rows"]) > 1
    if several and not cross_languages(examples.groups, examples.dataset.data.column("language")):
        warn(
            "--dev_split groups: neither ids nor row numbers tell which rows of different languages are the same "
            "question: where some are, the dev split holds questions that are trained on in another language"
        )
