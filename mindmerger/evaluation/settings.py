"""An evaluation's command line, and everything that can be settled before a model loads.

`prepare` reads data, tokenizers and configs, checks that they fit each other, and returns the run's `Plan`.
"""

import argparse
import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path

from mindmerger.evaluation.parallel_input import add_arguments as add_parallel_arguments
from mindmerger.generation.answers import DEFAULT_MAX_LEN, check_tokens, input_positions, tokenise_form
from mindmerger.runtime.command import CommandParser, check_save_name, check_seed, parse_bool
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import sha256_of_file
from mindmerger.runtime.processes import broadcast_object, is_main, log, on_all_ranks, warn, world_size

# torch, transformers and our modules that need them are imported where they are used: --help answers at once.
DEFAULT_LLM = "../LLMs/Llama-2-7b-hf"
DEFAULT_ENCODER = "../LLMs/mt5-xl"


START = "--init_checkpoint (sha256)"  # of an evaluation's identity; rank 0 alone reads the file
FORM_SUFFIX = {"soft": "", "hard": "-hard", "llm_only": "-llm_only"}


def _at_least(minimum: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < 2**64:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text[:40]!r}")
        return value

    return parse


def _path(text: str) -> str:
    return text.rstrip("/") or "/"  # google/mt5-xl/ is meant as google/mt5-xl


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag with its default and meaning."""
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
        type=_path,
        help="the mapping: a saved folder, a .safetensors file or a released pytorch_model.bin (default: what training "
        "left in outputs/<save_name>/<task>/augmentation)",
    )
    what.add_argument(
        "--llm_path", type=_path, help=f"default: what the mapping's config.json names, else {DEFAULT_LLM}"
    )
    what.add_argument("--mt_path", type=_path, help=f"the encoder; default: as for --llm_path, else {DEFAULT_ENCODER}")
    what.add_argument(
        "--augmentation",
        type=parse_bool,
        help="True: Soft, mapped source and prompt (default); False: Hard, mapped source only",
    )
    what.add_argument("--llm_only", action="store_true", help="the LLM alone on the prompt: no encoder, no mapping")
    add_parallel_arguments(parser.add_argument_group("parallel multilingual input (PMI), with --llm_only"))
    _add_data_and_generation(parser)
    output = parser.add_argument_group("results")
    output.add_argument("--save_name", default="MindMerger", help="name of the run (default MindMerger)")
    output.add_argument("--results_dir", type=_path, default="results", help="default results")
    output.add_argument(
        "--overwrite", action="store_true", help="start over where results/<save_name>/<task> already exists"
    )
    output.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        help="of the bootstrap intervals and of --compare's sign-flip test (default 0); decoding is greedy",
    )
    output.add_argument(
        "--compare",
        nargs="+",
        metavar="FOLDER",
        help="evaluate nothing: compare finished results folders, the first with each other one",
    )
    launcher = parser.add_argument_group("launcher and older commands")
    launcher.add_argument(
        "--deepspeed",
        action="store_true",
        help="accepted; the launcher's processes share the examples with or without it",
    )
    launcher.add_argument("--local_rank", type=int, default=0, help="appended by the launcher")
    launcher.add_argument(
        "--gpu", help="accepted, changes nothing: set CUDA_VISIBLE_DEVICES or use deepspeed --include"
    )
    launcher.add_argument("--train_batch_size", help="accepted, changes nothing here")
    launcher.add_argument("--train_micro_batch_size_per_gpu", help="accepted, changes nothing here")
    return parser


def _add_data_and_generation(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", type=_path, default="./datas", help="data folder (default ./datas)")
    data.add_argument(
        "--languages", help="only these, by name or code, with commas: Swahili,th (default: all of the task)"
    )
    data.add_argument("--limit", type=_at_least(1), help="only the first N examples of each language")
    data.add_argument(
        "--skip_faulty_rows",
        action="store_true",
        help="leave out and list rows of the test sets that are faulty, where the first one otherwise ends the run",
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--eval_batch_size",
        type=_at_least(1),
        help="most examples in a batch (default 8; with --eval_max_tokens no limit)",
    )
    generation.add_argument(
        "--eval_max_tokens",
        type=_at_least(1),
        help="most positions in a batch, new tokens included: short questions then share larger batches",
    )
    generation.add_argument(
        "--max_seq_len", type=_at_least(2), default=DEFAULT_MAX_LEN, help="limits the encoder's tokens (default 512)"
    )
    generation.add_argument(
        "--max_gen_len",
        type=_at_least(2),
        help="limits the prompt's tokens (default 512) and, when given, the new tokens",
    )
    generation.add_argument(
        "--max_new_tokens",
        type=_at_least(1),
        help="limits the new tokens, wins over --max_gen_len (default 512 math, 16 others)",
    )
    generation.add_argument(
        "--precision", choices=["bf16", "fp32"], help="of both models (default bf16 on a GPU, fp32 on a CPU)"
    )
    generation.add_argument("--attn_implementation", help="handed to transformers: sdpa, eager, flash_attention_2, …")
    generation.add_argument(
        "--engine",
        choices=["hf", "vllm"],
        default="hf",
        help="what decodes: transformers (default), or vLLM on one NVIDIA GPU in one process",
    )


@dataclass
class Plan:
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
    checkpoint: str | None
    precision: str
    attn_implementation: str | None
    max_new_tokens: int
    folder: Path
    identity: dict  # everything the answers and scores depend on
    engine: str = "hf"
    faults: list[str] | None = None  # of the rows that --skip_faulty_rows left out
    parallel_input: dict | None = None  # what results.json says of --parallel_input

    @property
    def two_scorers(self) -> bool:
        """Whether the released scorer reads this task's outputs otherwise than ours, which shows on an empty one."""
        empty = self.task.score("", "0")
        return empty.prediction != empty.reference_prediction


