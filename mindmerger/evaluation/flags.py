"""An evaluation's command line, and what its flags may not ask for together."""

import argparse

from mindmerger.evaluation.models import DEFAULT_ENCODER, DEFAULT_LLM
from mindmerger.evaluation.parallel_input import add_arguments as add_parallel_arguments
from mindmerger.evaluation.parallel_input import options_of
from mindmerger.evaluation.probes import PROBES
from mindmerger.evaluation.scoring import SCORINGS
from mindmerger.evaluation.translate_test import add_argument as add_translate_test
from mindmerger.generation.answers import DEFAULT_MAX_LEN
from mindmerger.runtime import config_file
from mindmerger.runtime.chat_template import add_argument as add_chat_template
from mindmerger.runtime.command import CommandParser, at_least, check_save_name, check_seed, parse_bool
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path
from mindmerger.runtime.precision import add_argument as add_precision
from mindmerger.runtime.precision import add_quantization
from mindmerger.runtime.processes import warn
from mindmerger.tasks.languages import add_language_flags


def _at_least(minimum: int):
    # An upper end too: numpy's generators and torch's sizes overflow with a traceback.
    return at_least(minimum, below=2**64)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, and says which flags have no effect beside --compare.

    Raises:
        UserError: for a flag that does not exist, or a value that it cannot have.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.compare:
        # argparse does not say which flags were given: one that repeats its default passes for absent.
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        ignored = [
            f"--{name}" for name in given if name not in ("compare", "seed", "config", "deepspeed", "local_rank")
        ]
        if ignored:
            warn(f"--compare evaluates nothing: no use of {', '.join(ignored)}")
    return args


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; every flag with its default and meaning."""
    parser = CommandParser(
        description="Evaluates a mapping, or the LLM alone, on one task: greedy answers, scores, one table."
    )
    config_file.add_argument(parser.add_argument)
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--task",
        default="math",
        help="math (means MGSM, the default), math_mgsm, math_msvamp, x-csqa, xnli; also math_mgsm_rev2, "
        "math_afrimgsm, afrixnli, americas_nli, xcopa, belebele, flores",
    )
    _add_models(what)
    what.add_argument(
        # Text, not a switch: the published commands write True or False behind it.
        "--augmentation",
        type=parse_bool,
        help="True: Soft, mapped source and prompt (MindMerger's default); False: Hard, mapped source only",
    )
    what.add_argument("--llm_only", action="store_true", help="the LLM alone on the prompt: no encoder, no mapping")
    what.add_argument(
        "--probe_prefix",
        choices=PROBES,
        help="prefix that takes the own one's place, to see whether the LLM reads it: of another question in the same "
        "language (shuffled, by --seed), or zeros (zero); the prompt stays",
    )
    add_translate_test(what)
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
        help="seed of the bootstrap intervals, of --compare's sign-flip test and of the exchange of --probe_prefix "
        "shuffled (default 0); decoding is greedy",
    )
    output.add_argument(
        "--score_gold",
        action="store_true",
        help="also compute the mean loss of the gold answers, in nats per token, as training computes it on its "
        "targets; the gold answer of a math question is its number alone, since test sets hold no reasoning",
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
    # The launcher appends it to every command: without the flag argparse would refuse what it starts.
    launcher.add_argument("--local_rank", type=int, default=0, help="number of this process, appended by the launcher")
    launcher.add_argument(
        # The released code writes it into CUDA_VISIBLE_DEVICES on every rank, which puts all ranks on one GPU.
        "--gpu",
        help="accepted, changes nothing: set CUDA_VISIBLE_DEVICES or use deepspeed --include",
    )
    # The released evaluation takes these two, so that users' commands have them.
    launcher.add_argument("--train_batch_size", help="accepted, changes nothing here")
    launcher.add_argument("--train_micro_batch_size_per_gpu", help="accepted, changes nothing here")
    return parser


def _add_models(group) -> None:
    group.add_argument(
        "--init_checkpoint",
        type=model_path,
        help="the mapping: a saved folder or its id on the Hugging Face hub (USER/NAME, USER/NAME@REVISION), a "
        ".safetensors file, a released pytorch_model.bin, or a folder of several stages, of which the bridge's last "
        "one that is there counts (default: outputs/<save_name>/<task>)",
    )
    group.add_argument(
        "--llm_path",
        type=model_path,
        help=f"the LLM; default: what the mapping's config.json names, else {DEFAULT_LLM}",
    )
    group.add_argument(
        "--mt_path", type=model_path, help=f"the encoder; default: as for --llm_path, else {DEFAULT_ENCODER}"
    )
    group.add_argument(
        "--adapter_path",
        type=model_path,
        help="folder of an adapter of the LLM, as the adapter stage or PEFT writes it, also with --llm_only; none "
        "leaves it out (default: the one beside the mapping, where its config.json names one)",
    )
    add_chat_template(group.add_argument, "as trained, by the mapping's config.json, else ")
    group.add_argument("--bridge", help="its bridge (default: what its config.json names, else mindmerger)")
    group.add_argument(
        "--bridge_option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of that bridge; may be given more than once (default: as for --bridge)",
    )


def _add_data_and_generation(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", type=model_path, default="./datas", help="data folder (default ./datas)")
    add_language_flags(
        data.add_argument,
        "languages to evaluate, by name, code or NLLB's tag, with commas: Swahili,th (default: all of the task)",
    )
    data.add_argument(
        "--limit",
        type=_at_least(1),
        help="number of examples of each language, from the first on (default: all); a larger one, or more languages, "
        "extends a finished evaluation",
    )
    data.add_argument(
        "--skip_faulty_rows",
        action="store_true",
        help="leave out and list faulty rows of the test sets; without it the first one ends the run",
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--scoring",
        choices=SCORINGS,
        default=SCORINGS[0],
        help="way to an answer: greedy decoding (generate, the default), or, for tasks with labels, the label with the "
        "highest log-probability, summed over its tokens and the end token (likelihood)",
    )
    generation.add_argument(
        # No default here: --eval_max_tokens alone has to lift the limit of rows.
        "--eval_batch_size",
        "--per_device_eval_batch_size",
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
        # Without a default: the released flag limits prompt and new tokens alike, so a given value has to be told from
        # none.
        "--max_gen_len",
        type=_at_least(2),
        help="most tokens of the prompt (default 512) and, when given, most new tokens",
    )
    generation.add_argument(
        "--max_new_tokens",
        type=_at_least(1),
        help="most new tokens, wins over --max_gen_len (default 512 math, 16 others)",
    )
    add_precision(generation.add_argument)
    add_quantization(generation.add_argument)
    generation.add_argument(
        "--attn_implementation", help="attention of transformers: sdpa, eager, flash_attention_2, …"
    )
    generation.add_argument(
        "--engine",
        choices=["hf", "vllm"],
        default="hf",
        help="library that decodes: transformers (default), or vLLM on one NVIDIA GPU in one process",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, and warns of those without effect.

    Raises:
        UserError: for the first that does not.
    """
    check_seed(args.seed)
    check_save_name(args.save_name)
    if options_of(args) is not None and not args.llm_only:
        raise UserError("--parallel_input is for the LLM alone: pass --llm_only too")
    if args.translate_test is not None and (not args.llm_only or args.parallel_input is not None):
        what = "without --parallel_input: leave that out" if args.llm_only else "pass --llm_only too"
        raise UserError(f"--translate_test is for the LLM alone, {what}")
    if args.engine == "vllm" and args.quantization != "none":
        raise UserError(
            f"--engine vllm loads the LLM from its folder, and --quantization {args.quantization} is for transformers: "
            "leave one of them out"
        )
    warn_of_unused(args)


