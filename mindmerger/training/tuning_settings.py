"""Command line of LLM tuning, and everything that can be settled before weights load."""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindmerger.runtime import chat_template, precision
from mindmerger.runtime.command import CommandParser, HelpFormatter, at_least, check_seed, positive, share
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path, sha256_of_file
from mindmerger.runtime.place import LAUNCHER_VARIABLES
from mindmerger.runtime.processes import log, warn
from mindmerger.training.adapter_stage import DEFAULTS
from mindmerger.training.dev_split import _dev_size

RECORD = chat_template.TUNING_RECORD  # in a finished folder: what it is
HELP = """\
Tunes an LLM on a task's rows in the prompt and target form of this project: the LLM reads <bos> (where it has one) and
the prompt, exactly the ids that run_evaluation.py --llm_only feeds it, and learns target and end token. Prompt tokens
have no loss. The output is an ordinary model folder. The same command resumes a run that was killed.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser: every flag, its default and what it does."""
    parser = CommandParser(prog="python -m scripts.tune_llm", description=HELP, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--llm_path", type=model_path, required=True, help="folder or hub name of the LLM")
    add("--task", required=True, help="math, x-csqa or xnli: whose rows, prompt and targets")
    add("--languages", default="English", help="rows of these languages, by name or code, separated by commas")
    add("--languages_file", metavar="FILE.tsv", help="languages of your own, as run_training.py takes them")
    add("--data_root", default="./datas", help="folder in the released layout")
    add("--rows", action="append", default=[], metavar="FILE", help="further rows in the form of the task's training "
        "rows, each with its language (.json, .jsonl); may be given more than once")  # fmt: skip
    add("--rows_only", action="store_true", help="leave out the data folder's own rows: the files of --rows alone")
    add("--train_num", type=at_least(1), help="most rows of each language from the data folder and from each file "
        "(default: all)")  # fmt: skip
    add("--dev_size", type=_dev_size, default="auto", help="rows kept aside, whole groups of one question, premise "
        "or stem; auto takes 3000, or a tenth where that is less")  # fmt: skip
    add("--max_gen_len", type=at_least(1), default=512, help="limit of the prompt's and of the target's tokens")
    chat_template.add_argument(add)

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=positive, default=1.5e-4, help="learning rate of AdamW")
    add("--lr_scheduler", choices=("constant", "cosine", "linear"), default="cosine", help="decay after warm-up")
    add("--warmup_ratio", type=share, default=0.05, help="share of the steps with a linearly rising learning rate")
    add("--max_grad_norm", type=positive, default=1.0, help="gradient clipping")
    add("--epoch_num", type=at_least(1), default=1, help="passes over the rows")
    add("--max_steps", type=at_least(1), help="end after this many optimizer steps")
    add("--train_batch_size", type=at_least(1), default=32, help="rows of one optimizer step")
    add("--micro_batch_tokens", type=at_least(1), default=2048, help="positions of one forward pass, padding included")
    add("--precision", choices=(precision.AUTO, "bf16", "fp32"), default=precision.AUTO, help="arithmetic of the LLM's "
        "layers, weights and optimizer are fp32; auto: bf16 where the device multiplies in it")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the dev split, the order of rows and a LoRA's start")

    add = parser.add_argument_group("LoRA").add_argument
    add("--lora", action="store_true", help="train a LoRA and merge it into the folder that is written, instead of "
        "training all weights (package peft)")  # fmt: skip
    defaults = {name: value for name, value in DEFAULTS.items() if name != "adapter"}
    types = {"adapter_rank": at_least(1, 2**31), "adapter_alpha": positive, "adapter_dropout": share}
    texts = {
        "adapter_rank": "rank of its matrices",
        "adapter_alpha": "its output is scaled by alpha / rank",
        "adapter_dropout": "dropout of its input in training",
        "adapter_targets": "the LLM's linear layers that have one, by the end of their names, separated by commas",
    }
    for name, value in defaults.items():
        add(f"--{name}", type=types.get(name, str), default=value, help=texts[name])

    add = parser.add_argument_group("outputs").add_argument
    add("--output_dir", required=True, help="the new model folder; until it is whole, checkpoints are in "
        "OUTPUT_DIR.unfinished")  # fmt: skip
    add("--overwrite_output_dir", action="store_true", help="start over and replace what an earlier tuning wrote there")
    add("--save_dtype", choices=("auto", "bf16", "fp32"), default="auto", help="dtype of the written weights; auto: "
        "as the LLM's own files")  # fmt: skip
    add("--eval_steps", type=at_least(1), default=50, help="optimizer steps between evaluations on the dev rows")
    add("--save_steps", type=at_least(1), default=50, help="optimizer steps between checkpoints")
    return parser


