"""Evaluates a mapping, or the LLM alone, on one task: greedy answers, scores, one table.

    python run_evaluation.py --task math --init_checkpoint outputs/MindMerger/math/augmentation
    deepspeed run_evaluation.py --deepspeed --task xnli --init_checkpoint pytorch_model.bin --llm_path … --mt_path …
    python run_evaluation.py --compare results/MindMerger/math_mgsm results/MindMerger/math_mgsm-llm_only

Top to bottom: the flags, what is checked before any model loads, the results folder and how an interrupted run goes
on, generation, merging, and `answer()` for use from Python.
"""

import argparse
import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from baselines.parallel_input import add_arguments as add_parallel_arguments
from interrupt_utils import FolderLock, watch_launcher
from runtime_utils import (
    CommandParser,
    UserError,
    agree_on,
    broadcast_object,
    broadcast_weights,
    check_save_name,
    check_seed,
    gather_objects,
    init_distributed,
    is_main,
    is_out_of_memory,
    log,
    parse_bool,
    progress_bar,
    rank,
    run_main,
    together,
    versions,
    warn,
    world_size,
    write_json_atomic,
    write_text_atomic,
)

# torch, transformers and our modules that need them are imported where they are used: --help answers at once.

DEFAULT_LLM = "../LLMs/Llama-2-7b-hf"
DEFAULT_ENCODER = "../LLMs/mt5-xl"
DEFAULT_BATCH_SIZE = 8
DEFAULT_MAX_LEN = 512  # tokens, of the encoder's input and of the prompt
START = "--init_checkpoint (sha256)"  # of an evaluation's identity; rank 0 alone reads the file
FORM_SUFFIX = {"soft": "", "hard": "-hard", "llm_only": "-llm_only"}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


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
    parser = CommandParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
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


# ---------------------------------------------------------------------------------------------------------------------
# Checks before any model loads


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


def find_models_on_rank_0(args: argparse.Namespace) -> tuple[str | None, str | None, str] | None:
    """What `find_models` finds on rank 0, whose machine alone may have the mapping; None in a run of one process."""
    from data_utils import find_task

    if world_size() == 1:
        return None

    def find():
        check_save_name(args.save_name)
        return find_models(args, find_task(args.task), form_of(args)) if is_main() else None

    return broadcast_object(together(find))


def prepare(args: argparse.Namespace, on_gpu: bool, models: tuple | None = None) -> Plan:
    """Reads data, tokenizers and configs and checks that they fit each other; `models` as `find_models_on_rank_0`
    returns them.

    Raises:
        UserError: for the first thing that does not.
    """
    from data_utils import TASKS, find_task, load_tokenizers, parse_languages
    from model_files import check_models
    from modeling_mindmerger import check_mapping, check_roles, config_of_models, model_fingerprint
    from results_utils import SCORER

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
    checkpoint, mt_path, llm_path = models or find_models(args, task, form)
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
    if checkpoint is not None and is_main():
        check_mapping(checkpoint, config_of_models(mt_path, llm_path))
    check_inputs(tokenizers, columns, mt_path, llm_path, max_new_tokens)
    identity = {
        "--task": task.name,
        "form (--augmentation, --llm_only)": form,
        START: _sha256_of_file(checkpoint) if checkpoint and is_main() else None,
        "--llm_path (fingerprint)": model_fingerprint(llm_path),
        "--mt_path (fingerprint)": model_fingerprint(mt_path) if mt_path else None,
        "--languages": [language.name for language in languages],
        "--limit": args.limit,
        "--parallel_input": args.parallel_input,
        "--translations": parallel_input and parallel_input["translations"],
        "--order": parallel_input and parallel_input["order"],
        # Without the question, which no answer depends on.
        "data (sha256)": _sha256(json.dumps([astuple(example)[:-1] for example in examples]).encode()),
        "--max_seq_len": args.max_seq_len,
        "--max_gen_len": prompt_limit,
        "--max_new_tokens": max_new_tokens,
        "--precision": precision,
        "--attn_implementation": args.attn_implementation,
        # Its kernels round otherwise. None for transformers: folders without the entry are its.
        "--engine": None if args.engine == "hf" else args.engine,
        "--seed": args.seed,
        SCORER: task.scorer_version,
    }
    return Plan(
        task=task,
        form=form,
        examples=examples,
        columns=columns,
        tokenizers=tokenizers,
        mt_path=mt_path,
        llm_path=llm_path,
        checkpoint=checkpoint,
        precision=precision,
        attn_implementation=args.attn_implementation,
        max_new_tokens=max_new_tokens,
        folder=Path(args.results_dir) / args.save_name / (task.name + (suffix or FORM_SUFFIX[form])),
        identity=identity,
        engine=args.engine,
        parallel_input=parallel_input,
        faults=faults,
    )


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
    from data_readers import describe_faults, skipping_named
    from data_utils import evaluation_examples

    faults = [] if args.skip_faulty_rows else None
    source = (task, args.data_root)
    with skipping_named():
        examples = [e for one in languages for e in evaluation_examples(*source, one, args.limit, faults)]
    if faults:
        warn(describe_faults(faults, ", all of them listed in results.json"))
    return examples, faults