def warn_of_unused(args: argparse.Namespace) -> None:
    """Says which of the given flags have no effect beside the others."""
    # Said, not refused: published commands have it, and users who mean it should hear what to use.
    if args.gpu is not None:
        warn("--gpu changes nothing: choose GPUs by CUDA_VISIBLE_DEVICES or deepspeed --include localhost:0,1")
    if args.engine == "vllm" and args.attn_implementation is not None:
        warn("--attn_implementation reaches the encoder alone: vLLM has attention kernels of its own")
    names = ("init_checkpoint", "bridge", "bridge_option", "augmentation", "mt_path")
    if args.llm_only and args.init_checkpoint is not None and _is_without_mapping(args.init_checkpoint):
        names = names[1:]  # its adapter is read
    # Warned of, not refused: a script with one set of flags evaluates the LLM alone by adding one.
    unused = [f"--{name}" for name in names if args.llm_only and getattr(args, name) not in (None, [])]
    if unused:
        named = ", of which only the name of its LLM is taken" if args.init_checkpoint and not args.llm_path else ""
        warn(f"--llm_only evaluates without encoder and mapping: no use of {', '.join(unused)}{named}")


def _is_without_mapping(path: str) -> bool:
    from mindmerger.model.mapping_files import read_config
    from mindmerger.model.sharing import fetch_mapping

    recorded = read_config(fetch_mapping(path))
    return recorded is not None and recorded.mt_path is None
