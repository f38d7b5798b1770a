"""An evaluation's command line, and everything that can be settled before a model loads.

`settle` reads data, tokenizers and configs, checks that they fit each other, and returns the run's `Settings`.
"""

import argparse
import hashlib
import json
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NamedTuple

from mindmerger.evaluation.models import (
    DEFAULT_BRIDGE,
    DEFAULT_ENCODER,
    DEFAULT_LLM,
    Models,
    check_models_fit,
    find_models_on_rank_0,
    warn_of_other_training,
)
from mindmerger.evaluation.parallel_input import add_arguments as add_parallel_arguments
from mindmerger.evaluation.parallel_input import options_of
from mindmerger.generation.answers import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MAX_LEN,
    check_tokens,
    input_positions,
    tokenise_inputs,
)
from mindmerger.runtime.command import CommandParser, check_save_name, check_seed, parse_bool
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path
from mindmerger.runtime.processes import is_main, log, warn

# torch, transformers and our modules that need them are imported where they are used: --help answers at once.

MAPPING_HASH = "--init_checkpoint (sha256)"  # of an evaluation's identity; rank 0 alone reads the file
FORM_SUFFIX = {"soft": "", "hard": "-hard", "llm_only": "-llm_only"}


def _at_least(minimum: int):
    def parse_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        # An upper end too: numpy's generators and torch's sizes overflow with a traceback.
        if value is None or not minimum <= value < 2**64:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text[:40]!r}")
        return value

    return parse_number


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, and says which flags have no effect beside --compare.

    Raises:
        UserError: for a flag that does not exist, or a value that it cannot have.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.compare:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        ignored = [f"--{name}" for name in given if name not in ("compare", "seed", "deepspeed", "local_rank")]
        if ignored:
            warn(f"--compare evaluates nothing: no use of {', '.join(ignored)}")
    return args


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; every flag with its default and meaning."""
    parser = CommandParser(
        description="Evaluates a mapping, or the LLM alone, on one task: greedy answers, scores, one table.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--task", default="math", help="math (means MGSM, the default), math_mgsm, math_msvamp, x-csqa, xnli"
    )
    what.add_argument(
        "--init_checkpoint",
        type=model_path,
        help="the mapping: a saved folder, a .safetensors file or a released pytorch_model.bin (default: what the last "
        "stage of training left in outputs/<save_name>/<task>)",
    )
    what.add_argument(
        "--llm_path",
        type=model_path,
        help=f"the LLM; default: what the mapping's config.json names, else {DEFAULT_LLM}",
    )
    what.add_argument(
        "--mt_path", type=model_path, help=f"the encoder; default: as for --llm_path, else {DEFAULT_ENCODER}"
    )
    what.add_argument(
        "--augmentation",
        type=parse_bool,
        help="True: Soft, mapped source and prompt (MindMerger's default); False: Hard, mapped source only",
    )
    what.add_argument("--llm_only", action="store_true", help="the LLM alone on the prompt: no encoder, no mapping")
    add_parallel_arguments(parser.add_argument_group("parallel multilingual input (PMI), with --llm_only"))
    _add_data_and_generation(parser)
    output = parser.add_argument_group("results")
    output.add_argument("--save_name", default="MindMerger", help="name of the run (default MindMerger)")
    output.add_argument(
        "--results_dir", type=model_path, default="results", help="folder of all results folders (default results)"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace the results that results/<save_name>/<task> already holds"
    )
    output.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        help="seed of the bootstrap intervals and of --compare's sign-flip test (default 0); decoding is greedy",
    )
    output.add_argument(
        "--compare",
        nargs="+",
        metavar="FOLDER",
        help="compare finished results folders instead of evaluating: the first with each other one",
    )
    launcher = parser.add_argument_group("launcher and older commands")
    launcher.add_argument(
        "--deepspeed",
        action="store_true",
        help="accepted: the launcher's processes share the examples with or without it",
    )
    launcher.add_argument("--local_rank", type=int, default=0, help="number of this process, appended by the launcher")
    launcher.add_argument(
        "--gpu", help="accepted, changes nothing: set CUDA_VISIBLE_DEVICES or use deepspeed --include"
    )
    launcher.add_argument("--train_batch_size", help="accepted, changes nothing here")
    launcher.add_argument("--train_micro_batch_size_per_gpu", help="accepted, changes nothing here")
    return parser


def _add_data_and_generation(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", type=model_path, default="./datas", help="data folder (default ./datas)")
    data.add_argument(
        "--languages", help="languages to evaluate, by name or code, with commas: Swahili,th (default: all of the task)"
    )
    data.add_argument(
        "--limit", type=_at_least(1), help="number of examples of each language, from the first on (default: all)"
    )
    data.add_argument(
        "--skip_faulty_rows",
        action="store_true",
        help="leave out and list faulty rows of the test sets; without it the first one ends the run",
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--eval_batch_size",
        type=_at_least(1),
        help="most examples of a batch (default 8; with --eval_max_tokens no limit)",
    )
    generation.add_argument(
        "--eval_max_tokens",
        type=_at_least(1),
        help="most positions of a batch, new tokens included: short questions then share larger batches",
    )
    generation.add_argument(
        "--max_seq_len",
        type=_at_least(2),
        default=DEFAULT_MAX_LEN,
        help="most tokens of the encoder's input (default 512)",
    )
    generation.add_argument(
        "--max_gen_len",
        type=_at_least(2),
        help="most tokens of the prompt (default 512) and, when given, most new tokens",
    )
    generation.add_argument(
        "--max_new_tokens",
        type=_at_least(1),
        help="most new tokens, wins over --max_gen_len (default 512 math, 16 others)",
    )
    generation.add_argument(
        "--precision", choices=["bf16", "fp32"], help="dtype of both models (default bf16 on a GPU, fp32 on a CPU)"
    )
    generation.add_argument(
        "--attn_implementation", help="attention of transformers: sdpa, eager, flash_attention_2, …"
    )
    generation.add_argument(
        "--engine",
        choices=["hf", "vllm"],
        default="hf",
        help="library that decodes: transformers (default), or vLLM on one NVIDIA GPU in one process",
    )


class Items(NamedTuple):
    """The questions of all languages, in table order.

    faults: of the rows that --skip_faulty_rows left out. parallel_input: as results.json records --parallel_input.
    suffix: of the results folder, where not the form decides it.
    """

    examples: list
    faults: list[str] | None
    parallel_input: dict | None
    suffix: str | None


@dataclass
class Settings:
    """All that is known before models load. Lists run parallel to `examples`, languages in table order."""

    task: object
    form: str  # soft, hard or llm_only
    examples: list
    columns: dict  # encoder_ids and source_cut, prompt_ids and prompt_cut, as far as the form has them
    tokenizers: object
    mt_path: str | None
    llm_path: str
    bridge_name: str
    bridge: object | None  # without storage: asked for the prefix's length
    mapping_file: str | None
    precision: str
    attn_implementation: str | None
    engine: str
    max_new_tokens: int
    batch_size: int | None  # None: as many rows as `token_budget` allows
    token_budget: int | None
    seed: int
    folder: Path
    overwrite: bool
    faults: list[str] | None
    parallel_input: dict | None
    arguments: dict  # the command line, for results.json
    identity: dict = field(default_factory=dict)  # everything the answers and scores depend on

    @property
    def two_scorers(self) -> bool:
        """Whether the released scorer reads this task's outputs otherwise than ours, which shows on an empty one."""
        empty = self.task.score("", "0")
        return empty.prediction != empty.reference_prediction


