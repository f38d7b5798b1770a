"""Trains MindMerger's mapping: both stages share this command line and this one loop.

    deepspeed run_training.py --deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math \\
        --stage_name mapping --train_num 100000 --train_batch_size 128 --train_micro_batch_size_per_gpu 8

Reads top to bottom: flags, what can be checked before models load, the run's parts, the loop, its outputs.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint_utils
import runtime_utils
from runtime_utils import UserError, is_main, log, parse_bool, rank, together, warn, world_size

DEFAULT_EVAL_MICRO_BATCHES = 2000


def build_parser() -> argparse.ArgumentParser:
    """Every flag, its default and what it does."""
    parser = runtime_utils.CommandParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    add("--dev_size", type=int, default=3000, help="examples kept aside to select the best mapping")
    add("--augmentation", type=parse_bool, help="put the prompt after the mapped source (default: by stage)")
    add("--max_seq_len", type=int, default=512, help="limit of the encoder's tokens")
    add("--max_gen_len", type=int, default=512, help="limit of the prompt's and of the target's tokens")
    add("--num_workers", type=int, default=2, help="processes that collate batches ahead of the training process")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=2e-5, help="learning rate of AdamW")
    add("--lr_scheduler", choices=("constant", "cosine", "linear"), default="constant", help="decay after warm-up")
    add("--warmup_ratio", type=float, default=0.0, help="share of the steps with a linearly rising learning rate")
    add("--max_grad_norm", type=float, default=1.0, help="gradient clipping")
    add("--epoch_num", type=int, default=3, help="passes over the training set")
    add("--max_steps", type=int, help="end after this many optimizer steps")
    add("--train_batch_size", type=int, default=24, help="examples of one optimizer step, over all processes")
    add("--train_micro_batch_size_per_gpu", type=int, default=1, help="examples of one forward pass")
    add("--gradient_accumulation", type=int, help="checked against the two above and the number of processes")
    add("--micro_batch_tokens", type=int, help="cut micro-batches by this many positions instead of rows")
    add("--eval_batch_size", type=int, default=2, help="examples of one forward pass on the dev split")
    add("--gradient_checkpointing", action="store_true", help="less memory for about a third more arithmetic")
    add("--seed", type=int, default=0, help="of the fresh mapping, the dev split and the order of the examples")
    add("--deterministic", action="store_true", help="deterministic kernels: bit-exact resume on CUDA too")

    add = parser.add_argument_group("outputs").add_argument
    add("--save_name", default="MindMerger", help="outputs go to OUTPUT_DIR/SAVE_NAME/TASK/STAGE")
    add("--output_dir", default="outputs", help="where outputs of all runs go")
    add("--overwrite_output_dir", action="store_true", help="start over, removing this run's checkpoints and log")
    add("--resume_from_checkpoint", default="auto", help="auto (newest valid one in the output folder) or a folder")
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


def check_arguments(args) -> Plan:
    """Settles the flags against each other, the data tasks and the disk.

    Raises:
        UserError: for the first thing that cannot be.
    """
    from data_utils import find_task, parse_languages
    from deepspeed_utils import effective_config, read_deepspeed_config
    from modeling_mindmerger import check_mapping, config_of_models

    args.llm_path, args.mt_path = args.llm_path.rstrip("/") or "/", args.mt_path.rstrip("/") or "/"
    if args.gpu is not None:
        warn("--gpu is ignored: choose GPUs with the launcher, for instance deepspeed --include localhost:0")
    positive = ("train_num", "max_seq_len", "max_gen_len", "epoch_num", "max_steps", "train_batch_size")
    positive += ("train_micro_batch_size_per_gpu", "micro_batch_tokens", "eval_batch_size", "eval_steps", "save_steps")
    positive += ("save_total_limit", "logging_steps")
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.warmup_ratio < 1:
        raise UserError(f"--warmup_ratio must be at least 0 and below 1, not {args.warmup_ratio}")
    if args.lr <= 0 or args.max_grad_norm <= 0:
        raise UserError(f"--lr and --max_grad_norm must be above 0, not {args.lr} and {args.max_grad_norm}")
    task = find_task(args.task)
    stage = args.stage_name
    if stage == "augmentation" and task.read_augmentation is None:
        raise UserError(f"task {args.task} has no augmentation data: use --stage_name mapping, or another --task")
    accumulation = settle_accumulation(args)
    config = effective_config(
        read_deepspeed_config(args.deepspeed_config),
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
    output_dir = Path(args.output_dir) / args.save_name / task.training_name / stage
    check_reporting(args.report_to)
    plan = Plan(
        task=task,
        languages=parse_languages(args.languages) if args.languages else None,
        with_prompt=with_prompt,
        accumulation=accumulation,
        config=config,
        output_dir=output_dir,
        init_file=find_initial_mapping(args, output_dir),
    )
    if plan.init_file is not None:
        check_mapping(plan.init_file, config_of_models(args.mt_path, args.llm_path))
    return plan


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
    from modeling_mindmerger import find_mapping_file

    if args.init_checkpoint and args.init_checkpoint.lower() != "none":
        return str(find_mapping_file(args.init_checkpoint))
    if args.stage_name == "mapping" or args.init_checkpoint:
        return None
    folder = output_dir.parent / "mapping"
    if not folder.is_dir():
        raise UserError(
            f"the augmentation stage starts from the mapping stage's mapping, but there is no {folder}: run "
            "--stage_name mapping first, or name a mapping with --init_checkpoint ('none' for a fresh one)"
        )
    return str(find_mapping_file(folder))


def check_reporting(where: str) -> None:
    """Refuses a report target whose package is absent."""
    import importlib.util

    package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(where)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--report_to {where} needs the package {package}: pip install {package}")


# ---------------------------------------------------------------------------------------------------------------------
# The run's parts


def load_data(args, plan: Plan):
    """Tokenised training set, tokenizers and the dev/train split; tokenising happens once on each machine."""
    from data_utils import build_training_set, load_tokenizers, split_dev

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
    )
    dev, train = together(split_dev, len(data.dataset), args.dev_size, args.seed)
    log(f"data: {len(train)} training and {len(dev)} dev examples; " + json.dumps(data.counts, ensure_ascii=False))
    return tokenizers, data, dev, train


def check_lengths(args, data) -> None:
    """Refuses rows that the LLM or the encoder has no positions for, before weights load."""
    from modeling_mindmerger import load_config

    longest = int((2 + data.encoder_lengths + data.prompt_lengths + data.target_lengths).max())
    for path, needed, flag in (
        (args.llm_path, longest, "--max_gen_len or --max_seq_len"),
        (args.mt_path, int(data.encoder_lengths.max()), "--max_seq_len"),
    ):
        limit = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
        if limit is not None and needed > limit:
            raise UserError(f"the longest row needs {needed} positions but {path} has {limit}: lower {flag}")


def load_model(args, plan: Plan, device):
    """Frozen towers in the run's dtype, and the mapping in fp32 with its starting weights."""
    import torch

    from deepspeed_utils import loading_towers
    from modeling_mindmerger import MindMerger, load_encoder, load_llm

    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with loading_towers(plan.config, bf16):
        llm = load_llm(args.llm_path, dtype, args.attn_implementation)
        encoder = load_encoder(args.mt_path, dtype, args.attn_implementation)
    torch.manual_seed(args.seed)  # the fresh mapping is the same on every rank and for every world size
    model = MindMerger.from_towers(encoder, llm, args.mt_path, args.llm_path)
    model.config.stage, model.config.task = args.stage_name, plan.task.training_name
    model.config.augmentation = plan.with_prompt
    if plan.init_file is not None:
        model.load_mapping(plan.init_file)
        log(f"mapping: starts from {plan.init_file}")
    else:
        log("mapping: starts fresh")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"trainable parameters: {trainable:,} (mapping only)")
    return model.to(device)