def form_of(args: argparse.Namespace) -> str:
    """The form that is evaluated: soft, hard or llm_only."""
    return "llm_only" if args.llm_only else "hard" if args.augmentation is False else "soft"


def find_models_on_rank_0(args: argparse.Namespace) -> tuple[str | None, str | None, str, str] | None:
    """Returns rank 0's `find_models`, whose node alone may have the mapping; None in a run of one process."""
    from mindmerger.tasks import find_task

    if world_size() == 1:
        return None

    def find():
        check_save_name(args.save_name)
        return find_models(args, find_task(args.task), form_of(args)) if is_main() else None

    return broadcast_object(on_all_ranks(find))


def prepare(args: argparse.Namespace, on_gpu: bool, models: tuple | None = None) -> Plan:
    """Reads data, tokenizers and configs and checks that they fit each other; `models` as `find_models_on_rank_0`
    returns them.

    Raises:
        UserError: for the first thing that does not.
    """
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.hub.model_files import check_models
    from mindmerger.model.mapping_files import check_mapping, config_of_models, empty_bridge
    from mindmerger.model.towers import check_roles
    from mindmerger.tasks import TASKS, find_task
    from mindmerger.tasks.languages import parse_languages

    check_seed(args.seed)
    check_save_name(args.save_name)
    _check_parallel_input(args)
    warn_of_unused(args)
    form = form_of(args)
    args.augmentation = args.augmentation is not False
    task = find_task(args.task)
    if args.task == "math":
        log(f"task math means {task.name}; the other set is --task math_msvamp")
    if not task.evaluation_languages:
        known = ", ".join(name for name, one in TASKS.items() if one.evaluation_languages)
        raise UserError(f"task {task.name} has no evaluation set: choose --task {known}")
    wanted = ",".join(task.evaluation_languages) if args.languages is None else args.languages
    languages = parse_languages(wanted)
    checkpoint, mt_path, llm_path, bridge_name = models or find_models(args, task, form)
    check_roles(llm_path, mt_path)
    check_models(mt_path, llm_path, backward=False)
    examples, faults = _read_examples(args, task, languages)
    examples, parallel_input, suffix = _with_parallel_input(args, task, examples)
    # A PMI prompt holds the question several times: the default limit grows with it, or its translations would be cut.
    prompt_limit = args.max_gen_len or DEFAULT_MAX_LEN * (1 + (args.parallel_input or 0))
    tokenizers = load_tokenizers(mt_path, llm_path)
    columns = tokenise_form(tokenizers, examples, form, args.max_seq_len, prompt_limit)
    max_new_tokens = args.max_new_tokens or args.max_gen_len or task.max_new_tokens
    precision = args.precision or ("bf16" if on_gpu else "fp32")
    bridge = None
    if checkpoint is not None:
        between = config_of_models(mt_path, llm_path, bridge_name)
        bridge = empty_bridge(between)
        if is_main():
            check_mapping(checkpoint, between)
    check_inputs(tokenizers, columns, bridge, mt_path, llm_path, max_new_tokens)
    plan = Plan(
        task=task,
        form=form,
        examples=examples,
        columns=columns,
        tokenizers=tokenizers,
        mt_path=mt_path,
        llm_path=llm_path,
        bridge_name=bridge_name,
        bridge=bridge,
        checkpoint=checkpoint,
        precision=precision,
        attn_implementation=args.attn_implementation,
        max_new_tokens=max_new_tokens,
        folder=Path(args.results_dir) / args.save_name / (task.name + (suffix or FORM_SUFFIX[form])),
        identity={},
        engine=args.engine,
        parallel_input=parallel_input,
        faults=faults,
    )
    plan.identity = identity_of(args, plan, languages, prompt_limit)
    return plan


