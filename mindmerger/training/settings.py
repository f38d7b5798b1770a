"""What training's flags come to: everything that can be settled before anything loads."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from mindmerger.runtime import chat_template, precision
from mindmerger.runtime.command import check_save_name, check_seed
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import is_main, log, warn, world_size
from mindmerger.training import adapter_stage, dev_accuracy, encoder_cache, sharing
from mindmerger.training.flags import build_parser
from mindmerger.training.initial_mapping import settle_start

FAULTS_FILE = "faulty_rows.txt"  # in the output folder


# What the hours of a dry run assume: a GPU by its data sheet (dense), and how much of its peak a training step reaches.
ASSUMED_GPU, ASSUMED_SHARE = "A100", 0.4


@dataclass
class Settings:
    """Settings of a run, settled before anything loads: its flags, and what they come to together."""

    args: argparse.Namespace
    task: object
    bridge: object  # without storage: asked for lengths and options; a `NoBridge` where the LLM is trained alone
    stage: object
    languages: list | None
    with_prompt: bool
    chat: object | None  # the `ChatTemplate` around the prompts
    config: dict  # DeepSpeed's
    output_dir: Path
    init_file: str | None
    init_hash: str | None
    models: tuple[str, str | None]  # fingerprints of the LLM and the encoder
    adapter: dict | None  # what PEFT needs to know of it, in the adapter stage
    shapes: dict  # of what is trained, by the names that a checkpoint holds it under

    @property
    def trains(self) -> str:
        """What is trained, in a word that checkpoints and messages have: the mapping or the adapter."""
        return "mapping" if self.adapter is None else "adapter"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; each flag is checked alone, `settle` checks them together.

    Raises:
        UserError: for an unknown flag and a value that a flag cannot have.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    # By this name the batch is a product, and by our own flags it is the given number.
    by_steps = parser.given.get("gradient_accumulation") == "--gradient_accumulation_steps"
    if by_steps and "train_batch_size" not in parser.given:
        if args.gradient_accumulation < 1:
            raise UserError(f"--gradient_accumulation_steps must be at least 1, not {args.gradient_accumulation}")
        per_pass = args.train_micro_batch_size_per_gpu * world_size()
        args.train_batch_size = per_pass * args.gradient_accumulation
        log(
            f"--gradient_accumulation_steps {args.gradient_accumulation}: {args.train_batch_size} examples in a step, "
            f"{args.train_micro_batch_size_per_gpu} in a forward pass on each of {world_size()} processes"
        )
    return args


def settle(args) -> Settings:
    """Settles the flags against each other, the data tasks, the models and the disk.

    Raises:
        UserError: for the first thing that cannot be.
    """
    from mindmerger.model.adapters import adapter_shapes
    from mindmerger.tasks import find_task
    from mindmerger.tasks.languages import use_languages_file
    from mindmerger.tasks.questions import check_questions

    # What the flags alone tell comes first, hashing and checking models later: a typing error costs no waiting.
    warn_of_unused(args)
    check_seed(args.seed)
    check_save_name(args.save_name)
    check_reporting(args.report_to)
    use_languages_file(args.languages_file)
    task = find_task(args.task)
    options = settle_options(args.bridge, args.bridge_option)
    stage = settle_stage(args, options)
    adapter = adapter_stage.settle_adapter(args, stage)
    if args.head_lr is not None and "lm_head" not in stage.trains:
        warn(f"--head_lr is ignored: the {args.stage_name} stage of --bridge {args.bridge} trains no output head")
        args.head_lr = None
    if stage.data != "pairs":
        task.check_augmentation(otherwise=advise_pairs(args.bridge, options))
    dev_accuracy.check_selection(args, task, stage)
    sharing.check_sharing(args)
    encoder_cache.check_flags(args)
    languages = settle_languages(args, stage)
    if stage.data == "question_pairs":
        check_questions(task, languages)
    with_prompt = settle_prompt(args, stage)
    config = settle_batch(args)
    models = settle_models(args, config)
    chat = settle_chat_template(args, with_prompt)
    folder = adapter_stage.ALONE_FOLDER if args.llm_only else args.stage_name
    output_dir = Path(args.output_dir) / args.save_name / task.training_name / folder
    bridge, (init_file, init_hash) = settle_bridge(args, stage, options, output_dir, with_prompt, chat)
    shapes = {name: tuple(parameter.shape) for name, parameter in bridge.named_parameters()}
    return Settings(
        args=args,
        task=task,
        bridge=bridge,
        stage=stage,
        languages=languages,
        with_prompt=with_prompt,
        chat=chat,
        config=config,
        output_dir=output_dir,
        init_file=init_file,
        init_hash=init_hash,
        models=models,
        adapter=adapter,
        shapes=shapes if adapter is None else adapter_shapes(args.llm_path, adapter),
    )


def settle_precision(args) -> str:
    """Returns bf16 or fp32; in a dry run without a GPU, what auto finds on the GPU that its hours are for.

    A collective call, and so no part of `settle`.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if args.precision == precision.AUTO and args.dry_run and not on_gpu:
        log(f"--precision auto: bf16, as on an {ASSUMED_GPU}")
        return "bf16"
    return precision.settle_precision(args.precision, on_gpu)


