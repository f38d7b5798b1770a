"""The adapter stage: its flags, what they come to, and the LLM that is trained without a bridge as its control."""

import argparse

from mindmerger.runtime.command import at_least, positive, share
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import warn

STAGE = "adapter"  # by --stage_name
ALONE_FOLDER = "llm_adapter"  # where it is trained without a bridge
# As the published code of MERLIN's authors has them.
DEFAULTS = {
    "adapter": "lora",
    "adapter_rank": 16,
    "adapter_alpha": 32.0,
    "adapter_dropout": 0.05,
    "adapter_targets": "q_proj,v_proj",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that count in the adapter stage; none has a default there, so that a given one shows."""
    add = parser.add_argument_group("adapter (--stage_name adapter)").add_argument
    add("--adapter", choices=("lora", "dora"), help="kind of adapter on the LLM (default: lora)")
    add("--adapter_rank", type=at_least(1, 2**31), help="rank of its matrices (default: 16)")
    add("--adapter_alpha", type=positive, help="its output is scaled by alpha / rank (default: 32)")
    add("--adapter_dropout", type=share, help="dropout of its input in training (default: 0.05)")
    add("--adapter_targets", help="the LLM's linear layers that have one, by the end of their names, separated by "
        "commas (default: q_proj,v_proj)")  # fmt: skip
    add("--llm_only", action="store_true", help="train an adapter on the LLM alone, on the same rows with their "
        "prompt: no encoder, no bridge")  # fmt: skip


def settle_adapter(args: argparse.Namespace, stage) -> dict | None:
    """Returns what PEFT needs to know of the stage's adapter, None where the stage trains none; `args` then has every
    choice.

    Raises:
        UserError: for a name of a layer that is empty, and without PEFT.
    """
    from mindmerger.model.adapters import adapter_values, require_peft

    given = [f"--{name}" for name in DEFAULTS if getattr(args, name) is not None]
    if "adapter" not in stage.trains:
        if given:  # a script that trains several stages gives it to all
            warn(f"{', '.join(given)} is ignored: it counts in --stage_name {STAGE}")
        return None
    require_peft()
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    targets = [name.strip() for name in args.adapter_targets.split(",")]
    if not all(targets):
        raise UserError(f"--adapter_targets {args.adapter_targets!r} has an empty name: separate names by one comma")
    return adapter_values(
        args.adapter, args.adapter_rank, args.adapter_alpha, args.adapter_dropout, targets, args.llm_path
    )


def settle_alone(args: argparse.Namespace, stage):
    """Returns the stage as the LLM alone trains it: the same rows, of which it reads the prompt; `args` then names no
    encoder.

    Raises:
        UserError: for another stage, and without the prompt.
    """
    if args.stage_name != STAGE:
        raise UserError(f"--llm_only trains an adapter on the LLM alone: pass --stage_name {STAGE} too")
    if args.augmentation is False:
        raise UserError("--llm_only reads nothing but the prompt: leave --augmentation False out")
    if args.init_checkpoint is not None:
        warn("--init_checkpoint is ignored: --llm_only trains without a bridge")
    # Nothing loads an encoder without a path, which saves its memory too.
    args.mt_path = None
    return stage._replace(with_prompt=True, encoder_text="source", starts_from=None)