def settle(args: argparse.Namespace, on_gpu: bool) -> Settings:
    """Reads data, tokenizers and configs and checks that they fit each other. Call it on all ranks.

    Raises:
        UserError: for the first thing that does not.
    """
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.model.attention_memory import check_attention_function

    check_flags(args)
    task, languages = choose_task(args)
    models = find_models_on_rank_0(args, task)
    form = choose_form(args, models)
    if form != "llm_only":
        warn_of_other_training(models.config, task, form)
    bridge = check_models_fit(models)
    if bridge is not None and bridge.uses_memory:
        check_attention_function(args.attn_implementation, args.engine)
    items = read_items(args, task, languages)
    tokenizers = load_tokenizers(models.encoder, models.llm)
    settings = Settings(
        task=task,
        form=form,
        examples=items.examples,
        columns=tokenise_items(args, tokenizers, items.examples, form, models.config),
        tokenizers=tokenizers,
        mt_path=models.encoder,
        llm_path=models.llm,
        bridge_name=models.config.bridge if models.config is not None else DEFAULT_BRIDGE,
        bridge=bridge,
        mapping_file=models.mapping_file,
        precision=args.precision or ("bf16" if on_gpu else "fp32"),
        attn_implementation=args.attn_implementation,
        engine=args.engine,
        max_new_tokens=args.max_new_tokens or args.max_gen_len or task.max_new_tokens,
        batch_size=args.eval_batch_size or (None if args.eval_max_tokens else DEFAULT_BATCH_SIZE),
        token_budget=args.eval_max_tokens,
        seed=args.seed,
        folder=Path(args.results_dir) / args.save_name / (task.name + (items.suffix or FORM_SUFFIX[form])),
        overwrite=args.overwrite,
        faults=items.faults,
        parallel_input=items.parallel_input,
        arguments=vars(args) | {"augmentation": form != "hard"},
    )
    check_inputs(settings)
    settings.identity = identity_of(args, settings, languages)
    return settings


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, and warns of those without effect.

    Raises:
        UserError: for the first that does not.
    """
    check_seed(args.seed)
    check_save_name(args.save_name)
    if options_of(args) is not None and not args.llm_only:
        raise UserError("--parallel_input is for the LLM alone: pass --llm_only too")
    warn_of_unused(args)


def warn_of_unused(args: argparse.Namespace) -> None:
    """Says which of the given flags have no effect beside the others."""
    if args.gpu is not None:
        warn("--gpu changes nothing: choose GPUs by CUDA_VISIBLE_DEVICES or deepspeed --include localhost:0,1")
    if args.engine == "vllm" and args.attn_implementation is not None:
        warn("--attn_implementation reaches the encoder alone: vLLM has attention kernels of its own")
    names = ("init_checkpoint", "augmentation", "mt_path")
    unused = [f"--{name}" for name in names if args.llm_only and getattr(args, name) is not None]
    if unused:
        named = ", of which only the name of its LLM is taken" if args.init_checkpoint and not args.llm_path else ""
        warn(f"--llm_only evaluates without encoder and mapping: no use of {', '.join(unused)}{named}")


def choose_form(args: argparse.Namespace, models: Models) -> str:
    """Returns the form that is evaluated: soft, hard or llm_only.

    Without --augmentation it is the one that the bridge's last stage trains.
    """
    from mindmerger.model.mapping_files import form_of

    return "llm_only" if args.llm_only else form_of(models.config, args.augmentation)


def choose_task(args: argparse.Namespace) -> tuple:
    """Returns the task and the languages of its test set that are asked for.

    Raises:
        UserError: for unknown ones, or a task without a test set.
    """
    from mindmerger.tasks import TASKS, find_task
    from mindmerger.tasks.languages import parse_languages

    task = find_task(args.task)
    if args.task == "math":
        log(f"task math means {task.name}; the other set is --task math_msvamp")
    if not task.evaluation_languages:
        known = ", ".join(name for name, one in TASKS.items() if one.evaluation_languages)
        raise UserError(f"task {task.name} has no evaluation set: choose --task {known}")
    return task, parse_languages(",".join(task.evaluation_languages) if args.languages is None else args.languages)


def read_items(args: argparse.Namespace, task, languages: list) -> Items:
    """Reads the test sets, and puts the prompts of --parallel_input in their place where it is given.

    Raises:
        UserError: for missing or faulty data.
    """
    from mindmerger.evaluation.parallel_input import apply_parallel_input
    from mindmerger.tasks.examples import evaluation_examples
    from mindmerger.tasks.readers import describe_faults, skipping_named

    faults = [] if args.skip_faulty_rows else None
    source = (task, args.data_root)
    with skipping_named():
        examples = [e for one in languages for e in evaluation_examples(*source, one, args.limit, faults)]
    if faults:
        warn(describe_faults(faults, ", all of them listed in results.json"))
    options = options_of(args)
    if options is None:
        return Items(examples, faults, None, None)
    examples, beside = apply_parallel_input(task, args.data_root, examples, options)
    record = {"k": options.size, "translations": options.label, "source": options.translations, "order": options.order}
    return Items(examples, faults, {"name": options.name, **record, "languages": beside}, options.suffix)


def tokenise_items(args: argparse.Namespace, tokenizers, examples: list, form: str, config) -> dict:
    """Returns the columns of ids that the form reads.

    Args:
        config: of the mapping, whose stage says what the encoder reads; None for the LLM alone.
    """
    from mindmerger.model.mapping_files import stage_of

    return tokenise_inputs(
        tokenizers,
        examples,
        with_source=form != "llm_only",
        with_prompt=form != "hard",
        max_seq_len=args.max_seq_len,
        max_gen_len=prompt_limit(args),
        encoder_text=stage_of(config).encoder_text if config is not None else "source",
    )


def prompt_limit(args: argparse.Namespace) -> int:
    """Returns the most tokens of a prompt.

    A PMI prompt holds the question several times: the default grows with it, or its translations would be truncated.
    """
    return args.max_gen_len or DEFAULT_MAX_LEN * (1 + (args.parallel_input or 0))


def check_inputs(settings: Settings) -> None:
    """Refuses inputs that a model has no embeddings or no positions for.

    Raises:
        UserError: naming the token, or the number of positions and the flags that lower it.
    """
    from mindmerger.hub.model_files import embedding_rows, llm_config, load_config
    from mindmerger.model.towers import check_positions

    mt_path, llm_path, columns = settings.mt_path, settings.llm_path, settings.columns
    encoder_rows = embedding_rows(load_config(mt_path)) if mt_path is not None else None
    llm_rows = embedding_rows(llm_config(llm_path)[0])
    check_tokens(settings.tokenizers, columns, (mt_path, encoder_rows), (llm_path, llm_rows))
    longest = max(input_positions(columns, settings.bridge)) + settings.max_new_tokens
    flags = "--max_new_tokens, --max_gen_len or --max_seq_len"
    check_positions(llm_path, longest, "the longest input with its new tokens", flags)
    if mt_path is not None:
        check_positions(mt_path, max(map(len, columns["encoder_ids"])), "the longest question", "--max_seq_len")


def identity_of(args: argparse.Namespace, settings: Settings, languages: list) -> dict:
    """Returns everything that answers and scores depend on, by the names that the user knows it by."""
    from mindmerger.evaluation.results import SCORER
    from mindmerger.model.mapping_files import mapping_sha256
    from mindmerger.model.towers import model_fingerprint

    # Without the question, which no answer depends on.
    rows = [astuple(example)[:-1] for example in settings.examples]
    parallel = settings.parallel_input or {}
    return {
        "--task": settings.task.name,
        "form (--augmentation, --llm_only)": settings.form,
        MAPPING_HASH: mapping_sha256(settings.mapping_file) if settings.mapping_file and is_main() else None,
        "--llm_path (fingerprint)": model_fingerprint(settings.llm_path),
        "--mt_path (fingerprint)": model_fingerprint(settings.mt_path) if settings.mt_path else None,
        "--languages": [language.name for language in languages],
        "--limit": args.limit,
        "--parallel_input": args.parallel_input,
        "--translations": parallel.get("translations"),
        "--order": parallel.get("order"),
        "data (sha256)": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "--max_seq_len": args.max_seq_len,
        "--max_gen_len": prompt_limit(args),
        "--max_new_tokens": settings.max_new_tokens,
        "--precision": settings.precision,
        "--attn_implementation": args.attn_implementation,
        # Its kernels round otherwise. None for transformers: folders without the entry are its.
        "--engine": None if args.engine == "hf" else args.engine,
        "--seed": args.seed,
        SCORER: settings.task.scorer_version,
    }
