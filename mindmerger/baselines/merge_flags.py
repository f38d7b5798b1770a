"""Flags that the merging commands share. Imports nothing heavy, so that `--help` answers at once."""

import argparse
import math
import shlex
from fractions import Fraction
from pathlib import Path

from mindmerger.runtime.command import number_where

DTYPES = ("auto", "bfloat16", "float16", "float32")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that keeps formulas as they are written and gives long flags room."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=118)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --output, --dtype, --max_shard_gb and --overwrite."""
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, help="the new model folder; must not exist (see --overwrite)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the written tensors; auto: as the task expert stores each of them (default auto)",
    )
    group.add_argument(
        "--max_shard_gb",
        type=shard_gb,
        default=5.0,
        help="largest weight file in units of 10^9 bytes, at most 5 (default 5)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a folder that an earlier merge wrote")


def evaluation_of(output: Path) -> str:
    """Returns the command that evaluates a merged folder, into results that no other model's are in."""
    name = shlex.quote(output.name)
    return f"python run_evaluation.py --llm_only --llm_path {shlex.quote(str(output))} --save_name {name}"


def ratio(text: str) -> Fraction:
    """Reads a share between 0 and 1 exactly: as a float, 0.29 of 100 would be 28.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        value = Fraction(text)  # which also reads 1/3
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


number = number_where(math.isfinite, "a number")


def count(text: str) -> int:
    """Reads a whole number of at least 0.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    # int() would also take "+3", "1_0", blanks around, and digits of any script.
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


# In units of 10^9 bytes.
shard_gb = number_where(lambda value: 0 < value <= 5, "a size above 0 and at most 5")