@dataclass
class Trainer:
    """Everything the loop needs; no state of its own but `step` and the best dev loss."""

    args: argparse.Namespace
    plan: Plan
    engine: object
    data: object
    tokenizers: object
    dev: object
    train: object
    device: object
    steps_per_epoch: int
    total_steps: int
    eval_steps: int
    save_steps: int
    step: int = 0
    best_dev_loss: float = math.inf

    def cut(self, indices, micro_batch_size, token_budget=None):
        """This rank's micro-batches of a global batch, and the batch's number of target tokens."""
        from data_utils import cut_global_batch

        lengths = self.data.merged_lengths
        mine = cut_global_batch(indices, lengths, world_size(), micro_batch_size, token_budget)[rank()]
        return mine, int(self.data.target_lengths[indices].sum())

    def epoch_steps(self, epoch: int, first: int):
        """(micro-batches of this rank, target tokens, indices) of every optimizer step of an epoch from `first` on."""
        from data_utils import epoch_batches

        args = self.args
        for indices in epoch_batches(self.train, args.train_batch_size, args.seed, epoch)[first:]:
            yield *self.cut(indices, args.train_micro_batch_size_per_gpu, args.micro_batch_tokens), indices

    def loader(self, micro_batches):
        """Collated micro-batches in the given order, made ahead of time by worker processes."""
        from functools import partial

        from torch.utils.data import DataLoader

        from data_utils import collate

        return DataLoader(
            self.data.dataset,
            batch_sampler=micro_batches,
            collate_fn=partial(
                collate, encoder_pad_id=self.tokenizers.encoder_pad_id, llm_pad_id=self.tokenizers.llm_pad_id
            ),
            num_workers=self.args.num_workers,
            pin_memory=self.device.type == "cuda",
        )

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


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(trainer: Trainer, record) -> None:
    """Runs from `trainer.step` to the last step, with evaluations and checkpoints where they are due."""
    from tqdm import tqdm

    bar = tqdm(total=trainer.total_steps, initial=trainer.step, desc=trainer.args.stage_name, disable=not is_main())
    while trainer.step < trainer.total_steps:
        epoch, first = divmod(trainer.step, trainer.steps_per_epoch)
        batches = iter(trainer.loader([m.indices for s in trainer.epoch_steps(epoch, first) for m in s[0]]))
        for micro_batches, target_tokens, indices in trainer.epoch_steps(epoch, first):
            record(train_step(trainer, batches, micro_batches, target_tokens, indices), epoch)
            trainer.step += 1
            bar.update()
            end_of_epoch = trainer.step % trainer.steps_per_epoch == 0
            end = trainer.step == trainer.total_steps
            if len(trainer.dev) and (trainer.step % trainer.eval_steps == 0 or end_of_epoch or end):
                evaluate_and_keep(trainer, record)
            elif end:
                save_mapping(trainer, trainer.plan.output_dir)  # without a dev split the last mapping is the best known
            if trainer.step % trainer.save_steps == 0 or end:
                record.flush()
                save_checkpoint(trainer)
            if end:
                break
    bar.close()