def identity_of(args: argparse.Namespace, plan: Plan, languages: list, prompt_limit: int) -> dict:
    """Everything that answers and scores depend on, by the names that the user knows it by."""
    from mindmerger.evaluation.results import SCORER
    from mindmerger.model.towers import model_fingerprint

    rows = [astuple(example)[:-1] for example in plan.examples]
    return {
        "--task": plan.task.name,
        "form (--augmentation, --llm_only)": plan.form,
        START: sha256_of_file(plan.checkpoint) if plan.checkpoint and is_main() else None,
        "--llm_path (fingerprint)": model_fingerprint(plan.llm_path),
        "--mt_path (fingerprint)": model_fingerprint(plan.mt_path) if plan.mt_path else None,
        "--languages": [language.name for language in languages],
        "--limit": args.limit,
        "--parallel_input": args.parallel_input,
        "--translations": plan.parallel_input and plan.parallel_input["translations"],
        "--order": plan.parallel_input and plan.parallel_input["order"],
        # Without the question, which no answer depends on.
        "data (sha256)": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "--max_seq_len": args.max_seq_len,
        "--max_gen_len": prompt_limit,
        "--max_new_tokens": plan.max_new_tokens,
        "--precision": plan.precision,
        "--attn_implementation": args.attn_implementation,
        # Its kernels round otherwise. None for transformers: folders without the entry are its.
        "--engine": None if args.engine == "hf" else args.engine,
        "--seed": args.seed,
        SCORER: plan.task.scorer_version,
    }


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


def _read_examples(args: argparse.Namespace, task, languages: list) -> tuple[list, list[str] | None]:
    """The examples of all languages, and the faults of the rows that --skip_faulty_rows leaves out of them."""
    from mindmerger.tasks.examples import evaluation_examples
    from mindmerger.tasks.readers import describe_faults, skipping_named

    faults = [] if args.skip_faulty_rows else None
    source = (task, args.data_root)
    with skipping_named():
        examples = [e for one in languages for e in evaluation_examples(*source, one, args.limit, faults)]
    if faults:
        warn(describe_faults(faults, ", all of them listed in results.json"))
    return examples, faults


def _check_parallel_input(args: argparse.Namespace) -> None:
    from mindmerger.evaluation.parallel_input import options_of

    if options_of(args) is not None and not args.llm_only:
        raise UserError("--parallel_input is for the LLM alone: pass --llm_only too")


