"""Training's command line, and everything that can be settled before anything loads."""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

from mindmerger.runtime.command import CommandParser, DefaultsShown, check_save_name, check_seed, parse_bool
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, warn, world_size

FAULTS_FILE = "faulty_rows.txt"  # in the output folder


# What the hours of a dry run assume: a GPU by its data sheet (dense), and how much of its peak a training step reaches.
ASSUMED_GPU, ASSUMED_SHARE = "A100", 0.4


# Flags a continued run may change when --allow_changed says so; anything else that differs makes it another run.
CHANGEABLE_ON_RESUME = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "micro_batch_tokens",
    "epoch_num",
    "max_steps",
}
CHANGEABLE_ON_RESUME |= {"lr", "lr_scheduler", "warmup_ratio", "max_grad_norm", "init_checkpoint"}


def _dev_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of examples of at least 0, or auto, got {text!r}")
    return text if text == "auto" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag, its default and what it does."""
    parser = CommandParser(
        description="Trains what stands between a frozen multilingual encoder and a frozen LLM, one stage at a time.",
        formatter_class=DefaultsShown,
        allow_abbrev=False,
        epilog="Start it with the deepspeed launcher (one process for each GPU) or, for one process, with python.",
    )
    add = parser.add_argument_group("models").add_argument
    add("--llm_path", default="../LLMs/Llama-2-7b-hf/", help="folder or hub name of the frozen LLM")
    add("--mt_path", default="../LLMs/mt5-xl/", help="folder or hub name of the frozen multilingual encoder")
    add("--init_checkpoint", help="mapping to start from (folder, .safetensors or released .bin); the augmentation "
        "stage finds the mapping stage's by itself; 'none' starts that stage from a fresh mapping")  # fmt: skip
    add("--bridge", default="mindmerger", help="what is trained between the two: a name of mindmerger.bridges.BRIDGES")
    add("--bridge_option", action="append", default=[], metavar="KEY=VALUE", help="an option of that bridge; may be "
        "given more than once")  # fmt: skip
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="dtype of the frozen models; the mapping is fp32")
    add("--attn_implementation", help="attention kernels, as transformers names them (sdpa, eager, flash_attention_2)")

    add = parser.add_argument_group("data").add_argument
    add("--task", default="translation", help="math, x-csqa, xnli or translation")
    add("--stage_name", help="which stage of the bridge to train, for mindmerger mapping or augmentation (default: its "
        "first)")  # fmt: skip
    add("--data_root", default="./datas", help="folder in the released layout")
    add("--languages", help="only these, by name or code, separated by commas (default: the task's)")
    add("--train_num", type=int, default=100000, help="examples per language")
    add("--dev_size", type=_dev_size, default=3000, help="examples kept aside to select the best mapping; auto takes "
        "3000, or a tenth of the examples where that is less")  # fmt: skip
    add("--skip_faulty_rows", action="store_true", help="leave out and list rows of the data files that are faulty, "
        "where the first one otherwise ends the run")  # fmt: skip
    add("--augmentation", type=parse_bool, help="put the prompt after the mapped source (default: by stage)")
    add("--max_seq_len", type=int, default=512, help="limit of the encoder's tokens")
    add("--max_gen_len", type=int, default=512, help="limit of the prompt's and of the target's tokens")
    add("--num_workers", type=int, default=2, help="threads that collate batches ahead; 0 collates between the steps")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=2e-5, help="learning rate of AdamW")
    add("--lr_scheduler", choices=("constant", "cosine", "linear"), default="constant", help="decay after warm-up")
    add("--warmup_ratio", type=float, default=0.0, help="share of the steps with a linearly rising learning rate")
    add("--max_grad_norm", type=float, help="gradient clipping (default: the DeepSpeed config's, else 1.0)")
    add("--epoch_num", type=int, default=3, help="passes over the training set")
    add("--max_steps", type=int, help="end after this many optimizer steps")
    add("--train_batch_size", type=int, default=24, help="examples of one optimizer step, over all processes")
    add("--train_micro_batch_size_per_gpu", type=int, default=1, help="examples of one forward pass")
    add("--gradient_accumulation", type=int, help="checked against the two above and the number of processes")
    add("--micro_batch_tokens", type=int, help="cut micro-batches by this many positions instead of rows (0: by rows)")
    add("--eval_batch_size", type=int, default=2, help="examples of one forward pass on the dev split")
    add("--gradient_checkpointing", action="store_true", help="less memory for about a third more arithmetic")
    add("--compile", action="store_true", help="compile the frozen models' layers with torch.compile (not at ZeRO 3)")
    add("--liger", action="store_true", help="Liger's kernels in the LLM (NVIDIA GPU, package liger-kernel)")
    add("--seed", type=int, default=0, help="of the fresh mapping, the dev split and the order of the examples")
    add("--deterministic", action="store_true", help="deterministic kernels: bit-exact resume on CUDA too")

    add = parser.add_argument_group("outputs").add_argument
    add("--save_name", default="MindMerger", help="outputs go to OUTPUT_DIR/SAVE_NAME/TASK/STAGE")
    add("--output_dir", default="outputs", help="where outputs of all runs go")
    add("--overwrite_output_dir", action="store_true", help="start over, removing this run's checkpoints and log")
    add("--resume_from_checkpoint", default="auto", help="auto (newest valid one in the output folder), a "
        "checkpoint, or a folder that holds some, of which it takes the newest valid one")  # fmt: skip
    add("--allow_changed", action="append", default=[], metavar="NAME", choices=sorted(CHANGEABLE_ON_RESUME),
        help="let a resumed run continue with another value of this flag; may be given more than once")  # fmt: skip
    add("--dry_run", action="store_true", help="load the data, print the effective settings, steps and estimates of "
        "memory and hours, write nothing")  # fmt: skip
    add("--eval_steps", type=int, help="optimizer steps between dev evaluations (default: 2000 micro-batches' worth)")
    add("--save_steps", type=int, help="optimizer steps between checkpoints (default: as eval_steps)")
    add("--save_total_limit", type=int, default=2, help="how many checkpoints to keep")
    add("--logging_steps", type=int, default=10, help="optimizer steps between flushes of the log")
    add("--report_to", choices=("none", "tensorboard", "wandb"), default="none", help="also send the log there")

    add = parser.add_argument_group("launcher").add_argument
    add("--deepspeed", action="store_true", help="accepted for compatibility: training always uses DeepSpeed")
    add("--deepspeed_config", help="DeepSpeed JSON, for instance scripts/ds_zero2.json (default: ZeRO 0)")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    add("--gpu", help="accepted for compatibility and ignored: choose GPUs with the launcher's --include")
    return parser


@dataclass
class Plan:
    """The run's settled choices, as `check_arguments` made them from the flags."""

    task: object
    bridge: object  # without storage: asked for names, shapes, lengths and options
    stage: object
    languages: list | None
    with_prompt: bool
    accumulation: int
    config: dict
    output_dir: Path
    init_file: str | None
    init_hash: str | None
    models: tuple[str, str]