def train_step(trainer: Trainer, batches, micro_batches, target_tokens: int, indices) -> dict:
    """One optimizer step: the loss is summed over all its target tokens and divided by their number, so that neither
    the cut into micro-batches nor the number of processes changes the gradient.

    Returns:
        the step's line of the log.

    Raises:
        UserError: on every rank, before the update, when loss or gradient is not finite.
    """
    import torch

    engine, started = trainer.engine, time.perf_counter()
    rate = trainer.learning_rate(trainer.step)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate
    losses = []
    for number, micro in enumerate(micro_batches, start=1):
        batch = trainer.to_device(next(batches))
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        out = engine(**batch)
        # DeepSpeed averages gradients over processes, hence the factor. A process without rows passes with weight 0.
        loss = out.loss_sum * (micro.weight * world_size() / target_tokens)
        engine.backward(loss, scale_wrt_gas=False)
        losses.append(loss.detach())
    step_loss = torch.stack(losses).sum() / world_size()
    if world_size() > 1:
        torch.distributed.all_reduce(step_loss)
    norm = update(trainer, step_loss, losses, micro_batches)
    seconds = time.perf_counter() - started
    real = int(trainer.data.merged_lengths[indices].sum())
    processed = sum(len(m.indices) * int(trainer.data.merged_lengths[m.indices].max()) for m in micro_batches)
    return {
        "loss": step_loss,
        "lr": rate,
        "grad_norm": norm,
        "target_tokens": target_tokens,
        "samples_per_s": len(indices) / seconds,
        "tokens_per_s": real / seconds,
        "padding_share": 1 - sum(int(trainer.data.merged_lengths[m.indices].sum()) for m in micro_batches) / processed,
        "peak_memory_gb": peak_memory_gb(trainer.device),
    }