@dataclass
class TuningSettings:
    """All that is known before weights load. `columns` and `lengths` run parallel to the rows; `train` and `dev` are
    numbers of rows, `lengths` the positions of each: BOS, prompt and target."""

    args: argparse.Namespace
    task: object
    tokenizers: object
    columns: dict[str, list]  # prompt_ids, target_ids
    lengths: np.ndarray
    train: np.ndarray
    dev: np.ndarray
    precision: str
    adapter: dict | None  # what PEFT needs to know of a LoRA
    steps: int
    output: Path
    work: Path
    data: dict  # files with their sha256, and numbers of rows
    identity: dict  # what the tuned weights depend on, by the names that the user knows it by


def settle(args: argparse.Namespace) -> TuningSettings:
    """Reads data, tokenizer and config and checks that they fit each other.

    Raises:
        UserError: for the first thing that does not.
    """
    import torch

    from mindmerger.data.batches import automatic_dev_size, split_dev
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.generation.answers import tokenise_inputs
    from mindmerger.hub.chat_template import choose_template
    from mindmerger.hub.quantisation import refuse_quantised
    from mindmerger.model.towers import check_models, check_roles
    from mindmerger.tasks import find_task
    from mindmerger.tasks.languages import parse_languages, use_languages_file

    check_alone()
    check_seed(args.seed, bits=32)  # numpy's generator is seeded too
    use_languages_file(args.languages_file)
    task, languages = find_task(args.task), parse_languages(args.languages)
    if args.rows_only and not args.rows:
        raise UserError("--rows_only leaves out the data folder's rows, and no --rows gives others: pass --rows FILE")
    check_roles(args.llm_path, None)
    refuse_quantised(args.llm_path, "a tuning changes its weights or merges a LoRA into them")
    check_models(None, args.llm_path, backward=True)
    output, work = settle_output(args)
    adapter = settle_lora(args)
    sources, data = read_sources(args, task, languages)
    examples = [example for source in sources for example in source]
    tokenizers = load_tokenizers(None, args.llm_path, choose_template(args.chat_template, args.llm_path))
    # The evaluation's own function, so that the LLM is tuned on the very ids that it is asked with.
    limits = {"max_seq_len": 1, "max_gen_len": args.max_gen_len}
    columns = tokenise_inputs(tokenizers, examples, with_source=False, with_prompt=True, with_target=True, **limits)
    lengths = check_rows_fit(args, tokenizers, columns)
    dev_size = automatic_dev_size(len(examples)) if args.dev_size == "auto" else args.dev_size
    dev, train = split_dev(len(examples), dev_size, args.seed, group_rows(task, sources, dev_size))
    data["rows"] |= {"train": len(train), "dev": len(dev)}
    steps = args.epoch_num * -(-len(train) // args.train_batch_size)
    settings = TuningSettings(
        args=args,
        task=task,
        tokenizers=tokenizers,
        columns=columns,
        lengths=lengths,
        train=train,
        dev=dev,
        precision=precision.settle_precision(args.precision, torch.cuda.is_available()),
        adapter=adapter,
        steps=min(steps, args.max_steps or steps),
        output=output,
        work=work,
        data=data,
        identity={},
    )
    settings.identity = identity_of(settings)
    return settings


def check_alone() -> None:
    """Refuses to be one of several processes: Trainer would join them, and each would write the same folder."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1") or os.environ.get("LOCAL_RANK", "-1") not in ("", "-1"):
        given = " ".join(name for name in LAUNCHER_VARIABLES if name in os.environ)
        raise UserError(f"the tuning runs in one process: start it with python, after: unset {given}")


def settle_output(args: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the output folder and that of the unfinished run beside it.

    Raises:
        UserError: for an output that is the LLM itself, or holds what is not ours to replace.
    """
    output = Path(os.path.normpath(args.output_dir))
    if output.resolve() == Path(args.llm_path).resolve():
        raise UserError(f"--output_dir {output} is the LLM that is tuned: choose another folder")
    if not output.name or output.name == "..":
        raise UserError(f"--output_dir {args.output_dir} names no new folder: choose another")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file: choose a folder that does not exist")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise UserError(
            f"--output_dir {output} exists and holds no {RECORD}, so it is not ours to replace: choose another"
        )
    return output, output.with_name(f"{output.name}.unfinished")