def check_arguments(args) -> Plan:
    """Settles the flags against each other, the data tasks and the disk.

    Raises:
        UserError: for the first thing that cannot be.
    """
    from mindmerger.hub.model_files import check_models
    from mindmerger.model.mapping_files import check_mapping, config_of_models, empty_bridge, mapping_sha256
    from mindmerger.model.towers import check_roles, model_fingerprint
    from mindmerger.tasks import find_task
    from mindmerger.tasks.languages import parse_languages
    from mindmerger.training.deepspeed_config import (
        effective_config,
        gradient_clipping,
        read_deepspeed_config,
        zero_stage,
    )
    from mindmerger.training.speedups import check_speed_options

    args.llm_path, args.mt_path = args.llm_path.rstrip("/") or "/", args.mt_path.rstrip("/") or "/"
    warn_of_unused(args)
    check_numbers(args)
    check_save_name(args.save_name)
    task = find_task(args.task)
    languages = parse_languages(args.languages) if args.languages is not None else None
    options = settle_options(args.bridge, args.bridge_option)
    stage = settle_stage(args, options)
    if stage.data != "pairs":
        task.check_augmentation()
    accumulation = settle_accumulation(args)
    config = read_deepspeed_config(args.deepspeed_config)
    args.max_grad_norm = gradient_clipping(config, args.max_grad_norm)  # the loop's, DeepSpeed's and the checkpoint's
    config = effective_config(
        config,
        args.train_batch_size,
        args.train_micro_batch_size_per_gpu,
        accumulation,
        args.max_grad_norm,
    )
    with_prompt = stage.with_prompt if args.augmentation is None else args.augmentation
    where = f"--augmentation {with_prompt} in the {args.stage_name} stage"
    if with_prompt and not stage.with_prompt:
        warn(f"{where}: trains with the translation prompt after the mapped source")
    if stage.with_prompt and not with_prompt:
        warn(f"{where}: trains MindMerger-Hard, no prompt after the mapped source")
    check_roles(args.llm_path, args.mt_path)
    check_models(args.mt_path, args.llm_path, backward=True, must_exist=not args.dry_run)
    check_speed_options(args, zero_stage(config))
    output_dir = Path(args.output_dir) / args.save_name / task.training_name / args.stage_name
    check_reporting(args.report_to)
    # It may lie in an output folder that rank 0 alone has; `prepare` and `build_trainer` pass it on.
    init_file = find_initial_mapping(args, stage, options, output_dir) if is_main() else None
    between = config_of_models(args.mt_path, args.llm_path, args.bridge, options)
    if init_file is not None:
        check_mapping(init_file, between)
    plan = Plan(
        task=task,
        bridge=empty_bridge(between),
        stage=stage,
        languages=english_alone(args) if stage.data == "english_task" else languages,
        with_prompt=with_prompt,
        accumulation=accumulation,
        config=config,
        output_dir=output_dir,
        init_file=init_file,
        init_hash=mapping_sha256(init_file)[:16] if init_file else None,
        models=(model_fingerprint(args.llm_path), model_fingerprint(args.mt_path)),
    )
    protect_initial_mapping(args, plan)
    return plan