def _check_parallel_input(args: argparse.Namespace) -> None:
    from baselines.parallel_input import options_of

    if options_of(args) is not None and not args.llm_only:
        raise UserError("--parallel_input is for the LLM alone: pass --llm_only too")


def _with_parallel_input(args: argparse.Namespace, task, examples: list) -> tuple[list, dict | None, str | None]:
    """The examples with --parallel_input's prompts, its record for results.json, and the results folder's suffix."""
    from baselines.parallel_input import apply_parallel_input, options_of

    options = options_of(args)
    if options is None:
        return examples, None, None
    examples, languages = apply_parallel_input(task, args.data_root, examples, options)
    record = {"k": options.size, "translations": options.label, "source": options.translations, "order": options.order}
    return examples, {"name": options.name, **record, "languages": languages}, options.suffix


def tokenise_form(tokenizers, examples: list, form: str, max_seq_len: int, max_gen_len: int) -> dict:
    """The columns of the ids that this form reads, and which of them were cut."""
    from data_utils import tokenise

    kept = {"soft": ("encoder", "prompt"), "hard": ("encoder",), "llm_only": ("prompt",)}[form]
    columns = tokenise(
        tokenizers,
        examples,
        max_seq_len=max_seq_len,
        max_gen_len=max_gen_len,
        with_source="encoder" in kept,
        with_prompt="prompt" in kept,
        with_target=False,
    )
    cut_of = {"encoder": "source_cut", "prompt": "prompt_cut"}
    return {name: columns[name] for part in kept for name in (f"{part}_ids", cut_of[part])}


def check_inputs(tokenizers, columns: dict, mt_path: str | None, llm_path: str, max_new_tokens: int) -> None:
    """Refuses inputs that a model has no embeddings or no positions for."""
    from model_files import embedding_rows, llm_config, load_config
    from modeling_mindmerger import check_positions

    encoder_rows = embedding_rows(load_config(mt_path)) if mt_path is not None else None
    check_tokens(tokenizers, columns, (mt_path, encoder_rows), (llm_path, embedding_rows(llm_config(llm_path)[0])))
    longest = max(input_lengths(columns)) + 2 + max_new_tokens
    flags = "--max_new_tokens, --max_gen_len or --max_seq_len"
    check_positions(llm_path, longest, "the longest input with its new tokens", flags)
    if mt_path is not None:
        check_positions(mt_path, max(map(len, columns["encoder_ids"])), "the longest question", "--max_seq_len")


def check_tokens(tokenizers, columns: dict, encoder: tuple, llm: tuple) -> None:
    """Refuses tokens that a model has no embedding for; `encoder` and `llm` are (path, rows of the embedding table)."""
    from data_utils import check_rows

    for tokenizer, model, name in ((tokenizers.encoder, encoder, "encoder_ids"), (tokenizers.llm, llm, "prompt_ids")):
        check_rows(tokenizer, model[0], (one for ids in columns.get(name, ()) for one in ids), model[1])
    if tokenizers.bos_id is not None:
        check_rows(tokenizers.llm, llm[0], [tokenizers.bos_id], llm[1])