def settle_bridge(args, stage, options: dict[str, str], output_dir: Path, with_prompt: bool, chat) -> tuple:
    """Returns the bridge without storage, and where its weights start from, as `settle_start` says.

    Raises:
        UserError: where it cannot stand between the two models, and for weights that do not fit.
    """
    from mindmerger.bridges.base import NoBridge
    from mindmerger.model.attention_memory import check_attention_function
    from mindmerger.model.mapping_files import config_of_models, empty_bridge, find_bridge

    if args.llm_only:
        return NoBridge(), (None, None)
    config = config_of_models(args.mt_path, args.llm_path, args.bridge, options)
    config.augmentation, config.chat_template = with_prompt, chat.record() if chat is not None else None
    if find_bridge(args.bridge).uses_memory:
        check_attention_function(args.attn_implementation)
    return empty_bridge(config), settle_start(args, stage, config, output_dir)


def settle_prompt(args, stage) -> bool:
    """Returns whether the prompt follows the mapped source, and warns where that is not as the stage has it."""
    with_prompt = stage.with_prompt if args.augmentation is None else args.augmentation
    where = f"--augmentation {with_prompt} in the {args.stage_name} stage"
    if with_prompt and not stage.with_prompt:
        prompt = "translation" if stage.data == "pairs" else "task's"
        warn(f"{where}: trains with the {prompt} prompt after the mapped source")
    # Obeyed with a warning: the published README has False for this stage, the released scripts True.
    if stage.with_prompt and not with_prompt:
        warn(f"{where}: trains MindMerger-Hard, no prompt after the mapped source")
    return with_prompt


def settle_chat_template(args, with_prompt: bool):
    """Returns the chat template around the prompts, None for none; `args` then names the choice.

    Without a prompt they keep what was asked for: a later stage may be started from their record.

    Raises:
        UserError: for a template that cannot be used.
    """
    from mindmerger.hub.chat_template import choose_template

    if not with_prompt:
        if args.chat_template == chat_template.AUTO:  # a script that trains several stages gives it to all
            warn(f"--chat_template has no effect in the {args.stage_name} stage, which has no prompt for the LLM")
        return None
    chat = choose_template(args.chat_template, args.llm_path)
    if chat is not None and args.chat_template is None:
        log(f"--chat_template not given: taking the one that {args.llm_path} was tuned with")
    args.chat_template = chat_template.NONE if chat is None else chat_template.AUTO
    return chat


def settle_batch(args) -> dict:
    """Settles batch sizes and gradient clipping against the user's DeepSpeed JSON; completes `args` with both.

    Returns:
        the DeepSpeed config.

    Raises:
        UserError: when the numbers contradict each other, naming both.
    """
    from mindmerger.training.deepspeed_config import effective_config, gradient_clipping, read_deepspeed_config

    # 0 takes back the budget that the scripts pass.
    args.micro_batch_tokens = args.micro_batch_tokens or None
    accumulation = settle_accumulation(args)
    config = read_deepspeed_config(args.deepspeed_config)
    args.max_grad_norm = gradient_clipping(config, args.max_grad_norm)  # the loop's, DeepSpeed's and the checkpoint's
    sizes = (args.train_batch_size, args.train_micro_batch_size_per_gpu, accumulation)
    return effective_config(config, *sizes, args.max_grad_norm)


def settle_models(args, config: dict) -> tuple[str, str | None]:
    """Checks both model folders, and what `--packing`, `--compile` and `--liger` need, before weights load.

    Args:
        config: DeepSpeed's.

    Returns:
        the fingerprints of the LLM and the encoder, None where there is no encoder.

    Raises:
        UserError: for the first thing that cannot be used.
    """
    from mindmerger.model.towers import check_models, check_roles, model_fingerprint
    from mindmerger.training.deepspeed_config import zero_stage
    from mindmerger.training.packing import check_packing
    from mindmerger.training.speedups import check_speed_options

    check_roles(args.llm_path, args.mt_path)
    check_models(args.mt_path, args.llm_path, True, not args.dry_run, args.quantization)
    check_quantised(args, zero_stage(config))
    check_packing(args)
    check_speed_options(args, zero_stage(config))
    return model_fingerprint(args.llm_path), model_fingerprint(args.mt_path) if args.mt_path else None


def check_quantised(args, zero_stage: int) -> None:
    """Refuses what cannot be done with a model whose weights are quantised, by --quantization or in its folder.

    Raises:
        UserError: for ZeRO 3 with such a model, and --compile or --liger with such an LLM.
    """
    from mindmerger.hub.model_configs import load_config, own_quantisation, quantisation_method

    configs = {path: load_config(path) for path in (args.llm_path, args.mt_path) if path}
    names = {path: f"{path} ({quantisation_method(one)})" for path, one in configs.items() if own_quantisation(one)}
    if args.quantization != "none":
        names[args.llm_path] = f"--quantization {args.quantization}"
    if names and zero_stage == 3:
        raise UserError(
            f"{names.popitem()[1]}: ZeRO 3 cannot share quantised weights among the GPUs: use ZeRO 0 to 2, where each "
            "GPU holds them all"
        )
    for flag in ("compile", "liger"):
        if args.llm_path in names and getattr(args, flag):
            raise UserError(f"--{flag} is not made for quantised layers, {names[args.llm_path]}: leave one of them out")


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
    stage = find_stage(args.bridge, args.stage_name, options)
    return adapter_stage.settle_alone(args, stage) if args.llm_only else stage