def settle_options(bridge: str, texts: list[str]) -> dict[str, str]:
    """Returns the options of a bridge, as --bridge_option gives them and else by default.

    Raises:
        UserError: for an unknown bridge, and an option or a value that it does not have.
    """
    from mindmerger.bridges.base import parse_options
    from mindmerger.model.mapping_files import find_bridge

    return find_bridge(bridge).settle(parse_options(texts))


def settle_stage(args, options: dict[str, str]):
    """Returns the stage that --stage_name means, the bridge's first without it; `args` then has its name."""
    from mindmerger.model.mapping_files import find_bridge

    if args.stage_name is None:
        args.stage_name = next(iter(find_bridge(args.bridge).stages_with(options)))
    return find_stage(args.bridge, args.stage_name, options)


def find_stage(bridge: str, name: str, options: dict[str, str] | None = None):
    """The stage of a bridge, by the names of --bridge and --stage_name.

    Raises:
        UserError: for a name that there is not, listing those that there are, and a stage that asks for more than
            this loop does.
    """
    from mindmerger.bridges.base import nearest
    from mindmerger.model.mapping_files import find_bridge

    stages = find_bridge(bridge).stages_with(options or {})
    if name not in stages:
        raise UserError(
            f"--stage_name {name!r} is not a stage of --bridge {bridge}: choose {' or '.join(stages)}"
            f"{nearest(name, stages)}"
        )
    stage = stages[name]
    known = {"data": ("pairs", "task", "english_task"), "encoder_text": ("source", "prompt")}
    known["trains"] = (("bridge",), ("bridge", "lm_head"))
    for field, values in known.items():
        if getattr(stage, field) not in values:
            raise UserError(
                f"--stage_name {name} of --bridge {bridge} has {field} {getattr(stage, field)!r}: this program trains "
                f"{' or '.join(map(repr, values))} so far"
            )
    return stage