def input_lengths(columns: dict) -> list[int]:
    """Encoder plus prompt tokens of each example, as far as the form has them."""
    parts = [columns[name] for name in ("encoder_ids", "prompt_ids") if name in columns]
    return [sum(len(ids) for ids in row) for row in zip(*parts, strict=True)]


def find_models(args: argparse.Namespace, task, form: str) -> tuple[str | None, str | None, str]:
    """(mapping file, encoder, LLM): from the flags, else from the mapping's config.json, else the defaults."""
    from modeling_mindmerger import find_mapping_file, read_config

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
        return None, None, found["llm_path"]
    if config is not None and config.task not in (None, task.training_name):
        warn(f"this mapping was trained for task {config.task}, now evaluated on {task.name}")
    if config is not None and config.stage == "mapping":
        warn("this mapping comes from the mapping stage: it has not been trained on the task yet")
    elif config is not None and config.augmentation not in (None, form == "soft"):
        name = {True: "Soft, --augmentation True", False: "Hard, --augmentation False"}
        warn(f"this mapping was trained as {name[config.augmentation]}, now evaluated as {name[form == 'soft']}")
    return mapping_file, found["mt_path"], found["llm_path"]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@dataclass
class Generation:
    """One answer: its text, its tokens including the end token, and whether it ran into the limit instead."""

    output: str
    generated_tokens: int
    hit_limit: bool


def cut_batches(
    indices: list[int], lengths: list[int], batch_size: int | None, token_budget: int | None = None, new_tokens: int = 0
) -> list[list[int]]:
    """Batches of similar length, longest first, so that running out of memory shows at the start.

    Taking whole batches out of `indices` leaves the other batches as they were: a continued run relies on it.

    Args:
        lengths: positions of every example's input, by its number.
        batch_size: most examples of a batch; None for any number.
        token_budget: most positions of a batch, padding and `new_tokens` for each row included; a longer row stands
            alone.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        rows = batch_size or len(order)
        if token_budget is not None:
            rows = min(rows, max(1, token_budget // (lengths[order[start]] + new_tokens)))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def cut_evaluation(remaining: list[int], plan: Plan, args: argparse.Namespace) -> list[list[int]]:
    """The batches that the flags ask for; BOS and boundary count as positions."""
    rows = args.eval_batch_size or (None if args.eval_max_tokens else DEFAULT_BATCH_SIZE)
    lengths = [length + 2 for length in input_lengths(plan.columns)]
    return cut_batches(remaining, lengths, rows, args.eval_max_tokens, plan.max_new_tokens)


def batch_inputs(model, tokenizers, columns: dict, batch: list[int]) -> dict:
    """What the model is given for the examples numbered `batch`."""
    from data_utils import collate

    rows = [{name: columns[name][i] for name in ("encoder_ids", "prompt_ids") if name in columns} for i in batch]
    tensors = collate(rows, tokenizers.encoder_pad_id, tokenizers.llm_pad_id)
    names = ("encoder_input_ids", "encoder_attention_mask", "prompt_ids", "prompt_mask")
    inputs = {name: tensors[name] for name in names if tensors.get(name) is not None}
    # Masks stay on the CPU, where packing is planned.
    return {name: value.to(model.device) if name.endswith("_ids") else value for name, value in inputs.items()}


@contextlib.contextmanager
def out_of_memory_named(inputs: dict, max_new_tokens: int):
    """Turns running out of GPU memory into an error that names the batch's size and what to lower."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        sizes = {name: value.shape for name, value in inputs.items() if name.endswith("_ids")}
        rows = next(iter(sizes.values()))[0]
        tokens = ", ".join(f"{shape[1]} {name}" for name, shape in sizes.items())
        raise UserError(
            f"out of GPU memory on a batch of {rows} examples ({tokens}, up to {max_new_tokens} new tokens): "
            "lower --eval_max_tokens, --eval_batch_size (it continues where this run stopped), --max_new_tokens or "
            "--max_gen_len"
        ) from error


