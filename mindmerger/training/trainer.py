"""A training run put together: `Run`, what it works with, and `Progress`, how far it has come."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from mindmerger.runtime.processes import (
    broadcast_weights,
    explain_out_of_memory,
    is_main,
    log,
    on_all_ranks,
    rank,
)
from mindmerger.tasks.languages import code_of
from mindmerger.training.deepspeed_config import describe, zero_stage
from mindmerger.training.settings import Settings
from mindmerger.training.time_limit import TimeLimit

if TYPE_CHECKING:
    from mindmerger.data.loader import BatchLoader, TrainingData

DEFAULT_EVAL_MICRO_BATCHES = 2000


def load_model(settings: Settings, device):
    """Loads the frozen towers in the run's dtype and puts the bridge between them, in fp32 with its first weights, and
    in its stage an adapter on the LLM. An encoder whose states are on disk is left out."""
    import torch

    from mindmerger.model.adapters import add_adapter
    from mindmerger.model.mindmerger import MindMerger
    from mindmerger.model.towers import load_encoder, load_llm
    from mindmerger.training.deepspeed_engine import sharded_loading
    from mindmerger.training.speedups import apply_liger, compile_layers

    args = settings.args
    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    # ZeRO 3 shards weights as they are read, and places them itself.
    place = device if device.type == "cuda" and zero_stage(settings.config) != 3 else None
    with explain_placing_out_of_memory(device), sharded_loading(settings.config, bf16):
        llm = load_llm(args.llm_path, dtype, args.attn_implementation, args.quantization, place)
        encoder = None
        if args.mt_path is not None and not args.cache_encoder_states:
            encoder = load_encoder(args.mt_path, dtype, args.attn_implementation, place)
    if bf16:
        # Only what is trained multiplies in fp32 then: a GPU's tensor cores do it, on factors rounded to ten bits.
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed)  # the fresh mapping is the same on every rank and for every world size
    bridge, towers = settings.bridge, settings.bridge.towers if args.cache_encoder_states else None
    model = MindMerger.from_towers(encoder, llm, args.mt_path, args.llm_path, args.bridge, bridge.options, towers)
    model.config.stage, model.config.task = args.stage_name, settings.task.training_name
    model.config.augmentation, model.config.precision = settings.with_prompt, args.precision
    model.config.chat_template = settings.chat.record() if settings.chat is not None else None
    model.config.quantization = args.quantization
    if settings.init_file is not None:
        if is_main():  # `build` gives it to the other ranks: their nodes may not have the file
            model.load_mapping(settings.init_file)
        log(f"mapping: starts from {settings.init_file}")
    elif not args.llm_only:
        log("mapping: starts fresh")
    if settings.adapter is not None:
        with sharded_loading(settings.config, bf16):  # DoRA starts from the norms of sharded weights
            add_adapter(model, settings.adapter)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        compile_layers(model)
    if args.liger:
        apply_liger(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"trainable parameters: {trainable:,} ({settings.trains} only)")
    with explain_placing_out_of_memory(device):
        return model.to(device)


def explain_placing_out_of_memory(device):
    """Context manager: running out of memory while models are placed becomes an error that says what to do."""
    advice = (
        "share their weights among the GPUs (--deepspeed_config scripts/ds_zero3.json), keep them in host memory "
        "(ds_zero3_offload.json), lower the bucket sizes of your own DeepSpeed config, or use --precision bf16 or "
        "--quantization nf4"
    )
    return explain_out_of_memory(f"on rank {rank()} while the models are placed on {device}", {}, advice)


@dataclass
class Progress:
    """How far a run has come: with the weights and the optimizer's moments, all that a checkpoint holds."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    batch: int = 0  # of the epoch, the next one to train on
    best_dev_loss: float = math.inf
    evaluation_due: bool = False  # the last step was to be followed by an evaluation that has not been made yet
    best_dev_accuracy: float | None = None  # in percent, of the evaluation with the best loss; None where there is none
    minutes: float = 0.0  # of training, with --max_minutes alone

    def advance(self, steps_per_epoch: int) -> None:
        """Counts one optimizer step."""
        self.step += 1
        self.epoch, self.batch = divmod(self.epoch * steps_per_epoch + self.batch + 1, steps_per_epoch)

    def state(self, batch_size: int) -> dict:
        """Returns what `state.json` records. The place in the epoch is counted in examples, since --allow_changed lets
        a resumed run have another batch size."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "examples_in_epoch": self.batch * batch_size,
            "best_dev_loss": None if math.isinf(self.best_dev_loss) else self.best_dev_loss,
            "best_dev_accuracy": self.best_dev_accuracy,
            "evaluation_due": self.evaluation_due,
            **({"minutes": self.minutes} if self.minutes else {}),
        }

    @classmethod
    def from_state(cls, state: dict, batch_size: int) -> "Progress":
        """Reads what `state` returned; with another batch size, the epoch continues at the nearest batch before."""
        best = math.inf if state["best_dev_loss"] is None else state["best_dev_loss"]
        batch = state["examples_in_epoch"] // batch_size
        # Checkpoints of earlier versions know no accuracy.
        accuracy = state.get("best_dev_accuracy")
        minutes = state.get("minutes", 0.0)
        return cls(state["step"], state["epoch"], batch, best, state["evaluation_due"], accuracy, minutes)


@dataclass
class Run:
    """Parts that a run works with; nothing of them changes from step to step but the weights inside the engine."""

    settings: Settings
    engine: object  # DeepSpeed's, around the `MindMerger`
    loader: "BatchLoader"
    total_steps: int
    eval_steps: int
    save_steps: int
    record: object = None  # a `Recorder`
    signals: object = None  # `Signals`, from the first step on
    clock: TimeLimit = field(default_factory=TimeLimit)

    @property
    def args(self):
        """The flags."""
        return self.settings.args

    @property
    def data(self):
        """The tokenised examples, a `TrainingSet`."""
        return self.loader.data.examples

    @property
    def device(self):
        """Where this rank computes."""
        return self.loader.device


def learning_rate(args, step: float, total_steps: int) -> float:
    """Returns the rate of step `step` (from 0): linear warm-up, then constant, cosine or linear decay to 0. Between
    two steps there is one too, for a run whose schedule follows the clock."""
    warmup = math.ceil(args.warmup_ratio * total_steps)
    if step < warmup:
        # Never 0: the first step would be spent on nothing.
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}
    return args.lr * factor[args.lr_scheduler]


def set_learning_rate(run: Run, step: int) -> float:
    """Sets the learning rate of a step (from 0), and returns it; a trained head's differs by a constant factor."""
    # A function of the step alone: a scheduler would be one more state to save and restore. With --max_minutes the
    # time that is used moves it on where that is the larger share.
    rate = learning_rate(run.args, max(step, run.clock.share() * run.total_steps), run.total_steps)
    for group in run.engine.basic_optimizer.param_groups:
        group["lr"] = rate * group["share_of_lr"]
    return rate