def english_alone(args) -> list:
    """Returns the languages of a stage that trains on English rows.

    Raises:
        UserError: for --languages that are others.
    """
    from mindmerger.tasks.languages import LANGUAGES, parse_languages

    english = [LANGUAGES["English"]]
    if args.languages is not None and parse_languages(args.languages) != english:
        raise UserError(
            f"--languages {args.languages}: the {args.stage_name} stage of --bridge {args.bridge} trains on English "
            "rows alone: leave --languages out"
        )
    return english


def warn_of_unused(args) -> None:
    """Says which of the given flags have no effect beside the others."""
    if args.gpu is not None:
        warn("--gpu is ignored: choose GPUs with the launcher, for instance deepspeed --include localhost:0")
    if args.dev_size == 0 and args.eval_steps is not None:
        warn("--eval_steps is ignored: with --dev_size 0 nothing is evaluated")
    if args.dry_run:
        for name in ("overwrite_output_dir", "allow_changed"):
            if getattr(args, name):
                warn(f"--{name} is ignored: --dry_run neither resumes nor removes anything")
        if args.resume_from_checkpoint != "auto":
            warn("--resume_from_checkpoint is ignored: --dry_run neither resumes nor removes anything")


def check_numbers(args) -> None:
    """Makes sure that every number among the flags can be one of its kind.

    Raises:
        UserError: for the first that cannot.
    """
    positive = ("train_num", "max_seq_len", "max_gen_len", "epoch_num", "max_steps", "train_batch_size")
    positive += ("train_micro_batch_size_per_gpu", "eval_batch_size", "eval_steps", "save_steps", "save_total_limit")
    positive += ("logging_steps",)
    args.micro_batch_tokens = args.micro_batch_tokens or None
    for names, least in ((positive, 1), (("num_workers", "micro_batch_tokens"), 0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, not {value}")
            if value is not None and value >= 2**63:
                raise UserError(f"--{name} must be below 2^63, not {value}")
    check_seed(args.seed)
    if not 0 <= args.warmup_ratio < 1:
        raise UserError(f"--warmup_ratio must be at least 0 and below 1, not {args.warmup_ratio}")
    for name in ("lr", "max_grad_norm"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} must be a finite number above 0, not {value}")


def protect_initial_mapping(args, plan: Plan) -> None:
    """Makes sure that what the run is to start from survives what the run removes and writes.

    Raises:
        UserError: for a checkpoint to resume from in a run that starts over, and for an initial mapping in the run's
            own output folder, where each new best mapping replaces it.
    """
    if args.overwrite_output_dir and args.resume_from_checkpoint != "auto":
        raise UserError(
            "--overwrite_output_dir starts over and --resume_from_checkpoint continues from "
            f"{args.resume_from_checkpoint}: leave one of them out"
        )
    if plan.init_file is None:
        return
    # Both as written and behind its links: starting over may remove either.
    places = (Path(os.path.abspath(plan.init_file)), Path(plan.init_file).resolve())
    folders = (Path(os.path.abspath(plan.output_dir)), plan.output_dir.resolve())
    if any(place.is_relative_to(folder) for place in places for folder in folders):
        raise UserError(
            f"the mapping to start from, {plan.init_file}, lies in this run's own output folder {plan.output_dir}, "
            "which the run overwrites: copy it elsewhere, or use another --save_name"
        )


def settle_accumulation(args) -> int:
    """Micro-batches of each process in one optimizer step: batch / (micro-batch x processes).

    Raises:
        UserError: when that is not a whole number.
    """
    per_pass = args.train_micro_batch_size_per_gpu * world_size()
    if args.train_batch_size % per_pass:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} is not a multiple of --train_micro_batch_size_per_gpu "
            f"{args.train_micro_batch_size_per_gpu} x {world_size()} processes = {per_pass}: change one of them"
        )
    accumulation = args.train_batch_size // per_pass
    if args.gradient_accumulation not in (None, accumulation):
        warn(
            f"--gradient_accumulation {args.gradient_accumulation} is overruled: batch {args.train_batch_size} / "
            f"(micro-batch {args.train_micro_batch_size_per_gpu} x {world_size()} processes) = {accumulation}"
        )
    return accumulation