def to_generation(model, tokenizers, ids: list[int]) -> Generation:
    """New ids, up to the first end token where there is one, as an answer."""
    end = next((i for i, token in enumerate(ids) if token in model.eos_token_ids), None)
    text = tokenizers.llm.decode(ids[:end], skip_special_tokens=True)
    return Generation(text, len(ids) if end is None else end + 1, end is None)


def generate_batch(model, tokenizers, columns: dict, batch: list[int], max_new_tokens: int) -> list[Generation]:
    """Greedy answers to the examples numbered `batch`, in that order.

    Raises:
        UserError: out of GPU memory, naming what to lower.
    """
    inputs = batch_inputs(model, tokenizers, columns, batch)
    with out_of_memory_named(inputs, max_new_tokens):
        ids_BT = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return [to_generation(model, tokenizers, ids) for ids in ids_BT.tolist()]


def merge_batch(model, plan: Plan, batch: list[int]) -> list:
    """The merged embeddings (L, D) of each example numbered `batch`, without padding, on the CPU.

    Raises:
        UserError: out of GPU memory, or for embeddings that are not numbers.
    """
    inputs = batch_inputs(model, plan.tokenizers, plan.columns, batch)
    with out_of_memory_named(inputs, plan.max_new_tokens):
        embeds_BLD, mask_BL = model.merged_embeddings(**inputs)
        embeds_BLD = embeds_BLD.cpu()
    lengths = mask_BL.sum(1).tolist()
    rows = [row_LD[-length:] for row_LD, length in zip(embeds_BLD, lengths, strict=True)]
    if not all(row_LD.isfinite().all() for row_LD in rows):
        raise model.not_finite()
    return rows


def answer_batches(model, engine, plan: Plan, batches: list[list[int]]):
    """Yields (batches, answers to all their examples in order): one batch by transformers, a chunk of them by vLLM."""
    if engine is None:
        for batch in batches:
            yield [batch], generate_batch(model, plan.tokenizers, plan.columns, batch, plan.max_new_tokens)
        return
    import vllm_engine

    for chunk in vllm_engine.chunks(batches):
        rows = [row for batch in chunk for row in merge_batch(model, plan, batch)]
        answers = vllm_engine.decode(engine, rows, model.eos_token_ids, plan.max_new_tokens)
        yield chunk, [to_generation(model, plan.tokenizers, ids) for ids in answers]


def load_model(plan: Plan, device, input_side_only: bool = False):
    """Both towers and the mapping on this rank's device, if asked for without the LLM's layers."""
    import torch

    from modeling_mindmerger import MindMerger
    from vllm_engine import keep_input_side

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[plan.precision]
    try:
        model = MindMerger.from_models(plan.mt_path, plan.llm_path, dtype, plan.attn_implementation)
        if plan.checkpoint is not None and is_main():  # `evaluate` gives it to the other ranks
            model.load_mapping(plan.checkpoint)
        if input_side_only:
            keep_input_side(model)
        return model.to(device).eval()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory while placing the models on {device}: use a larger GPU or --precision bf16"
        ) from error


def start_engine(plan: Plan):
    """What decodes where that is not the model itself. Call it when the model has its place on the GPU."""
    if plan.engine == "hf":
        return None
    import vllm_engine

    longest = max(input_lengths(plan.columns)) + 2 + plan.max_new_tokens
    return vllm_engine.start(plan.llm_path, plan.precision, longest)