def update(trainer: Trainer, step_loss, losses, micro_batches) -> float:
    """Clips and applies the gradient; returns its norm before clipping."""
    import torch

    from deepspeed_utils import zero_stage

    engine = trainer.engine
    if zero_stage(trainer.plan.config) == 0:
        parameters = list(engine.module.mapping.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        # The one synchronisation of the step.
        norm, loss_value = torch.stack([norm, step_loss]).tolist()
    else:
        norm, loss_value = None, step_loss.item()
    if not (math.isfinite(loss_value) and (norm is None or math.isfinite(norm))):
        raise not_finite(trainer, loss_value, norm, losses, micro_batches)
    engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
        if not engine.was_step_applied() or not math.isfinite(norm):
            raise not_finite(trainer, loss_value, norm, losses, micro_batches)
    return norm


def not_finite(trainer: Trainer, loss, norm, losses, micro_batches) -> UserError:
    """The error that ends a run whose loss or gradient is not finite, naming the examples that were in it."""
    import torch

    bad = [m for value, m in zip(losses, micro_batches, strict=True) if not math.isfinite(value.item())]
    rows = [i for m in (bad or micro_batches) for i in m.indices.tolist()]
    ids = trainer.data.dataset[rows]["id"]
    everywhere = [None] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(everywhere, (bool(bad), ids))
    else:
        everywhere = [(bool(bad), ids)]
    chosen = [ids for is_bad, ids in everywhere if is_bad] or [ids for _, ids in everywhere]
    names = ", ".join([name for ids in chosen for name in ids][:20])
    return runtime_utils.ReportedError(
        f"loss {loss} with gradient norm {norm} at step {trainer.step + 1} is not finite: stopped before the update, "
        f"earlier checkpoints are kept; examples: {names}; lower --lr, or use --precision fp32"
    )


def dev_loss(trainer: Trainer) -> float:
    """Mean cross-entropy over the dev split's target tokens, its examples shared among the ranks."""
    import torch

    micro_batches, target_tokens = trainer.cut(trainer.dev, trainer.args.eval_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    with torch.no_grad():
        for micro, batch in zip(micro_batches, trainer.loader([m.indices for m in micro_batches]), strict=True):
            total += trainer.engine(**trainer.to_device(batch)).loss_sum.double() * micro.weight
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return total.item() / target_tokens


def evaluate_and_keep(trainer: Trainer, record) -> None:
    """Evaluates on the dev split; keeps the mapping as the last one and, when it is, as the best."""
    loss = dev_loss(trainer)
    record.evaluation(trainer.step, loss)
    best = loss < trainer.best_dev_loss
    if best:
        trainer.best_dev_loss = loss
        save_mapping(trainer, trainer.plan.output_dir)
    save_mapping(trainer, trainer.plan.output_dir / "last")
    log(
        f"step {trainer.step}: dev loss {loss:.4f}, perplexity {perplexity(loss):.3f}{' (best so far)' if best else ''}"
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_gb(device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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

    together(write)


def save_checkpoint(trainer: Trainer) -> None:
    """Writes the complete training state; all ranks gather, rank 0 writes."""
    from deepspeed_utils import mapping_state, optimizer_state

    tensors = {f"mapping.{k}": v for k, v in mapping_state(trainer.engine).items()} | optimizer_state(trainer.engine)
    best = None if math.isinf(trainer.best_dev_loss) else trainer.best_dev_loss
    state = {
        "step": trainer.step,
        "best_dev_loss": best,
        "identity": identity(trainer.args, trainer.plan, trainer.data),
    }

    def write():
        if is_main():
            checkpoint_utils.write_checkpoint(
                trainer.plan.output_dir, trainer.step, tensors, state, trainer.args.save_total_limit
            )

    together(write)


def identity(args, plan: Plan, data) -> dict:
    """What must not change between a run and its continuation."""
    names = ("stage_name", "seed", "llm_path", "mt_path", "precision", "dev_size", "train_batch_size", "epoch_num")
    names += ("train_micro_batch_size_per_gpu", "micro_batch_tokens", "lr", "lr_scheduler", "warmup_ratio", "max_steps")
    fixed = {name: getattr(args, name) for name in (*names, "max_grad_norm")}
    return fixed | {"task": plan.task.training_name, "augmentation": plan.with_prompt, "data": data.fingerprint}


def start_over(output_dir: Path) -> None:
    """Removes what an earlier run left in the output folder, on rank 0."""
    import shutil

    if not is_main():
        return
    for folder in (*checkpoint_utils.list_checkpoints(output_dir), output_dir / "last"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("pytorch_model.bin", "mapping.safetensors", "config.json", "README.md", "log.jsonl", "loss.png"):
        (output_dir / name).unlink(missing_ok=True)


def read_resumable(args, plan: Plan, data) -> tuple:
    """The checkpoint to continue from as (folder, tensors, state), or three times None."""
    wanted = args.resume_from_checkpoint
    if wanted == "auto":
        folder, skipped = checkpoint_utils.newest_valid(plan.output_dir)
        for line in skipped:
            warn(f"skipped {line}")
        if folder is None:
            return None, None, None
    else:
        folder = Path(wanted)
    tensors, state = checkpoint_utils.read_checkpoint(folder)
    for name, value in identity(args, plan, data).items():
        if state["identity"].get(name) != value:
            raise UserError(
                f"{folder} was trained with {name} {state['identity'].get(name)!r}, this run has {value!r}: use the "
                "same settings, another --save_name, or --overwrite_output_dir to start over"
            )
    return folder, tensors, state


class Recorder:
    """Collects a line for every step and evaluation and writes them to `log.jsonl` on rank 0."""

    def __init__(self, args, output_dir: Path):
        self.args, self.path = args, output_dir / "log.jsonl"
        self.lines, self.step, self.writer = [], 0, None
        if is_main() and args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output_dir / "tensorboard"))
        if is_main() and args.report_to == "wandb":
            import wandb

            wandb.init(project=args.save_name, config=vars(args), dir=str(output_dir))

    def cut_back(self, step: int) -> None:
        """Drops lines after `step`, which a resumed run writes again, and a half-written last one."""
        self.step = step
        if not is_main():
            return
        kept = []
        if step and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        runtime_utils.write_text_atomic(self.path, "".join(kept))

    def __call__(self, values: dict, epoch: int) -> None:
        """Takes one optimizer step's line; every `--logging_steps` lines reach the disk."""
        self.step += 1
        self._add({"step": self.step, "epoch": epoch, **values})
        if self.step % self.args.logging_steps == 0:
            self.flush()

    def evaluation(self, step: int, loss: float) -> None:
        """Takes an evaluation's line."""
        self._add({"step": step, "dev_loss": loss, "dev_perplexity": perplexity(loss)})
        self.flush()

    def _add(self, line: dict) -> None:
        if is_main():
            self.lines.append(line)

    def flush(self) -> None:
        """Appends what has gathered to the file and sends it to the report target."""
        if not self.lines:
            return
        text = ""
        for line in self.lines:
            line = {name: float(value) if hasattr(value, "item") else value for name, value in line.items()}
            text += json.dumps(line) + "\n"
            self._report(line)
        self.lines = []
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()

    def _report(self, line: dict) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, line["step"])
        if self.args.report_to == "wandb":
            import wandb

            wandb.log(values, step=line["step"])


def draw_loss(log_file: Path, picture: Path) -> None:
    """Draws training and dev loss over optimizer steps."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("dev_loss", "dev split")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if key == "dev_loss" else None, label=label, linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per target token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    runtime_utils.write_bytes_atomic(picture, buffer.getvalue())


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
    runtime_utils.write_json_atomic(plan.output_dir / "ds_config.json", plan.config)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def build_trainer(args, plan: Plan, device) -> Trainer:
    """Data, model and engine, put together; resumes where a checkpoint is found."""
    from deepspeed_utils import describe, make_engine

    tokenizers, data, dev, train_indices = load_data(args, plan)
    together(check_lengths, args, data)
    if args.overwrite_output_dir:
        together(start_over, plan.output_dir)
    folder, tensors, state = together(read_resumable, args, plan, data)
    model = together(load_model, args, plan, device)
    if folder is not None:
        model.mapping.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("mapping.")}, strict=True)
    engine = make_engine(model, plan.config, args.lr)
    steps_per_epoch = math.ceil(len(train_indices) / args.train_batch_size)
    eval_steps = args.eval_steps or max(1, DEFAULT_EVAL_MICRO_BATCHES // plan.accumulation)
    trainer = Trainer(
        args=args,
        plan=plan,
        engine=engine,
        data=data,
        tokenizers=tokenizers,
        dev=dev,
        train=train_indices,
        device=device,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(args.max_steps or math.inf, args.epoch_num * steps_per_epoch),
        eval_steps=eval_steps,
        save_steps=args.save_steps or eval_steps,
    )
    log(f"{describe(plan.config)}; {steps_per_epoch} steps per epoch, {trainer.total_steps} in all")
    if folder is None:
        log(f"starts at step 0: no checkpoint in {plan.output_dir}")
        return trainer
    first = trainer.to_device(next(iter(trainer.loader([trainer.train[:1]]))))
    from deepspeed_utils import load_optimizer_state

    load_optimizer_state(engine, tensors, state["step"], first)
    trainer.step = state["step"]
    trainer.best_dev_loss = math.inf if state["best_dev_loss"] is None else state["best_dev_loss"]
    log(f"resumes from {folder} at step {trainer.step}")
    return trainer


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, trains one stage, writes its outputs; returns the exit code."""
    args = build_parser().parse_args(argv)
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes fork after tokenizers were used
    device = runtime_utils.init_distributed(force=True)
    import torch

    from deepspeed_utils import quiet_start

    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    quiet_start()
    import deepspeed

    deepspeed.init_distributed(dist_backend=None, dist_init_required=False, verbose=False)
    plan = together(check_arguments, args)
    trainer = build_trainer(args, plan, device)
    record = Recorder(args, plan.output_dir)
    together(write_settings, args, plan, trainer.data)
    record.cut_back(trainer.step)
    trainer.engine.train()
    train(trainer, record)
    record.flush()
    if is_main():
        draw_loss(record.path, plan.output_dir / "loss.png")
    log(f"finished at step {trainer.step}: {plan.output_dir}")
    return 0


if __name__ == "__main__":
    runtime_utils.run_main(main)