def settle_lora(args: argparse.Namespace) -> dict | None:
    """Returns what PEFT needs to know of a LoRA, None where all weights are trained.

    Raises:
        UserError: without PEFT, and for names of layers that the LLM does not have.
    """
    from mindmerger.model.adapters import adapter_shapes, adapter_values, require_peft

    if not args.lora:
        given = [f"--{name}" for name, value in DEFAULTS.items() if name != "adapter" and getattr(args, name) != value]
        if given:
            raise UserError(f"{', '.join(given)} describes a LoRA: pass --lora too, or leave it out")
        return None
    require_peft()
    targets = [name.strip() for name in args.adapter_targets.split(",")]
    if not all(targets):
        raise UserError(f"--adapter_targets {args.adapter_targets!r} has an empty name: separate names by one comma")
    size = (args.adapter_rank, args.adapter_alpha, args.adapter_dropout)
    values = adapter_values("lora", *size, targets, args.llm_path)
    adapter_shapes(args.llm_path, values)
    return values


def read_sources(args: argparse.Namespace, task, languages: list) -> tuple[list[list], dict]:
    """Reads all rows and leaves out those that a test set of the task holds too.

    Returns:
        the examples of the data folder and of each file, and what `tune.json` says of the data.

    Raises:
        UserError: for missing or faulty data, and where no row is left.
    """
    from mindmerger.tasks.examples import StageData
    from mindmerger.tasks.rows import evaluation_sources, normalise_source, read_rows

    task.check_augmentation()
    files, sources = [], []
    if not args.rows_only:
        stage = StageData(task, "augmentation", args.data_root, languages, args.train_num)
        sources.append(list(stage.examples()))
        files += stage.files()
    for path in args.rows:
        sources.append(list(read_rows(task, path, languages, args.train_num)))
        files.append(Path(path))
    known = evaluation_sources(task, args.data_root, languages)
    kept = [[one for one in source if normalise_source(one.source) not in (known or ())] for source in sources]
    read, left = sum(map(len, sources)), sum(map(len, kept))
    if known is None:
        warn(f"{args.data_root} holds no test set of {task.training_name}: rows that stand in one are not found")
    if read > left:
        warn(f"{read - left} of {read} rows are left out: a test set of {task.training_name} holds them too")
    if not left:
        raise UserError(f"no row is left to tune on: a test set of {task.training_name} holds all {read}")
    rows = {"read": read, "in_a_test_set": read - left if known is not None else None}
    return kept, {"files": {str(path): sha256_of_file(path) for path in files}, "rows": rows}


