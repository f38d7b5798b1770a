"""Trains MindMerger's mapping: both stages share this command line and this one loop.

    deepspeed run_training.py --deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math \\
        --stage_name mapping --train_num 100000 --train_batch_size 128 --train_micro_batch_size_per_gpu 8

Reads top to bottom: flags, what can be checked before models load, the run's parts, the loop, its outputs.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint_utils
import runtime_utils
from interrupt_utils import end_with_parent, watch_launcher
from runtime_utils import UserError, is_main, log, parse_bool, rank, together, warn, world_size
from training_log import TENSORBOARD_FOLDER, WANDB_FILE, Recorder, draw_loss, peak_memory_gb, perplexity

FAULTS_FILE = "faulty_rows.txt"  # in the output folder
DEFAULT_EVAL_MICRO_BATCHES = 2000
EVAL_BATCHES_PER_CHECK = 16  # how often an evaluation looks whether the run was asked to stop
STEPS_PER_RELEASE = 4  # how often pages of the data set are given back: a step may touch 10 MB of them
# What to do when memory runs out in the passes of a step, in its update, in an evaluation on the dev split.
STEP_MEMORY_FLAGS = "lower --train_micro_batch_size_per_gpu, --micro_batch_tokens, --max_seq_len or --max_gen_len, or "
STEP_MEMORY_FLAGS += "use --gradient_checkpointing"
UPDATE_MEMORY_FLAGS = "Adam's moments come on top: share or offload them (--deepspeed_config), or "
UPDATE_MEMORY_FLAGS += STEP_MEMORY_FLAGS
EVAL_MEMORY_FLAGS = "lower --eval_batch_size, --max_seq_len or --max_gen_len"
# What the hours of a dry run assume: a GPU by its data sheet (dense), and how much of its peak a training step reaches.
ASSUMED_GPU, ASSUMED_SHARE = "A100", 0.4
PEAK_FLOPS = {"bf16": 312e12, "fp32": 19.5e12}
# Flags a continued run may change when --allow_changed says so; anything else that differs makes it another run.
CHANGEABLE = {"train_batch_size", "train_micro_batch_size_per_gpu", "micro_batch_tokens", "epoch_num", "max_steps"}
CHANGEABLE |= {"lr", "lr_scheduler", "warmup_ratio", "max_grad_norm", "init_checkpoint"}
# Entries of a checkpoint's identity that older checkpoints lack: they are compared where both have them.
LATER_ENTRIES = {"skip_faulty_rows", "init_checkpoint", "languages", "train_num", "max_seq_len", "max_gen_len"}


def _dev_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of examples of at least 0, or auto, got {text!r}")
    return text if text == "auto" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag, its default and what it does."""
    parser = runtime_utils.CommandParser(
        description=__doc__.split("\n")[0],
        formatter_class=runtime_utils.DefaultsShown,
        allow_abbrev=False,
        epilog="Start it with the deepspeed launcher (one process for each GPU) or, for one process, with python.",
    )
    add = parser.add_argument_group("models").add_argument
    add("--llm_path", default="../LLMs/Llama-2-7b-hf/", help="folder or hub name of the frozen LLM")
    add("--mt_path", default="../LLMs/mt5-xl/", help="folder or hub name of the frozen multilingual encoder")
    add("--init_checkpoint", help="mapping to start from (folder, .safetensors or released .bin); the augmentation "
        "stage finds the mapping stage's by itself; 'none' starts that stage from a fresh mapping")  # fmt: skip
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="dtype of the frozen models; the mapping is fp32")
    add("--attn_implementation", help="attention kernels, as transformers names them (sdpa, eager, flash_attention_2)")

    add = parser.add_argument_group("data").add_argument
    add("--task", default="translation", help="math, x-csqa, xnli or translation")
    add("--stage_name", choices=("mapping", "augmentation"), default="mapping", help="which stage to train")
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
    add("--allow_changed", action="append", default=[], metavar="NAME", choices=sorted(CHANGEABLE),
        help="let a resumed run go on with another value of this flag; may be given more than once")  # fmt: skip
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


# ---------------------------------------------------------------------------------------------------------------------
# What can be known before anything is loaded