def generate_share(model, engine, plan: Plan, batches: list[list[int]], shard) -> None:
    """Generates this rank's batches, each (with vLLM: each chunk of them) on disk before the next begins.

    Arguments:
        shard: this rank's open file in the folder of unfinished results.

    Raises:
        UserError: out of GPU memory, naming what to lower, or when the disk refuses the answers.
    """
    from results_utils import append_records

    total, done = sum(map(len, batches)), 0
    with progress_bar(total=total, unit="example", desc=f"rank 0 of {world_size()}") as progress:
        try:
            for chunk, generations in answer_batches(model, engine, plan, batches):
                following = iter(generations)
                for batch in chunk:
                    keys = {"batch": batch[0], "batch_size": len(batch)}
                    append_records(shard, [{"index": i, **asdict(next(following)), **keys} for i in batch])
                    done += len(batch)
                    progress.update(len(batch))
        except KeyboardInterrupt:
            log(f"stopped; {done} examples of this run are kept: the same command continues")
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def finish(plan: Plan, args: argparse.Namespace, generated_now: set[int], seconds: float) -> dict:
    """Scores all answers and writes predictions, scores.tsv and, last, results.json. Call it on rank 0 only."""
    from results_utils import PARTIAL, read_finished

    partial = plan.folder / PARTIAL
    records = read_finished(partial)
    missing = sum(i not in records for i in range(len(plan.examples)))
    if missing:
        raise UserError(
            f"{missing} of {len(plan.examples)} answers are not in {partial}: the same command generates them again"
        )
    items = {}
    for i, example in enumerate(plan.examples):
        items.setdefault(example.language, []).append(prediction_item(plan, example, records[i]["output"]))
    for language, rows in items.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomic(plan.folder / "predictions" / f"{language}.jsonl", lines)
    results = summarise(plan, args, items, records)
    tokens = sum(records[i]["generated_tokens"] for i in generated_now)
    results["timing"] = {
        "seconds": round(seconds, 3),
        "examples": len(generated_now),
        "examples_per_s": round(len(generated_now) / seconds, 3) if generated_now else None,
        "generated_tokens": tokens,
        "generated_tokens_per_s": round(tokens / seconds, 3) if generated_now else None,
        "world_size": world_size(),
        **_device_record(),
    }
    scores = "".join(f"{name}\t{one['accuracy']}\n" for name, one in results["languages"].items())
    write_text_atomic(plan.folder / "scores.tsv", scores)
    write_json_atomic(plan.folder / "results.json", results)
    shutil.rmtree(partial, ignore_errors=True)  # the results are complete; what stays goes at the next start
    return results


def prediction_item(plan: Plan, example, output: str) -> dict:
    """One line of predictions/<language>.jsonl."""
    score = plan.task.score(output, example.target, example.language)
    item = {
        "id": example.id,
        **({"question": example.question} if example.question else {}),
        "source": example.source,
        "prompt": example.prompt if plan.form != "hard" else "",
        "output": output,
        "prediction": score.prediction,
        "answer": example.target,
        "correct": score.correct,
    }
    if plan.two_scorers:
        reference = score.reference_prediction
        # Some 310 digits in a row overflow, and JSON has no infinity.
        item["reference_prediction"] = reference if math.isfinite(reference) else "infinity"
        item["reference_correct"] = score.reference_correct
    return item


def summarise(plan: Plan, args: argparse.Namespace, items: dict[str, list[dict]], records: dict[int, dict]) -> dict:
    """The content of results.json but for the timing: scores first, then everything needed to run again."""
    from results_utils import bootstrap_intervals, describe_questions, published_scores, questions_of, resampling_note

    number = len(plan.examples)
    marks = {
        "hit_limit": [records[i]["hit_limit"] for i in range(number)],
        "cut_sources": plan.columns.get("source_cut", [False] * number),
        "cut_prompts": plan.columns.get("prompt_cut", [False] * number),
    }
    questions = {name: questions_of(plan.task.name, name, rows) for name, rows in items.items()}
    resampling = describe_questions(questions)
    if resampling["numbers_with_different_answers"]:
        warn(f"the test sets are not parallel throughout: {resampling_note(resampling)}")
    marks_of = {name: [row["correct"] for row in rows] for name, rows in items.items()}
    intervals, mean_interval = bootstrap_intervals(questions, marks_of, args.seed)
    languages = {}
    for name, rows in items.items():
        correct = sum(row["correct"] for row in rows)
        one = {
            "n": len(rows),
            "correct": correct,
            "accuracy": round(100 * correct / len(rows), 4),
            "interval": intervals[name],
        }
        if plan.two_scorers:
            reference = sum(row["reference_correct"] for row in rows)
            one |= {"reference_correct": reference, "reference_accuracy": round(100 * reference / len(rows), 4)}
        for mark, values in marks.items():
            one[mark] = sum(value for value, e in zip(values, plan.examples, strict=True) if e.language == name)
        languages[name] = one
    scores = ["accuracy", "reference_accuracy"] if plan.two_scorers else ["accuracy"]
    mean = {key: round(sum(one[key] for one in languages.values()) / len(languages), 4) for key in scores}
    # The published rows have no parallel input: beside a PMI run they would be taken for its own.
    published = None
    if plan.parallel_input is None:
        rows_of = {name: one["n"] for name, one in languages.items()}
        published = published_scores(plan.task, plan.form, plan.llm_path, plan.mt_path, rows_of)
    return {
        "task": plan.task.name,
        "form": plan.form,
        "parallel_input": plan.parallel_input,
        "mean": {**mean, "interval": mean_interval},
        "resampling": resampling,
        "languages": languages,
        **({"faulty_rows": plan.faults} if plan.faults else {}),
        "counts": {"examples": number} | {mark: sum(values) for mark, values in marks.items()},
        "published": published,
        "max_new_tokens": plan.max_new_tokens,
        "engine": plan.engine if plan.engine == "hf" else f"vllm {metadata.version('vllm')}",
        "checkpoint": plan.checkpoint,
        "llm_path": plan.llm_path,
        "mt_path": plan.mt_path,
        "identity": plan.identity,
        "arguments": vars(args),
        "command": sys.argv,
        "versions": versions(),
    }