def advise_pairs(bridge: str, options: dict[str, str]) -> str:
    """Returns the advice to train a stage on sentence pairs, which every task has, "" where the bridge has none."""
    from mindmerger.model.mapping_files import stages_of

    names = [name for name, stage in stages_of(bridge, options).items() if stage.data == "pairs"]
    return f", or --stage_name {' or '.join(names)}" if names else ""


def find_stage(bridge: str, name: str, options: dict[str, str] | None = None):
    """Finds the stage of a bridge, by the names of --bridge and --stage_name.

    Raises:
        UserError: for a name that there is not, listing those that there are, and a stage that asks for more than
            this loop does.
    """
    from mindmerger.bridges.base import nearest
    from mindmerger.model.mapping_files import stages_of

    stages = stages_of(bridge, options or {})
    if name not in stages:
        raise UserError(
            f"--stage_name {name!r} is not a stage of --bridge {bridge}: choose {' or '.join(stages)}"
            f"{nearest(name, stages)}"
        )
    stage = stages[name]
    known = {"data": ("pairs", "question_pairs", "task", "english_task"), "encoder_text": ("source", "prompt")}
    known["trains"] = (("bridge",), ("bridge", "lm_head"), ("adapter",))
    for field, values in known.items():
        if getattr(stage, field) not in values:
            raise UserError(
                f"--stage_name {name} of --bridge {bridge} has {field} {getattr(stage, field)!r}: this program trains "
                f"{' or '.join(map(repr, values))} so far"
            )
    return stage


def settle_languages(args, stage) -> list | None:
    """Returns the languages to train on, None for the task's own; English alone where the stage has it so.

    Raises:
        UserError: for an unknown language, and for --languages that the stage does not train on.
    """
    from mindmerger.tasks.languages import LANGUAGES, parse_languages

    languages = parse_languages(args.languages) if args.languages is not None else None
    if stage.data != "english_task":
        return languages
    english = [LANGUAGES["English"]]
    if languages not in (None, english):
        raise UserError(
            f"--languages {args.languages}: the {args.stage_name} stage of --bridge {args.bridge} trains on English "
            "rows alone: leave --languages out"
        )
    return english


def warn_of_unused(args) -> None:
    """Says which of the given flags have no effect beside the others."""
    # The released code put it into CUDA_VISIBLE_DEVICES on every rank, whichever GPU was meant for that rank.
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


def settle_accumulation(args) -> int:
    """Returns the micro-batches of each process in one optimizer step: batch / (micro-batch x processes).

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
    # Not an error: one of the published commands has 16, which is right on one GPU alone.
    if args.gradient_accumulation not in (None, accumulation):
        warn(
            f"--gradient_accumulation {args.gradient_accumulation} is overruled: batch {args.train_batch_size} / "
            f"(micro-batch {args.train_micro_batch_size_per_gpu} x {world_size()} processes) = {accumulation}"
        )
    return accumulation


def check_reporting(where: str) -> None:
    """Refuses a report target whose package is absent."""
    import importlib.util

    if where != "none" and importlib.util.find_spec(where) is None:  # each has the name of its package
        raise UserError(f"--report_to {where} needs the package {where}: pip install {where}")


def check_lengths(settings: Settings, data) -> None:
    """Checks the longest rows against the positions of the LLM and the encoder, before weights load.

    Raises:
        UserError: for rows longer than a table of positions.
    """
    from mindmerger.model.towers import check_positions

    longest, source = int(data.merged_lengths(settings.bridge.prefix_length).max()), int(data.encoder_lengths.max())
    check_positions(settings.args.llm_path, longest, "the longest row", "--max_gen_len or --max_seq_len")
    if settings.args.mt_path is not None:
        check_positions(settings.args.mt_path, source, "the longest source", "--max_seq_len")


def check_tokens(settings: Settings, tokenizers, data) -> None:
    """Refuses rows with a token that the LLM or the encoder has no embedding for, before weights load."""
    from mindmerger.data.tokenising import check_rows
    from mindmerger.hub.model_configs import embedding_rows, llm_config, load_config

    if not is_main():  # it reads all ids, which are the same on every rank
        return
    ids = [
        data.largest_id("prompt_ids"),
        data.largest_id("target_ids"),
        -1 if tokenizers.bos_id is None else tokenizers.bos_id,
    ]
    check_rows(tokenizers.llm, settings.args.llm_path, ids, embedding_rows(llm_config(settings.args.llm_path)[0]))
    if settings.args.mt_path is not None:
        ids = [data.largest_id("encoder_ids")]
        check_rows(tokenizers.encoder, settings.args.mt_path, ids, embedding_rows(load_config(settings.args.mt_path)))