@dataclass
class Plan:
    """The run's settled choices, as `check_arguments` made them from the flags."""

    task: object
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
    from data_utils import find_task, parse_languages
    from deepspeed_utils import effective_config, gradient_clipping, read_deepspeed_config, zero_stage
    from model_files import check_models
    from modeling_mindmerger import check_mapping, check_roles, config_of_models, model_fingerprint
    from speed_options import check_speed_options

    args.llm_path, args.mt_path = args.llm_path.rstrip("/") or "/", args.mt_path.rstrip("/") or "/"
    warn_of_unused(args)
    check_numbers(args)
    runtime_utils.check_save_name(args.save_name)
    task = find_task(args.task)
    stage = args.stage_name
    if stage == "augmentation":
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
    with_prompt = stage == "augmentation" if args.augmentation is None else args.augmentation
    if stage == "mapping" and with_prompt:
        warn("--augmentation True in the mapping stage: trains with the translation prompt after the mapped source")
    if stage == "augmentation" and not with_prompt:
        warn(
            "--augmentation False in the augmentation stage: trains MindMerger-Hard, no prompt after the mapped source"
        )
    check_roles(args.llm_path, args.mt_path)
    check_models(args.mt_path, args.llm_path, backward=True, must_exist=not args.dry_run)
    check_speed_options(args, zero_stage(config))
    output_dir = Path(args.output_dir) / args.save_name / task.training_name / stage
    check_reporting(args.report_to)
    # It may lie in an output folder that rank 0 alone has; `prepare` and `build_trainer` pass it on.
    init_file = find_initial_mapping(args, output_dir) if is_main() else None
    if init_file is not None:
        check_mapping(init_file, config_of_models(args.mt_path, args.llm_path))
    plan = Plan(
        task=task,
        languages=parse_languages(args.languages) if args.languages is not None else None,
        with_prompt=with_prompt,
        accumulation=accumulation,
        config=config,
        output_dir=output_dir,
        init_file=init_file,
        init_hash=checkpoint_utils.describe_file(Path(init_file))["sha256"][:16] if init_file else None,
        models=(model_fingerprint(args.llm_path), model_fingerprint(args.mt_path)),
    )
    refuse_to_remove_the_start(args, plan)
    return plan


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
    runtime_utils.check_seed(args.seed)
    if not 0 <= args.warmup_ratio < 1:
        raise UserError(f"--warmup_ratio must be at least 0 and below 1, not {args.warmup_ratio}")
    if not (0 < args.lr < math.inf and (args.max_grad_norm is None or args.max_grad_norm > 0)):
        raise UserError(f"--lr and --max_grad_norm must be above 0, not {args.lr} and {args.max_grad_norm}")


def refuse_to_remove_the_start(args, plan: Plan) -> None:
    """Makes sure that what the run is to start from survives what the run removes and writes.

    Raises:
        UserError: for a checkpoint to resume from in a run that starts over, and for an initial mapping in the run's
            own output folder, where each new best mapping replaces it.
    """
    if args.overwrite_output_dir and args.resume_from_checkpoint != "auto":
        raise UserError(
            "--overwrite_output_dir starts over and --resume_from_checkpoint goes on from "
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
        UserError: when that is no whole number.
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


def find_initial_mapping(args, output_dir: Path) -> str | None:
    """The mapping file to start from: the given one, or for the augmentation stage the mapping stage's best.

    Raises:
        UserError: when the augmentation stage has none to start from.
    """
    from data_utils import find_task
    from modeling_mindmerger import find_mapping_file, read_config

    given = args.init_checkpoint
    if given and given.lower() == "none" or args.stage_name == "mapping" and not given:
        return None
    folder = given or str(output_dir.parent / "mapping")
    if not given and not Path(folder).is_dir():
        if args.dry_run:
            warn(f"there is no {folder} yet: the mapping stage has to run first")
            return None
        raise UserError(
            f"the augmentation stage starts from the mapping stage's mapping, but there is no {folder}: run "
            "--stage_name mapping first, or name a mapping with --init_checkpoint ('none' for a fresh one)"
        )
    file, recorded = find_mapping_file(folder), read_config(folder)
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


# ---------------------------------------------------------------------------------------------------------------------
# The run's parts


def load_data(args, plan: Plan, cache_dir=None):
    """Tokenised training set, tokenizers and the dev/train split; tokenising happens once on each machine."""
    from data_readers import describe_faults
    from data_utils import automatic_dev_size, build_training_set, load_tokenizers, split_dev

    tokenizers = together(load_tokenizers, args.mt_path, args.llm_path)
    data = runtime_utils.first_on_each_node(
        build_training_set,
        plan.task,
        args.stage_name,
        tokenizers,
        data_root=args.data_root,
        languages=plan.languages,
        train_num=args.train_num,
        max_seq_len=args.max_seq_len,
        max_gen_len=args.max_gen_len,
        with_prompt=plan.with_prompt,
        cache_dir=cache_dir,
        skip_faulty_rows=args.skip_faulty_rows,
    )
    number = len(data.dataset)
    if data.faults:
        where = "" if args.dry_run else f", all of them listed in {plan.output_dir / FAULTS_FILE}"
        warn(describe_faults(data.faults, where))
    if args.dev_size == "auto":  # the number is what a checkpoint knows
        args.dev_size = automatic_dev_size(number)
        log(f"--dev_size auto: {args.dev_size} of {number} examples")
    dev, train = together(split_dev, number, args.dev_size, args.seed)
    if len(dev) > len(train):
        warn(f"--dev_size {len(dev)} takes {len(dev) / number:.0%} of the examples: --dev_size auto takes a tenth")
    log(f"data: {len(train)} training and {len(dev)} dev examples; " + json.dumps(data.counts, ensure_ascii=False))
    return tokenizers, data, (dev, train)


def check_lengths(args, data) -> None:
    """Checks the longest rows against the positions of the LLM and the encoder, before weights load.

    Raises:
        UserError: for rows longer than a table of positions.
    """
    from modeling_mindmerger import check_positions

    longest, source = int(data.merged_lengths.max()), int(data.encoder_lengths.max())
    check_positions(args.llm_path, longest, "the longest row", "--max_gen_len or --max_seq_len")
    check_positions(args.mt_path, source, "the longest source", "--max_seq_len")


def check_tokens(args, tokenizers, data) -> None:
    """Refuses rows with a token that the LLM or the encoder has no embedding for, before weights load."""
    from data_utils import check_rows
    from model_files import embedding_rows, llm_config, load_config

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


def load_model(args, plan: Plan, device):
    """Frozen towers in the run's dtype, and the mapping in fp32 with its starting weights."""
    import torch

    from deepspeed_utils import loading_towers
    from modeling_mindmerger import MindMerger, load_encoder, load_llm
    from speed_options import apply_liger, compile_layers

    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with placing_memory_named(device), loading_towers(plan.config, bf16):
        llm = load_llm(args.llm_path, dtype, args.attn_implementation)
        encoder = load_encoder(args.mt_path, dtype, args.attn_implementation)
    torch.manual_seed(args.seed)  # the fresh mapping is the same on every rank and for every world size
    model = MindMerger.from_towers(encoder, llm, args.mt_path, args.llm_path)
    model.config.stage, model.config.task = args.stage_name, plan.task.training_name
    model.config.augmentation = plan.with_prompt
    if plan.init_file is not None:
        if is_main():
            model.load_mapping(plan.init_file)
        log(f"mapping: starts from {plan.init_file}")
    else:
        log("mapping: starts fresh")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        compile_layers(model)
    if args.liger:
        apply_liger(llm)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"trainable parameters: {trainable:,} (mapping only)")
    with placing_memory_named(device):
        return model.to(device)