def build(settings: Settings, data: "TrainingData", device, checkpoint: tuple) -> tuple[Run, Progress]:
    """Puts model, engine and loader together, at the place where the checkpoint left off if there is one.

    Args:
        checkpoint: as `find_checkpoint_to_resume` returns it.
    """
    from mindmerger.data.loader import BatchLoader
    from mindmerger.training.deepspeed_engine import load_optimizer_state, make_engine

    args, (folder, tensors, state) = settings.args, checkpoint
    model = on_all_ranks(load_model, settings, device)
    model.config.languages = [code_of(name) for name in data.examples.counts["rows"]]
    if settings.init_file is not None:
        broadcast_weights(model.mapping)
    if folder is not None:
        # Before the engine is made: at ZeRO 1 to 3 DeepSpeed steps on copies of the weights that it takes then.
        start = f"{settings.trains}."
        model.load_trained({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
    with explain_placing_out_of_memory(device):
        engine = make_engine(model, settings.config, args.lr, args.head_lr)
    plan = partial(model.plan_input, packed=args.packing)
    loader = BatchLoader(args, data, settings.bridge.prefix_length, device, plan)
    progress = Progress()
    if folder is not None:
        load_optimizer_state(engine, tensors, state["step"], loader.load(data.train[:1]).arguments)
        progress = Progress.from_state(state, args.train_batch_size)
    # From where the run stands: with another batch size the epochs left have another number of steps.
    left = (args.epoch_num - progress.epoch) * loader.steps_per_epoch - progress.batch
    total_steps = min(args.max_steps or math.inf, progress.step + max(0, left))
    log(f"{describe(settings.config)}; {loader.steps_per_epoch} steps per epoch, {total_steps} in all")
    where = f"resumes from {folder}" if folder is not None else f"starts fresh, no checkpoint in {settings.output_dir},"
    log(f"{where} at step {progress.step}")
    eval_steps = args.eval_steps or max(1, DEFAULT_EVAL_MICRO_BATCHES // loader.micro_batches_per_step())
    return Run(settings, engine, loader, total_steps, eval_steps, args.save_steps or eval_steps), progress