def _with_parallel_input(args: argparse.Namespace, task, examples: list) -> tuple[list, dict | None, str | None]:
    """The examples with --parallel_input's prompts, its record for results.json, and the results folder's suffix."""
    from mindmerger.evaluation.parallel_input import apply_parallel_input, options_of

    options = options_of(args)
    if options is None:
        return examples, None, None
    examples, languages = apply_parallel_input(task, args.data_root, examples, options)
    record = {"k": options.size, "translations": options.label, "source": options.translations, "order": options.order}
    return examples, {"name": options.name, **record, "languages": languages}, options.suffix


def check_inputs(tokenizers, columns: dict, bridge, mt_path: str | None, llm_path: str, max_new_tokens: int) -> None:
    """Refuses inputs that a model has no embeddings or no positions for."""
    from mindmerger.hub.model_files import embedding_rows, llm_config, load_config
    from mindmerger.model.towers import check_positions

    encoder_rows = embedding_rows(load_config(mt_path)) if mt_path is not None else None
    check_tokens(tokenizers, columns, (mt_path, encoder_rows), (llm_path, embedding_rows(llm_config(llm_path)[0])))
    longest = max(input_positions(columns, bridge)) + max_new_tokens
    flags = "--max_new_tokens, --max_gen_len or --max_seq_len"
    check_positions(llm_path, longest, "the longest input with its new tokens", flags)
    if mt_path is not None:
        check_positions(mt_path, max(map(len, columns["encoder_ids"])), "the longest question", "--max_seq_len")


def find_models(args: argparse.Namespace, task, form: str) -> tuple[str | None, str | None, str, str]:
    """(mapping file, encoder, LLM, bridge): from the flags, else the mapping's config.json, else the defaults."""
    from mindmerger.model.mapping_files import find_bridge, find_mapping_file, read_config

    checkpoint = args.init_checkpoint
    if checkpoint is None and form != "llm_only":
        trained = Path("outputs") / args.save_name / task.training_name / "augmentation"
        if not trained.is_dir():
            raise UserError(
                f"no --init_checkpoint given and training left nothing in {trained}: pass the mapping to evaluate, or "
                "--llm_only for the LLM alone"
            )
        checkpoint = str(trained)
        log(f"--init_checkpoint not given: taking {trained}")
    mapping_file = str(find_mapping_file(checkpoint)) if checkpoint is not None else None
    config = read_config(checkpoint) if checkpoint is not None else None
    found = {}
    defaults = {"llm_path": DEFAULT_LLM} | ({} if form == "llm_only" else {"mt_path": DEFAULT_ENCODER})
    for flag, default in defaults.items():
        given, recorded = getattr(args, flag), getattr(config, flag, None)
        if given is None and recorded is not None:
            log(f"--{flag} not given: taking {recorded}, named by the mapping's config.json")
        elif given is not None and recorded is not None and Path(given).resolve() != Path(recorded).resolve():
            warn(f"this mapping was trained with --{flag} {recorded}, not {given}")
        found[flag] = given or recorded or default
    if form == "llm_only":
        return None, None, found["llm_path"], "mindmerger"
    if config is not None and config.task not in (None, task.training_name):
        warn(f"this mapping was trained for task {config.task}, now evaluated on {task.name}")
    stage = find_bridge(config.bridge).stages.get(config.stage) if config is not None else None
    if stage is not None and stage.data == "pairs":
        warn(f"this mapping comes from the {config.stage} stage: it has not been trained on the task yet")
    elif config is not None and config.augmentation not in (None, form == "soft"):
        name = {True: "Soft, --augmentation True", False: "Hard, --augmentation False"}
        warn(f"this mapping was trained as {name[config.augmentation]}, now evaluated as {name[form == 'soft']}")
    return mapping_file, found["mt_path"], found["llm_path"], config.bridge if config is not None else "mindmerger"