def group_rows(task, sources: list[list], dev_size: int) -> np.ndarray:
    """Returns the group of each row: rows that are too alike to judge by those that were trained on. The three
    hypotheses of a premise share most of their words, and so do translations of a row.

    Raises:
        UserError: where all rows are one group, of which dev rows are wanted.
    """
    from mindmerger.data.groups import GroupKeys, connect
    from mindmerger.tasks.examples import StageData, varying_text

    within, texts, number = [], {}, 0
    for source in sources:
        # Translations are told by their numbers, which count in one source alone.
        keys = GroupKeys(StageData(task, "augmentation", ""))
        noted = list(keys.noting(source))
        within.append(keys.groups() + number)
        number += len(noted)
    rows = [(row.language, varying_text(row)) for source in sources for row in source]
    by_text = np.array([texts.setdefault(row, len(texts)) for row in rows])
    groups = connect([np.concatenate(within), by_text])
    if dev_size and not groups.any():
        raise UserError(
            f"all {len(groups)} rows are of one question, premise or stem: pass --dev_size 0, or other rows"
        )
    return groups


def check_rows_fit(args: argparse.Namespace, tokenizers, columns: dict) -> np.ndarray:
    """Refuses rows that the LLM has no embeddings or no positions for, and warns of truncated ones.

    Returns:
        the positions of each row.
    """
    from mindmerger.generation.answers import check_tokens
    from mindmerger.hub.model_configs import embedding_rows, llm_config
    from mindmerger.model.towers import check_positions

    llm = args.llm_path, embedding_rows(llm_config(args.llm_path)[0])
    check_tokens(tokenizers, columns, (None, None), llm)
    truncated = sum(columns["prompt_cut"]) + sum(ids[-1] != tokenizers.eos_id for ids in columns["target_ids"])
    if truncated:
        warn(f"{truncated} prompts or targets are longer than --max_gen_len {args.max_gen_len} and truncated")
    pairs = zip(columns["prompt_ids"], columns["target_ids"], strict=True)
    lengths = np.array([1 + len(prompt) + len(target) for prompt, target in pairs])
    check_positions(args.llm_path, int(lengths.max()), "the longest row", "--max_gen_len")
    return lengths


def identity_of(settings: TuningSettings) -> dict:
    """Returns everything that the tuned weights depend on: what must not change when a run is resumed."""
    from mindmerger.model.adapters import describe_adapter
    from mindmerger.model.towers import model_fingerprint

    args, columns = settings.args, settings.columns
    rows = [columns["prompt_ids"], columns["target_ids"], settings.train.tolist(), settings.dev.tolist()]
    flags = ("lr", "lr_scheduler", "warmup_ratio", "max_grad_norm", "train_batch_size", "micro_batch_tokens", "seed")
    found = {
        "--task": settings.task.training_name,
        "--llm_path (fingerprint)": model_fingerprint(args.llm_path),
        "--precision": settings.precision,
        "--save_dtype": args.save_dtype,
        "--chat_template": settings.tokenizers.chat.record() if settings.tokenizers.chat is not None else None,
        "number of optimizer steps": settings.steps,
        **{f"--{name}": getattr(args, name) for name in flags},
        "--lora": describe_adapter(settings.adapter) if settings.adapter is not None else None,
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    return json.loads(json.dumps(found))  # as it is read back


def refuse_other_run(settings: TuningSettings, before: dict, folder: Path) -> None:
    """Makes sure that what lies in a folder comes from this very command.

    Raises:
        UserError: naming the first difference.
    """
    for name, value in settings.identity.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} is of a tuning with another {name} ({before.get(name)!r}, this one has {value!r}): use the "
                "same, another --output_dir, or --overwrite_output_dir to start over"
            )


def describe(settings: TuningSettings) -> None:
    """Says what will be tuned on what."""
    what = "a LoRA" if settings.adapter is not None else "all weights"
    rows = settings.data["rows"]
    log(
        f"tunes {what} of {settings.args.llm_path} in {settings.precision}: {rows['train']} rows, {rows['dev']} dev "
        f"rows, {settings.steps} steps, on average {settings.lengths.mean():.0f} positions a row"
    )
