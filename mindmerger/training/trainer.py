"""A training run's parts put together: model, engine, data, and where the run stands."""

import argparse
import contextlib
import math
from dataclasses import dataclass

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import (
    broadcast_weights,
    is_main,
    is_out_of_memory,
    log,
    on_all_ranks,
    rank,
    world_size,
)
from mindmerger.training.settings import Settings

DEFAULT_EVAL_MICRO_BATCHES = 2000


def load_model(args, settings: Settings, device):
    """Frozen towers in the run's dtype, and the mapping in fp32 with its starting weights."""
    import torch

    from mindmerger.model.mindmerger import MindMerger
    from mindmerger.model.towers import load_encoder, load_llm
    from mindmerger.training.deepspeed_engine import sharded_loading
    from mindmerger.training.speedups import apply_liger, compile_layers

    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with placing_memory_named(device), sharded_loading(settings.config, bf16):
        llm = load_llm(args.llm_path, dtype, args.attn_implementation)
        encoder = load_encoder(args.mt_path, dtype, args.attn_implementation)
    torch.manual_seed(args.seed)  # the fresh mapping is the same on every rank and for every world size
    model = MindMerger.from_towers(encoder, llm, args.mt_path, args.llm_path, args.bridge, settings.bridge.options)
    model.config.stage, model.config.task = args.stage_name, settings.task.training_name
    model.config.augmentation = settings.with_prompt
    if settings.init_file is not None:
        if is_main():
            model.load_mapping(settings.init_file)
        log(f"mapping: starts from {settings.init_file}")
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
        if not is_out_of_memory(error):
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
    settings: Settings
    engine: object
    data: object
    tokenizers: object
    dev: object
    train: object
    device: object
    lengths: object  # of every merged row, BOS, prefix, prompt and target
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
        from mindmerger.data.batches import split_global_batch

        lengths = self.lengths
        mine = split_global_batch(indices, lengths, world_size(), micro_batch_size, token_budget)[rank()]
        return mine, int(self.data.target_lengths[indices].sum())

    def heaviest(self, indices, micro_batch_size, token_budget=None):
        """The rows of the micro-batches that may need most memory, the same on every rank."""
        from mindmerger.data.batches import heaviest_batches

        most = math.ceil(self.args.train_batch_size / world_size()) if token_budget else micro_batch_size
        data = self.data
        return heaviest_batches(indices, self.lengths, (data.target_lengths, data.encoder_lengths), most, token_budget)

    def epoch_steps(self, epoch: int, first: int):
        """(micro-batches of this rank, target tokens, indices) of every optimizer step of an epoch from `first` on."""
        from mindmerger.data.batches import epoch_batches

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
        from mindmerger.data.batches import collate

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


def build_trainer(args, settings: Settings, device, tokenizers, data, split, checkpoint) -> Trainer:
    """Model and engine put together with the data, standing where the checkpoint left off if there is one."""
    from mindmerger.training.deepspeed_config import describe
    from mindmerger.training.deepspeed_engine import load_optimizer_state, make_engine

    folder, tensors, state = checkpoint
    model = on_all_ranks(load_model, args, settings, device)
    if settings.init_file is not None:
        broadcast_weights(model.mapping)
    if folder is not None:
        mapping = {name.removeprefix("mapping."): t for name, t in tensors.items() if name.startswith("mapping.")}
        model.mapping.load_state_dict(mapping, strict=True)
    with placing_memory_named(device):
        engine = make_engine(model, settings.config, args.lr)
    eval_steps = args.eval_steps or max(1, DEFAULT_EVAL_MICRO_BATCHES // settings.accumulation)
    trainer = Trainer(
        args=args,
        settings=settings,
        engine=engine,
        data=data,
        tokenizers=tokenizers,
        dev=split[0],
        train=split[1],
        device=device,
        lengths=data.merged_lengths(settings.bridge.prefix_length),
        steps_per_epoch=steps_per_epoch(args, split),
        eval_steps=eval_steps,
        save_steps=args.save_steps or eval_steps,
    )
    if folder is not None:
        first = trainer.to_device(next(iter(trainer.loader([trainer.train[:1]]))))
        load_optimizer_state(engine, tensors, state["step"], first)
        trainer.step, trainer.epoch = state["step"], state["epoch"]
        # With another batch size, as --allow_changed permits, the epoch continues at the nearest batch before.
        trainer.batch = state["examples_in_epoch"] // args.train_batch_size
        trainer.best_dev_loss = math.inf if state["best_dev_loss"] is None else state["best_dev_loss"]
        trainer.evaluation_due = state["evaluation_due"]
    left = (args.epoch_num - trainer.epoch) * trainer.steps_per_epoch - trainer.batch
    trainer.total_steps = min(args.max_steps or math.inf, trainer.step + max(0, left))
    log(f"{describe(settings.config)}; {trainer.steps_per_epoch} steps per epoch, {trainer.total_steps} in all")
    where = f"resumes from {folder}" if folder is not None else f"starts fresh, no checkpoint in {settings.output_dir},"
    log(f"{where} at step {trainer.step}")
    return trainer


def steps_per_epoch(args, split) -> int:
    """Optimizer steps of one pass over the training indices."""
    return math.ceil(len(split[1]) / args.train_batch_size)