def _device_record() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu"}
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"device": torch.cuda.get_device_name(), "peak_memory_gb": round(peak, 2)}


# ---------------------------------------------------------------------------------------------------------------------
# From Python


def answer(
    model,
    texts: list[str],
    task: str = "math",
    languages: list[str] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    augmentation: bool = True,
) -> list[str]:
    """Answers texts in any language: strings in, strings out, in the same order.

    Arguments:
        model: a `MindMerger`; one built without an encoder answers as the LLM alone.
        texts: questions (math), or what the task's prompt looks like (x-csqa, xnli).
        task: whose prompt is put around the texts.
        languages: of each text, by name or code; one string for all alike; None only where the encoder's tokenizer
            takes no source language.
        max_new_tokens: default the task's.
        batch_size: texts generated at once.
        augmentation: True for the Soft form, False for Hard.

    Raises:
        UserError: an unknown task or language, lists of different lengths, a model without a usable tokenizer, logits
            that are not numbers.
    """
    from data_utils import Example, find_language, find_task

    if isinstance(texts, str):
        raise UserError("answer() takes a list of texts, got one string: put it in a list")
    if not texts:
        return []
    task = find_task(task)
    languages = [languages] * len(texts) if languages is None or isinstance(languages, str) else languages
    if len(languages) != len(texts):
        raise UserError(f"answer() needs one language for each text: {len(texts)} texts, {len(languages)} languages")
    tokenizers = _cached_tokenizers(model.config.mt_path if model.encoder is not None else None, model.config.llm_path)
    if None in languages and hasattr(tokenizers.encoder, "src_lang"):
        raise UserError(f"answer() needs the texts' languages: encoder {model.config.mt_path} reads a language tag")
    names = ["English" if language is None else find_language(language).name for language in languages]
    examples = []
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        prompt, cut = task.format_query(text)
        examples.append(Example(str(i), name, text, prompt, "", cut))
    form = "llm_only" if model.encoder is None else "soft" if augmentation else "hard"
    columns = tokenise_form(tokenizers, examples, form, DEFAULT_MAX_LEN, DEFAULT_MAX_LEN)
    rows = [tower and tower.get_input_embeddings().num_embeddings for tower in (model.encoder, model.llm)]
    check_tokens(tokenizers, columns, (model.config.mt_path, rows[0]), (model.config.llm_path, rows[1]))
    outputs = [""] * len(texts)
    for batch in cut_batches(list(range(len(texts))), input_lengths(columns), batch_size):
        answers = generate_batch(model, tokenizers, columns, batch, max_new_tokens or task.max_new_tokens)
        for i, one in zip(batch, answers, strict=True):
            outputs[i] = one.output
    return outputs