@contextlib.contextmanager
def placing_memory_named(device):
    """Turns running out of memory while models are put in their place into an error that says what to do.

    Raises:
        UserError: when memory ran out within it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not runtime_utils.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory on rank {rank()} while the models are placed on {device}: share their weights among the "
            "GPUs (--deepspeed_config scripts/ds_zero3.json), keep them in host memory (ds_zero3_offload.json), lower "
            "the bucket sizes of your own DeepSpeed config, or use --precision bf16"
        ) from error


@dataclass
class Trainer:
    """Everything the loop needs. Its own state is where the run stands: `step`, (`epoch`, `batch`) and the best dev
    loss so far; a checkpoint holds these, the mapping and the optimizer's moments, and nothing else."""

    args: argparse.Namespace
    plan: Plan
    engine: object
    data: object
    tokenizers: object
    dev: object
    train: object
    device: object
    steps_per_epoch: int
    eval_steps: int
    save_steps: int
    total_steps: int = 0
    signals: object = None
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_dev_loss: float = math.inf
    evaluation_due: bool = False

    def cut(self, indices, micro_batch_size, token_budget=None):
        """This rank's micro-batches of a global batch, and the batch's number of target tokens."""
        from data_utils import cut_global_batch

        lengths = self.data.merged_lengths
        mine = cut_global_batch(indices, lengths, world_size(), micro_batch_size, token_budget)[rank()]
        return mine, int(self.data.target_lengths[indices].sum())

    def heaviest(self, indices, micro_batch_size, token_budget=None):
        """The rows of the micro-batches that may need most memory, the same on every rank."""
        from data_utils import heaviest_batches

        most = math.ceil(self.args.train_batch_size / world_size()) if token_budget else micro_batch_size
        data = self.data
        return heaviest_batches(
            indices, data.merged_lengths, (data.target_lengths, data.encoder_lengths), most, token_budget
        )

    def epoch_steps(self, epoch: int, first: int):
        """(micro-batches of this rank, target tokens, indices) of every optimizer step of an epoch from `first` on."""
        from data_utils import epoch_batches

        args = self.args
        for indices in epoch_batches(self.train, args.train_batch_size, args.seed, epoch)[first:]:
            yield *self.cut(indices, args.train_micro_batch_size_per_gpu, args.micro_batch_tokens), indices

    def loader(self, index_lists):
        """Collated micro-batches in the given order, made ahead of time by threads.

        Threads, not processes: collating a few rows of memory-mapped ids costs little, and forking a process that has
        threads of its own (gloo's, Arrow's, the signal listener's) hangs once in some hundred times.
        """
        from collections import deque
        from concurrent.futures import ThreadPoolExecutor

        threads = self.args.num_workers
        if threads == 0:
            yield from map(self.collated, index_lists)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="collate") as pool:
            ahead = deque()
            for indices in index_lists:
                ahead.append(pool.submit(self.collated, indices))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def collated(self, indices) -> dict:
        """The rows as padded tensors, in pinned memory for a GPU."""
        from data_utils import collate

        rows = self.data.dataset[indices.tolist()]
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        batch = collate(rows, self.tokenizers.encoder_pad_id, self.tokenizers.llm_pad_id)
        if self.device.type == "cuda":
            batch = {name: tensor if tensor is None else tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def to_device(self, batch: dict) -> dict:
        """Ids go to the device; masks stay on the CPU, where packing is planned without a synchronisation."""
        return {
            name: tensor if tensor is None or name.endswith("mask") else tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step` (0-based): linear warm-up, then constant, cosine or linear decay to 0."""
        warmup = math.ceil(self.args.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.args.lr * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}
        return self.args.lr * factor[self.args.lr_scheduler]


@dataclass
class EpochCut:
    """The row numbers of an epoch's micro-batches, made as the loader asks for them: cutting all of a million rows
    beforehand would delay the first step by seconds."""

    trainer: Trainer
    epoch: int
    first: int

    def __iter__(self):
        for micro_batches, _, _ in self.trainer.epoch_steps(self.epoch, self.first):
            yield from (micro.indices for micro in micro_batches)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(trainer: Trainer, record) -> int:
    """Runs from where the trainer stands to the last step, with evaluations and checkpoints where they are due.

    Returns:
        0, or the exit code of the signal that ended it; a checkpoint of that moment is then written.

    Raises:
        UserError: as `train_step` and `evaluate_and_keep` do, and when the disk refuses what is written.
    """
    bar = runtime_utils.progress_bar(
        total=trainer.total_steps, initial=trainer.step, desc=trainer.args.stage_name, unit="step"
    )
    with bar:  # closed after an error too, whose line would else begin behind it
        return train_steps(trainer, record, bar)


def train_steps(trainer: Trainer, record, bar) -> int:
    """The loop of `train`, which also says what it returns; `bar` shows how far it is."""
    code = 0
    if trainer.evaluation_due:  # the run was stopped between a step and its evaluation
        code = evaluate_and_keep(trainer, record)
    while trainer.step < trainer.total_steps and not code:
        epoch, first = trainer.epoch, trainer.batch
        batches = iter(trainer.loader(EpochCut(trainer, epoch, first)))
        for micro_batches, target_tokens, indices in trainer.epoch_steps(epoch, first):
            line, code = train_step(trainer, batches, micro_batches, target_tokens, indices)
            record(line, epoch)
            trainer.step += 1
            trainer.epoch, trainer.batch = divmod(
                epoch * trainer.steps_per_epoch + trainer.batch + 1, trainer.steps_per_epoch
            )
            bar.update()
            if trainer.step % STEPS_PER_RELEASE == 0:
                trainer.data.release_pages()
            end = trainer.step == trainer.total_steps
            due = len(trainer.dev) and (trainer.step % trainer.eval_steps == 0 or trainer.batch == 0 or end)
            if due:
                trainer.evaluation_due = True
                code = code or evaluate_and_keep(trainer, record)
            elif end:  # without a dev split the last mapping is the best known
                save_mapping(trainer, trainer.plan.output_dir)
                save_mapping(trainer, trainer.plan.output_dir / "last")
            if trainer.step % trainer.save_steps == 0 or end or code or trainer.signals.save_agreed:
                record.flush()
                save_checkpoint(trainer)
                trainer.signals.save_agreed = False
            if end or code:
                break
    return code


def train_step(trainer: Trainer, batches, micro_batches, target_tokens: int, indices) -> tuple[dict, int]:
    """One optimizer step: the loss is summed over all its target tokens and divided by their number, so that neither
    the cut into micro-batches nor the number of processes changes the gradient.

    Returns:
        the step's line of the log, and the exit code of a stop that any rank was asked for or 0.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite, or memory ran out.
    """
    import torch

    engine, started = trainer.engine, time.perf_counter()
    rate = trainer.learning_rate(trainer.step)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate
    losses, waited = [], 0.0
    for number, micro in enumerate(micro_batches, start=1):
        asked = time.perf_counter()
        collated = next(batches)
        waited += time.perf_counter() - asked
        batch = trainer.to_device(collated)
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        with out_of_memory_named(batch):
            # DeepSpeed averages gradients over processes, hence the factor. Without rows, a rank passes with weight 0.
            loss = engine(**batch).loss_sum * (micro.weight * world_size() / target_tokens)
            engine.backward(loss, scale_wrt_gas=False)
        losses.append(loss.detach())
        trainer.signals.alive()
    step_loss = torch.stack(losses).sum() / world_size()
    with out_of_memory_named(batch, UPDATE_MEMORY_FLAGS, f"in the update of step {trainer.step + 1}, "):
        norm, loss, code = update(trainer, step_loss, losses, micro_batches)
    seconds = time.perf_counter() - started
    lengths = trainer.data.merged_lengths
    processed = sum(len(m.indices) * int(lengths[m.indices].max()) for m in micro_batches)
    line = {
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "target_tokens": target_tokens,
        "samples_per_s": len(indices) / seconds,
        "tokens_per_s": int(lengths[indices].sum()) / seconds,
        "padding_share": 1 - sum(int(lengths[m.indices].sum() * m.weight) for m in micro_batches) / processed,
        "data_wait_share": waited / seconds,
        "peak_memory_gb": peak_memory_gb(trainer.device),
    }
    return line, code


def update(trainer: Trainer, step_loss, losses, micro_batches) -> tuple[float, float, int]:
    """Clips and applies the gradient.

    Returns:
        its norm before clipping, the global loss, and the exit code of a stop that any rank was asked for or 0.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite.
    """
    import torch

    from deepspeed_utils import zero_stage

    engine = trainer.engine
    by_hand = zero_stage(trainer.plan.config) == 0
    norm = step_loss.new_zeros(())
    if by_hand:
        norm = torch.nn.utils.clip_grad_norm_(list(engine.module.mapping.parameters()), trainer.args.max_grad_norm)
    # The one synchronisation of the step. At ZeRO 0 all ranks have the same norm.
    code, sums = trainer.signals.agree(trainer.device, step_loss, norm / world_size())
    loss, norm = sums.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise not_finite(trainer, loss, norm, losses, micro_batches)
    engine.step()
    if not by_hand:
        norm = float(engine.get_global_grad_norm())
        if not engine.was_step_applied() or not math.isfinite(norm):
            raise not_finite(trainer, loss, norm, losses, micro_batches)
    return norm, loss, code


@contextlib.contextmanager
def out_of_memory_named(batch: dict, instead: str = STEP_MEMORY_FLAGS, where: str = ""):
    """Turns running out of memory into an error that names the micro-batch and what to do `instead`.

    Raises:
        UserError: when memory ran out within it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not runtime_utils.is_out_of_memory(error):
            raise
        rows, longest = batch["encoder_input_ids"].shape
        sizes = ", ".join(
            f"{name} {tuple(batch[key].shape)[1]}"
            for name, key in (("encoder", "encoder_input_ids"), ("prompt", "prompt_ids"), ("target", "target_ids"))
            if batch.get(key) is not None
        )
        raise UserError(
            f"out of memory on rank {rank()} {where}with a micro-batch of {rows} rows, longest {sizes} tokens: "
            f"{instead}"
        ) from error


def probe_memory(trainer: Trainer) -> None:
    """Forward and backward passes on the heaviest micro-batches there can be, and forward passes on the dev split's, so
    that memory runs out now or not at all.

    Raises:
        UserError: when it does.
    """
    import torch

    args = trainer.args
    for rows in trainer.heaviest(trainer.train, args.train_micro_batch_size_per_gpu, args.micro_batch_tokens):
        batch = trainer.to_device(next(iter(trainer.loader([rows]))))
        trainer.engine.set_gradient_accumulation_boundary(False)
        with out_of_memory_named(batch):
            trainer.engine.backward(trainer.engine(**batch).loss_sum * 0.0, scale_wrt_gas=False)
    for rows in trainer.heaviest(trainer.dev, args.eval_batch_size):
        batch = trainer.to_device(next(iter(trainer.loader([rows]))))
        with out_of_memory_named(batch, EVAL_MEMORY_FLAGS), torch.no_grad():
            trainer.engine(**batch)


def not_finite(trainer: Trainer, loss, norm, losses, micro_batches) -> UserError:
    """The error that ends a run whose loss or gradient is not finite, naming the examples that were in it."""
    from modeling_mindmerger import CHECK_WEIGHTS

    bad = [m for value, m in zip(losses, micro_batches, strict=True) if not math.isfinite(value.item())]
    rows = [i for m in (bad or micro_batches) for i in m.indices.tolist()]
    ids = trainer.data.dataset[rows]["id"]
    everywhere = runtime_utils.gather_objects((bool(bad), ids))
    chosen = [ids for is_bad, ids in everywhere if is_bad] or [ids for _, ids in everywhere]
    names = ", ".join([name for ids in chosen for name in ids][:20])
    weight = trainer.engine.module.bad_weight()  # no lower rate helps against a damaged model
    instead = f"{weight} is not finite: {CHECK_WEIGHTS}" if weight else "lower --lr, or use --precision fp32"
    return runtime_utils.ReportedError(
        f"loss {loss} with gradient norm {norm} at step {trainer.step + 1} is not finite: stopped before the update, "
        f"earlier checkpoints are kept; examples: {names}; {instead}"
    )


def dev_loss(trainer: Trainer) -> tuple[float, int]:
    """Mean cross-entropy over the dev split's target tokens, its examples shared among the ranks.

    Returns:
        the loss and 0, or nan and the exit code of a signal that cut it short.
    """
    import torch

    micro_batches, target_tokens = trainer.cut(trainer.dev, trainer.args.eval_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    nothing = torch.zeros((), device=trainer.device)
    with torch.no_grad():
        batches = trainer.loader([m.indices for m in micro_batches])
        for number, (micro, batch) in enumerate(zip(micro_batches, batches, strict=True)):
            with out_of_memory_named(batch, EVAL_MEMORY_FLAGS):
                total += trainer.engine(**trainer.to_device(batch)).loss_sum.double() * micro.weight
            trainer.signals.alive()
            if number % EVAL_BATCHES_PER_CHECK == 0 and (code := trainer.signals.agree(trainer.device, nothing)[0]):
                return math.nan, code
    code, (total,) = trainer.signals.agree(trainer.device, total)
    return total.item() / target_tokens, code


def evaluate_and_keep(trainer: Trainer, record) -> int:
    """Evaluates on the dev split; keeps the mapping as the last one and, when it is, as the best.

    Returns:
        0, or the exit code of a signal; the evaluation is then due again unless it was complete.

    Raises:
        UserError: on every rank, when the dev loss is not finite.
    """
    loss, code = dev_loss(trainer)
    if math.isnan(loss) and code:
        return code
    if not math.isfinite(loss):  # all ranks have the same
        raise runtime_utils.ReportedError(
            f"dev loss {loss} at step {trainer.step} is not finite: stopped, earlier checkpoints and the best mapping "
            "so far are kept; lower --lr, or use --precision fp32"
        )
    trainer.evaluation_due = False
    record.evaluation(trainer.step, loss)
    best = loss < trainer.best_dev_loss
    if best:
        trainer.best_dev_loss = loss
        save_mapping(trainer, trainer.plan.output_dir)
    save_mapping(trainer, trainer.plan.output_dir / "last")
    log(
        f"step {trainer.step}: dev loss {loss:.4f}, perplexity {perplexity(loss):.3f}{' (best so far)' if best else ''}"
    )
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def save_mapping(trainer: Trainer, folder: Path) -> None:
    """Writes the mapping in the safe and in the released format."""
    from deepspeed_utils import mapping_state
    from modeling_mindmerger import RELEASED_FILE, save_released

    state = mapping_state(trainer.engine)

    def write():
        if is_main():
            trainer.engine.module.save_pretrained(folder, state)
            save_released(folder / RELEASED_FILE, state)

    with trainer.signals.saving():
        together(write)


def save_checkpoint(trainer: Trainer) -> None:
    """Writes the complete training state; all ranks gather, rank 0 writes."""
    from deepspeed_utils import mapping_state, optimizer_state

    tensors = {f"mapping.{k}": v for k, v in mapping_state(trainer.engine).items()} | optimizer_state(trainer.engine)
    state = {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "examples_in_epoch": trainer.batch * trainer.args.train_batch_size,
        "best_dev_loss": None if math.isinf(trainer.best_dev_loss) else trainer.best_dev_loss,
        "evaluation_due": trainer.evaluation_due,
        "identity": identity(trainer.args, trainer.plan, trainer.data),
    }

    def write():
        if is_main():
            checkpoint_utils.write_checkpoint(
                trainer.plan.output_dir, trainer.step, tensors, state, trainer.args.save_total_limit
            )

    with trainer.signals.saving():
        together(write)


def identity(args, plan: Plan, data) -> dict:
    """What makes a run this run: what must not change in its continuation, and what may when the user says so."""
    fixed = {
        "task": plan.task.training_name,
        "stage_name": args.stage_name,
        "augmentation": plan.with_prompt,
        "seed": args.seed,
        "llm": plan.models[0],
        "encoder": plan.models[1],
        "precision": args.precision,
        "dev_size": args.dev_size,
        "skip_faulty_rows": args.skip_faulty_rows,
        # These make other data too; before its hash, so that the difference has a name.
        "languages": [language.code for language in plan.languages] if plan.languages else None,
        "train_num": args.train_num,
        "max_seq_len": args.max_seq_len,
        "max_gen_len": args.max_gen_len,
        "data": data.fingerprint,
    }
    # Not the initial mapping's path: another file may stand there, and the same one elsewhere.
    return fixed | {name: getattr(args, name) for name in sorted(CHANGEABLE)} | {"init_checkpoint": plan.init_hash}


def start_over(output_dir: Path) -> None:
    """Removes what an earlier run left in the output folder, on rank 0.

    Raises:
        UserError: when something stays, naming the first such path: the run would go on from it.
    """
    if not is_main():
        return
    files = (
        "pytorch_model.bin",
        "mapping.safetensors",
        "config.json",
        "README.md",
        "log.jsonl",
        "loss.png",
        FAULTS_FILE,
    )
    others = ("last", *files, FAULTS_FILE, TENSORBOARD_FOLDER, WANDB_FILE)
    for path in (*checkpoint_utils.list_checkpoints(output_dir), *(output_dir / name for name in others)):
        checkpoint_utils.remove(path)
        if os.path.lexists(path):
            raise UserError(f"--overwrite_output_dir cannot remove {path}: remove it, or use another --save_name")


def read_resumable(args, plan: Plan, data) -> tuple:
    """The checkpoint to continue from as (folder, tensors, state), or three times None. Rank 0 reads it.

    Raises:
        UserError: when it belongs to another run, naming the first difference, or a named one is damaged, or its
            content is no training state of these models.
    """
    from modeling_mindmerger import config_of_models, mapping_shapes

    if not is_main():
        return None, None, None
    given = None if args.resume_from_checkpoint == "auto" else Path(args.resume_from_checkpoint)
    folder = given
    if given is None or checkpoint_utils.holds_checkpoints(given):
        folder, skipped = checkpoint_utils.newest_valid(given or plan.output_dir)
        for line in skipped:
            warn(f"skipped {line}")
        if folder is None and given is None:
            return None, None, None
        if folder is None:
            raise UserError(f"no checkpoint in {given} is whole: pass another folder, or auto")
    tensors, state = checkpoint_utils.read_checkpoint(folder)
    checkpoint_utils.check_state(folder, state)
    for name, value in identity(args, plan, data).items():
        before = state["identity"].get(name)
        if before == value or name in LATER_ENTRIES and name not in state["identity"]:
            continue
        if name not in CHANGEABLE:
            hint = " - a file, a template or a tokenizer has changed" if name == "data" else ""
            raise UserError(
                f"{folder} was trained with another {name} ({before!r}, this run has {value!r}{hint}): use the same, "
                "or another --save_name, or --overwrite_output_dir to start over"
            )
        if name not in args.allow_changed:
            raise UserError(
                f"{folder} was trained with --{name} {before}, this run has {value}: use the same, or say "
                f"--allow_changed {name} to go on with the new value, or --overwrite_output_dir to start over"
            )
        log(f"--{name} was {before}, from here on {value}")
    shapes = mapping_shapes(config_of_models(args.mt_path, args.llm_path))
    checkpoint_utils.check_tensors(folder, tensors, {name: p.shape for name, p in shapes.items()})
    later = checkpoint_utils.later_checkpoints(plan.output_dir, state["step"])
    if later:
        names = ", ".join(entry.name for entry in later)
        warn(f"goes on from step {state['step']}: the first new checkpoint replaces {names}")
    return folder, tensors, state


def write_settings(args, plan: Plan, data) -> None:
    """Writes what really ran: arguments, versions, data fingerprint, and DeepSpeed's effective config."""
    if not is_main():
        return
    settings = {
        "arguments": vars(args),
        "command": sys.argv,
        "world_size": world_size(),
        "task": plan.task.training_name,
        "augmentation": plan.with_prompt,
        "init_file": plan.init_file,
        "versions": runtime_utils.versions(),
        "data": {"fingerprint": data.fingerprint, "counts": data.counts, "files": data.files},
    }
    runtime_utils.write_json_atomic(plan.output_dir / "args.json", settings)
    if data.faults:
        lines = "".join(f"{fault}\n" for fault in data.faults)
        runtime_utils.write_text_atomic(plan.output_dir / FAULTS_FILE, lines)
    runtime_utils.write_json_atomic(plan.output_dir / "ds_config.json", plan.config)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def build_trainer(args, plan: Plan, device, tokenizers, data, split, checkpoint) -> Trainer:
    """Model and engine put together with the data, standing where the checkpoint left off if there is one."""
    from deepspeed_utils import describe, load_optimizer_state, make_engine

    folder, tensors, state = checkpoint
    model = together(load_model, args, plan, device)
    if plan.init_file is not None:
        runtime_utils.broadcast_weights(model.mapping)
    if folder is not None:
        mapping = {name.removeprefix("mapping."): t for name, t in tensors.items() if name.startswith("mapping.")}
        model.mapping.load_state_dict(mapping, strict=True)
    with placing_memory_named(device):
        engine = make_engine(model, plan.config, args.lr)
    eval_steps = args.eval_steps or max(1, DEFAULT_EVAL_MICRO_BATCHES // plan.accumulation)
    trainer = Trainer(
        args=args,
        plan=plan,
        engine=engine,
        data=data,
        tokenizers=tokenizers,
        dev=split[0],
        train=split[1],
        device=device,
        steps_per_epoch=steps_per_epoch(args, split),
        eval_steps=eval_steps,
        save_steps=args.save_steps or eval_steps,
    )
    if folder is not None:
        first = trainer.to_device(next(iter(trainer.loader([trainer.train[:1]]))))
        load_optimizer_state(engine, tensors, state["step"], first)
        trainer.step, trainer.epoch = state["step"], state["epoch"]
        # With another batch size, as --allow_changed permits, the epoch goes on at the nearest batch before.
        trainer.batch = state["examples_in_epoch"] // args.train_batch_size
        trainer.best_dev_loss = math.inf if state["best_dev_loss"] is None else state["best_dev_loss"]
        trainer.evaluation_due = state["evaluation_due"]
    left = (args.epoch_num - trainer.epoch) * trainer.steps_per_epoch - trainer.batch
    trainer.total_steps = min(args.max_steps or math.inf, trainer.step + max(0, left))
    log(f"{describe(plan.config)}; {trainer.steps_per_epoch} steps per epoch, {trainer.total_steps} in all")
    where = f"resumes from {folder}" if folder is not None else f"starts fresh, no checkpoint in {plan.output_dir},"
    log(f"{where} at step {trainer.step}")
    return trainer


def steps_per_epoch(args, split) -> int:
    """Optimizer steps of one pass over the training indices."""
    return math.ceil(len(split[1]) / args.train_batch_size)


def prepare(args):
    """Checks and settles everything that needs no model: the plan, the data, the checkpoint to continue from."""
    plan = together(check_arguments, args)
    plan.init_file, plan.init_hash = runtime_utils.broadcast_object((plan.init_file, plan.init_hash))
    cache_dir = None
    with contextlib.ExitStack() as stack:
        if args.dry_run:
            cache_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="mindmerger-dry-run-"))
        tokenizers, data, split = load_data(args, plan, cache_dir)
        inputs = {"data": data.fingerprint, "LLM (--llm_path)": plan.models[0], "encoder (--mt_path)": plan.models[1]}
        runtime_utils.agree_on(inputs)
        together(check_lengths, args, data)
        together(check_tokens, args, tokenizers, data)
        if args.dry_run:
            together(print_estimate, args, plan, data, split)
            return None
    return plan, tokenizers, data, split


def training_flop(args, data, rows, llm, encoder) -> float:
    """Estimates the arithmetic of one pass over training rows from their real lengths, without padding and attention.

    Each weight of the LLM's layers takes 4 FLOP for a position (forward, and backward to the inputs alone; 6 where
    gradient checkpointing computes the forward pass again), each of its output head the same for a target token, each
    of the encoder's 2 for a source token. Embeddings are looked up, and the mapping is small beside all this.

    Args:
        rows: (n,) row numbers.
        llm, encoder: the models, which may be without storage.
    """
    head = llm.get_output_embeddings().weight
    tables = {id(table): table.numel() for table in (llm.get_input_embeddings().weight, head)}
    layers = sum(p.numel() for p in llm.parameters()) - sum(tables.values())
    encoding = sum(p.numel() for p in encoder.parameters()) - encoder.get_input_embeddings().weight.numel()
    positions, targets, sources = (
        int(lengths[rows].sum(dtype="int64"))
        for lengths in (data.merged_lengths, data.target_lengths, data.encoder_lengths)
    )
    passes = 6 if args.gradient_checkpointing else 4
    return float(passes * layers * positions + 4 * head.numel() * targets + 2 * encoding * sources)


def print_estimate(args, plan: Plan, data, split) -> None:
    """Prints the effective settings, the steps and the memory that weights and optimizer take on each GPU."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from deepspeed_utils import offloaded, zero_stage
    from model_files import llm_config, load_config
    from modeling_mindmerger import Mapping, config_of_models

    if not is_main():
        return
    widths = config_of_models(args.mt_path, args.llm_path)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(args.llm_path)[0], trust_remote_code=False)
        encoder = AutoModel.from_config(load_config(args.mt_path), trust_remote_code=False)
        encoder = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder
        mapping = Mapping(widths.encoder_width, widths.llm_width)
    frozen, trained = (
        sum(p.numel() for model in models for p in model.parameters()) for models in ((llm, encoder), (mapping,))
    )
    stage, size = zero_stage(plan.config), world_size()
    shards = {"weights": size if stage == 3 else 1, "gradient": size if stage >= 2 else 1, "Adam": size if stage else 1}
    frozen_gb = frozen * (2 if args.precision == "bf16" else 4) / shards["weights"] / 1e9
    parts_gb = {"frozen weights": frozen_gb, "mapping": trained * 4 / shards["weights"] / 1e9}
    parts_gb |= {"gradient": trained * 4 / shards["gradient"] / 1e9, "Adam": trained * 8 / shards["Adam"] / 1e9}
    moved = {"offload_param": ("frozen weights", "mapping"), "offload_optimizer": ("Adam",)}
    host_gb = {name: parts_gb.pop(name) for key in offloaded(plan.config) for name in moved[key]}
    print(json.dumps({"arguments": vars(args), "deepspeed": plan.config}, indent=2, default=str))
    print(f"output folder: {plan.output_dir}")
    print(f"examples: {len(split[1])} training, {len(split[0])} dev; {json.dumps(data.counts, ensure_ascii=False)}")
    steps = steps_per_epoch(args, split)
    print(f"steps per epoch: {steps}; in all: {min(args.max_steps or math.inf, steps * args.epoch_num)}")
    print(f"longest row: {int(data.merged_lengths.max())} positions, mean {data.merged_lengths.mean():.0f}")
    print(f"parameters: {frozen:,} frozen in {args.precision}, {trained:,} trained in fp32")
    print(
        f"memory on each of {size} GPUs at ZeRO {stage}: {parts_gb.pop('frozen weights', 0):.3f} GB frozen weights, "
        f"{sum(parts_gb.values()):.3f} GB {', '.join(parts_gb).replace(', Adam', ' and Adam')}; activations come on top"
    )
    if host_gb:
        print(
            f"offloaded, for each GPU: {sum(host_gb.values()):.3f} GB {', '.join(host_gb)}; of offloaded weights, the "
            "layers at work come on top of the GPU's memory too"
        )
    total = min(args.max_steps or math.inf, steps * args.epoch_num)
    flop = training_flop(args, data, split[1], llm, encoder) * total / steps
    rate = PEAK_FLOPS[args.precision]
    print(
        f"arithmetic: {flop:.3g} FLOP in all; at an assumed {ASSUMED_SHARE:.0%} of the {rate / 1e12:g} TFLOP/s in "
        f"{args.precision} of an {ASSUMED_GPU}, {flop / (size * rate * ASSUMED_SHARE) / 3600:.3g} h on {size} of them "
        "(an estimate, not measured; loading, evaluations and checkpoints come on top)"
    )
    print("dry run: nothing was written")


def run(args, device, plan: Plan, tokenizers, data, split) -> int:
    """Trains the stage in its locked output folder; returns the exit code."""
    from interrupt_utils import FolderLock, Signals

    with contextlib.ExitStack() as stack:
        lock = together(lambda: FolderLock(plan.output_dir) if is_main() else None)
        if lock is not None:
            stack.callback(lock.release)
            checkpoint_utils.remove_leftovers(plan.output_dir)
        if args.overwrite_output_dir:
            together(start_over, plan.output_dir)
        checkpoint = runtime_utils.broadcast_object(together(read_resumable, args, plan, data))
        trainer = build_trainer(args, plan, device, tokenizers, data, split, checkpoint)
        record = Recorder(args, plan.output_dir)
        stack.push(lambda kind, *_: record.close(failed=kind is not None))
        together(write_settings, args, plan, data)
        together(record.cut_back, trainer.step, trainer.evaluation_due)
        trainer.engine.train()
        together(probe_memory, trainer)
        trainer.signals = Signals()
        code = train(trainer, record)
        with trainer.signals.saving():
            together(record.flush)
            if is_main():
                draw_loss(record.path, plan.output_dir / "loss.png")
        # Not after an error: a launcher's SIGTERM must not end this rank before it has said what happened.
        trainer.signals.close()
    end = "ended by a signal" if code else "finished"
    log(f"{end} at step {trainer.step} of {trainer.total_steps}: {plan.output_dir}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, trains one stage, writes its outputs; returns the exit code."""
    watch_launcher()
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks for a checkpoint; before the first step there is none to write
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = runtime_utils.init_distributed(force=True)
    import torch

    from deepspeed_utils import quiet_start

    torch.use_deterministic_algorithms(args.deterministic)
    quiet_start()
    prepared = prepare(args)
    return run(args, device, *prepared) if prepared is not None else 0


if __name__ == "__main__":
    runtime_utils.run_main(main)
elif __name__ == "__mp_main__":  # in a process that tokenises, which starts by importing this file
    end_with_parent()
