"""Training's flags."""

import argparse

from mindmerger.runtime import chat_template, config_file, precision
from mindmerger.runtime.command import CommandParser, DefaultsShown, at_least, parse_bool, positive, share
from mindmerger.runtime.files import model_path
from mindmerger.tasks.languages import add_language_flags
from mindmerger.training import adapter_stage, dev_accuracy, dev_split, encoder_cache, sharing, time_limit

# Flags a continued run may change when --allow_changed says so; anything else that differs makes it another run.
CHANGEABLE_ON_RESUME = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "micro_batch_tokens",
    "epoch_num",
    "max_steps",
    "max_minutes",
}
CHANGEABLE_ON_RESUME |= {"lr", "head_lr", "lr_scheduler", "warmup_ratio", "max_grad_norm", "init_checkpoint"}


# Names and defaults of published flags are the released scripts', so that their commands run unchanged. Second names
# are those of Hugging Face's trainer, for what means the same there.
def build_parser() -> argparse.ArgumentParser:
    """Returns the parser: every flag, its default and what it does."""
    parser = CommandParser(
        description="Trains what stands between a frozen multilingual encoder and a frozen LLM, one stage at a time.",
        formatter_class=DefaultsShown,
        allow_abbrev=False,
        epilog="Start it with the deepspeed launcher (one process for each GPU) or, for one process, with python.",
    )
    config_file.add_argument(parser.add_argument)
    add_model_flags(parser)
    add_data_flags(parser)
    dev_accuracy.add_arguments(parser)
    adapter_stage.add_arguments(parser)
    add_optimisation_flags(parser)
    add_output_flags(parser)
    sharing.add_arguments(parser)
    add_launcher_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the two models and of the bridge between them."""
    add = parser.add_argument_group("models").add_argument
    add("--llm_path", type=model_path, default="../LLMs/Llama-2-7b-hf/", help="folder or hub name of the frozen LLM")
    add("--mt_path", type=model_path, default="../LLMs/mt5-xl/", help="folder or hub name of the frozen encoder")
    add("--init_checkpoint", help="mapping to start from (folder, .safetensors, released .bin, or id on the hub); "
        "the augmentation stage finds the mapping stage's by itself; 'none' starts it from a fresh one")  # fmt: skip
    add("--bridge", default="mindmerger", help="what is trained between the two: a name of mindmerger.bridges.BRIDGES")
    add("--bridge_option", action="append", default=[], metavar="KEY=VALUE", help="an option of that bridge; may be "
        "given more than once")  # fmt: skip
    precision.add_argument(add)  # the mapping is fp32
    precision.add_quantization(add)
    add("--attn_implementation", help="attention kernels, as transformers names them (sdpa, eager, flash_attention_2)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the data."""
    add = parser.add_argument_group("data").add_argument
    add("--task", default="translation", help="math, x-csqa, xnli or translation")
    add("--stage_name", help="which stage of the bridge to train, for mindmerger mapping or augmentation (default: its "
        "first), or adapter, which every bridge has")  # fmt: skip
    add("--data_root", default="./datas", help="folder in the released layout")
    add_language_flags(add, "only these, by name, code or NLLB's tag, with commas between (default: the task's)")
    add("--train_num", type=at_least(1), default=100000, help="examples per language")
    dev_split.add_arguments(add)
    add("--skip_faulty_rows", action="store_true", help="leave out and list rows of the data files that are faulty, "
        "where the first one otherwise ends the run")  # fmt: skip
    chat_template.add_argument(add)
    add("--augmentation", type=parse_bool, help="put the prompt after the mapped source (default: by stage)")
    add("--max_seq_len", type=at_least(1), default=512, help="limit of the encoder's tokens")
    add("--max_gen_len", type=at_least(1), default=512, help="limit of the prompt's and of the target's tokens")
    add("--num_workers", "--dataloader_num_workers", type=at_least(0), default=2, help="threads that collate batches "
        "ahead; 0 collates between the steps")  # fmt: skip


def add_optimisation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the optimizer, the batches and the arithmetic."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", "--learning_rate", type=positive, default=2e-5, help="learning rate of AdamW")
    add("--head_lr", type=positive, help="learning rate of an output head that the bridge trains (default: as --lr)")
    add("--lr_scheduler", "--lr_scheduler_type", choices=("constant", "cosine", "linear"), default="constant",
        help="decay after warm-up")  # fmt: skip
    add("--warmup_ratio", type=share, default=0.0, help="share of the steps with a linearly rising learning rate")
    add("--max_grad_norm", type=positive, help="gradient clipping (default: the DeepSpeed config's, else 1.0)")
    add("--epoch_num", "--num_train_epochs", type=at_least(1), default=3, help="passes over the training set")
    add("--max_steps", type=at_least(1), help="end after this many optimizer steps")
    time_limit.add_arguments(add)
    add("--train_batch_size", type=at_least(1), default=24, help="examples of one optimizer step, over all processes")
    add("--train_micro_batch_size_per_gpu", "--per_device_train_batch_size", type=at_least(1), default=1,
        help="examples of one forward pass")  # fmt: skip
    add("--gradient_accumulation", "--gradient_accumulation_steps", type=int, help="checked against the two above and "
        "the number of processes; by its second name, and without --train_batch_size, it sets that one")  # fmt: skip
    add("--micro_batch_tokens", type=at_least(0), help="split batches, and the dev split, into micro-batches by this "
        "many positions instead of rows (0: by rows)")  # fmt: skip
    add("--eval_batch_size", "--per_device_eval_batch_size", type=at_least(1), default=2, help="examples of one "
        "forward pass on the dev split, unless --micro_batch_tokens splits it too")  # fmt: skip
    add("--packing", action="store_true", help="pass the rows of a micro-batch to the LLM end to end, without padding")
    add("--gradient_checkpointing", action="store_true", help="less memory for about a third more arithmetic")
    encoder_cache.add_arguments(add)
    add("--compile", "--torch_compile", action="store_true", help="compile the frozen models' layers with "
        "torch.compile (not at ZeRO 3)")  # fmt: skip
    add("--liger", "--use_liger_kernel", action="store_true", help="Liger's kernels in the LLM (NVIDIA GPU, package "
        "liger-kernel)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the fresh mapping, the dev split and the order of examples")
    add("--deterministic", action="store_true", help="deterministic kernels: bit-exact resume on CUDA too")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of what a run writes and continues from."""
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
    add("--eval_steps", type=at_least(1), help="optimizer steps between dev evaluations (default: as many as have 2000 "
        "micro-batches)")  # fmt: skip
    add("--save_steps", type=at_least(1), help="optimizer steps between checkpoints (default: as eval_steps)")
    add("--save_total_limit", type=at_least(1), default=2, help="how many checkpoints to keep")
    add("--logging_steps", type=at_least(1), default=10, help="optimizer steps between flushes of the log")
    add("--report_to", choices=("none", "tensorboard", "wandb", "trackio"), default="none", help="also send the log "
        "there")  # fmt: skip


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the launcher."""
    add = parser.add_argument_group("launcher").add_argument
    add("--deepspeed", action="store_true", help="accepted for compatibility: training always uses DeepSpeed")
    add("--deepspeed_config", help="DeepSpeed JSON, for instance scripts/ds_zero2.json (default: ZeRO 0)")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    add("--gpu", help="accepted for compatibility and ignored: choose GPUs with the launcher's --include")
