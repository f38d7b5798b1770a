"""Which process of a run this is, as the launcher's environment says."""

import contextlib
import os
from dataclasses import dataclass

from mindmerger.runtime.errors import UserError

# The variables that launchers (deepspeed, torchrun, accelerate) set for each rank.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Which process of a run this is, and where its rank 0 is met."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


def find_place() -> Place | None:
    """Reads from the launcher's variables which process this is; None when it is alone.

    Batch systems and outer shells leave some of these variables behind: without both a rank and a world size above 1
    there is no run to join.

    Raises:
        UserError: when both are there and something else is missing or is not what a launcher sets.
    """
    text = {name: os.environ.get(name, "").strip() for name in LAUNCHER_VARIABLES}
    if not (text["RANK"] and text["WORLD_SIZE"]):
        return None

    def number(name: str, least: int, most: int) -> int:
        if text[name].isdecimal() and least <= int(text[name]) <= most:
            return int(text[name])
        raise UserError(
            f"the environment has {name}={text[name]!r}, which is not a whole number from {least} to {most}: start "
            f"with deepspeed or torchrun, or run alone after: unset {' '.join(LAUNCHER_VARIABLES)}"
        )

    size = number("WORLD_SIZE", 1, 10**6)
    if size == 1:  # nobody to meet, so no port either that another run might hold
        return None
    if not (text["MASTER_ADDR"] and text["MASTER_PORT"]):
        raise UserError(
            f"the environment has WORLD_SIZE={size} but no MASTER_ADDR and MASTER_PORT, where the processes meet: "
            f"start with deepspeed or torchrun, or run alone after: unset {' '.join(LAUNCHER_VARIABLES)}"
        )
    text["LOCAL_RANK"] = text["LOCAL_RANK"] or "0"  # left out where a node has one process
    return Place(
        rank=number("RANK", 0, size - 1),
        world_size=size,
        local_rank=number("LOCAL_RANK", 0, size - 1),
        host=text["MASTER_ADDR"],
        port=number("MASTER_PORT", 1, 65535),
    )


def _place_or_alone() -> Place | None:
    # What is wrong with the variables is said where the ranks meet; who asks before that prints as if alone.
    with contextlib.suppress(UserError):
        return find_place()
    return None