def find_initial_mapping(args, stage, options: dict[str, str], output_dir: Path) -> str | None:
    """The mapping file to start from: the given one, or the best of the stage that this one continues.

    Raises:
        UserError: when a stage that continues another has none to start from, or the file holds another bridge.
    """
    from mindmerger.model.mapping_files import find_mapping_file, read_config
    from mindmerger.tasks import find_task

    given = args.init_checkpoint
    if given and given.lower() == "none" or stage.starts_from is None and not given:
        return None
    folder = given or str(output_dir.parent / stage.starts_from)
    if not given and not Path(folder).is_dir():
        if args.dry_run:
            warn(f"there is no {folder} yet: the {stage.starts_from} stage has to run first")
            return None
        raise UserError(
            f"the {args.stage_name} stage starts from the {stage.starts_from} stage's mapping, but there is no "
            f"{folder}: run --stage_name {stage.starts_from} first, or name a mapping with --init_checkpoint ('none' "
            "for a fresh one)"
        )
    file, recorded = find_mapping_file(folder), read_config(folder)
    if recorded is not None and recorded.bridge != args.bridge:
        raise UserError(f"{file} holds the bridge {recorded.bridge}, this run trains --bridge {args.bridge}")
    for name, value in options.items():
        if recorded is not None and recorded.bridge_options[name] != value:
            raise UserError(f"{file} was trained with --bridge_option {name}={recorded.bridge_options[name]}, this run "
                f"has {name}={value}: use the same")  # fmt: skip
    for flag in ("llm_path", "mt_path"):
        before, now = getattr(recorded, flag, None), getattr(args, flag)
        if before is not None and Path(before).resolve() != Path(now).resolve():
            warn(f"the mapping {file} was trained with --{flag} {before}, not {now}")
    task = find_task(args.task).training_name
    if recorded is not None and recorded.task not in (None, task):
        warn(f"the mapping {file} was trained for task {recorded.task}, this run trains {task}")
    return str(file)


def check_reporting(where: str) -> None:
    """Refuses a report target whose package is absent."""
    import importlib.util

    package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(where)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--report_to {where} needs the package {package}: pip install {package}")


def check_lengths(args, plan: Plan, data) -> None:
    """Checks the longest rows against the positions of the LLM and the encoder, before weights load.

    Raises:
        UserError: for rows longer than a table of positions.
    """
    from mindmerger.model.towers import check_positions

    longest, source = int(data.merged_lengths(plan.bridge.prefix_length).max()), int(data.encoder_lengths.max())
    check_positions(args.llm_path, longest, "the longest row", "--max_gen_len or --max_seq_len")
    check_positions(args.mt_path, source, "the longest source", "--max_seq_len")


def check_tokens(args, tokenizers, data) -> None:
    """Refuses rows with a token that the LLM or the encoder has no embedding for, before weights load."""
    from mindmerger.data.tokenising import check_rows
    from mindmerger.hub.model_files import embedding_rows, llm_config, load_config

    if not is_main():  # it reads all ids, which are the same on every rank
        return
    ids = [
        data.largest_id("prompt_ids"),
        data.largest_id("target_ids"),
        -1 if tokenizers.bos_id is None else tokenizers.bos_id,
    ]
    check_rows(tokenizers.llm, args.llm_path, ids, embedding_rows(llm_config(args.llm_path)[0]))
    ids = [data.largest_id("encoder_ids")]
    check_rows(tokenizers.encoder, args.mt_path, ids, embedding_rows(load_config(args.mt_path)))