@lru_cache(maxsize=4)
def _cached_tokenizers(mt_path: str | None, llm_path: str):
    from data_utils import load_tokenizers

    return load_tokenizers(mt_path, llm_path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    watch_launcher()
    parser = build_parser()
    args = parser.parse_args(argv)
    from results_utils import compare_results, format_results, open_results

    if args.compare:
        ignored = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        ignored = [f"--{name}" for name in ignored if name not in ("compare", "seed", "deepspeed", "local_rank")]
        if ignored:
            warn(f"--compare evaluates nothing: no use of {', '.join(ignored)}")
        if is_main():
            print(compare_results(args.compare, args.seed))
        return 0
    device = init_distributed()
    if args.engine == "vllm":
        from vllm_engine import check_vllm

        log(f"--engine vllm: version {together(check_vllm, device.type)}")
    plan = together(prepare, args, device.type == "cuda", find_models_on_rank_0(args))
    plan.identity = agree_on(plan.identity, but=START)
    number = len(plan.examples)
    with contextlib.ExitStack() as stack:
        lock = together(lambda: FolderLock(plan.folder) if is_main() else None)
        if lock is not None:
            stack.callback(lock.release)
        opened = together(
            lambda: open_results(plan.folder, plan.identity, number, args.overwrite) if is_main() else None
        )
        results, finished = broadcast_object(opened)
        if results is None:
            results = evaluate(plan, args, device, finished | join_machines(plan, args.overwrite))
        else:
            log(f"{plan.folder} holds this evaluation already, nothing is generated; --overwrite starts over")
            if "resampling" not in results and len(results["languages"]) > 1:
                warn("its interval of the mean is too narrow: an earlier version took the languages for independent")
    if is_main():
        print(format_results(results))
        log(f"results are in {plan.folder}")
    return 0


def evaluate(plan: Plan, args: argparse.Namespace, device, finished: dict[int, dict]) -> dict | None:
    """Generates what is not finished, merges on rank 0 and returns the results there.

    Raises:
        UserError: out of memory, or a full disk.
    """
    from results_utils import leave_results, open_shard

    remaining = [i for i in range(len(plan.examples)) if i not in finished]
    # Dealing out batches of falling length one by one gives every rank about the same work.
    batches = cut_evaluation(remaining, plan, args)[rank() :: world_size()]
    start = time.perf_counter()
    if remaining:
        where = f"{world_size()} processes" if world_size() > 1 else device.type
        where += " by vLLM" if plan.engine == "vllm" else ""
        log(f"{plan.task.name}, {plan.form}: generating {len(remaining)} answers in {plan.precision} on {where}")
        with together(open_shard, plan.folder, rank()) as shard:
            model = together(load_model, plan, device, input_side_only=plan.engine == "vllm")
            if plan.checkpoint is not None:
                broadcast_weights(model.mapping)
            engine = together(start_engine, plan)
            start = time.perf_counter()
            generate_share(model, engine, plan, batches, shard)
    collect_answers(plan)  # the ranks may come to it far apart
    seconds = time.perf_counter() - start
    results = together(lambda: finish(plan, args, set(remaining), seconds) if is_main() else None)
    together(lambda: None if is_main() else leave_results(plan.folder))
    return results


def join_machines(plan: Plan, overwrite: bool) -> dict[int, dict]:
    """Makes the other ranks' results folders ready, and returns the records that an earlier run finished there."""
    from results_utils import join_results

    found = together(lambda: {} if is_main() else join_results(plan.folder, plan.identity, overwrite))
    return {index: record for one in gather_objects(found) for index, record in one.items()}


def collect_answers(plan: Plan) -> None:
    """Writes the answers that rank 0's results folder lacks into it: other machines may have folders of their own."""
    from results_utils import PARTIAL, append_records, open_shard, read_finished

    if world_size() == 1:
        return
    finished = read_finished(plan.folder / PARTIAL) if (plan.folder / PARTIAL).is_dir() else {}
    known = set(gather_objects(set(finished))[0])
    others = gather_objects({index: record for index, record in finished.items() if index not in known})
    lacking = {index: record for one in others for index, record in one.items()}

    def write():
        if is_main() and lacking:
            with open_shard(plan.folder, rank()) as shard:
                append_records(shard, list(lacking.values()))

    together(write)


if __name__ == "__main__":
    run_main(main)
