"""Everything of an evaluation that can be settled before a model loads.

`settle` reads data, tokenizers and configs, checks that they fit each other, and returns the run's `Settings`.
"""

import argparse
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NamedTuple

from mindmerger.evaluation.flags import check_flags
from mindmerger.evaluation.models import (
    DEFAULT_BRIDGE,
    Models,
    check_adapter_fits,
    check_models_fit,
    choose_chat_template,
    find_models_on_rank_0,
    warn_of_other_precision,
    warn_of_other_quantization,
    warn_of_other_training,
)
from mindmerger.evaluation.parallel_input import options_of
from mindmerger.evaluation.probes import apply_probe, check_probe
from mindmerger.evaluation.scoring import check_scoring, find_label_ids
from mindmerger.generation.answers import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MAX_LEN,
    check_tokens,
    input_positions,
    tokenise_inputs,
)
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.precision import settle_precision
from mindmerger.runtime.processes import is_main, log, warn

# torch, transformers and our modules that need them are imported where they are used: --help answers at once.

MAPPING_HASH = "--init_checkpoint (sha256)"  # of an evaluation's identity; rank 0 alone reads the file
ADAPTER_HASH = "--adapter_path (sha256)"
FORM_SUFFIX = {"soft": "", "hard": "-hard", "llm_only": "-llm_only"}


class Items(NamedTuple):
    """The questions of all languages, in table order.

    faults: of the rows that --skip_faulty_rows left out. parallel_input, translate_test: as results.json records the
    flags. suffix: of the results folder, where not the form decides it.
    """

    examples: list
    faults: list[str] | None
    parallel_input: dict | None
    suffix: str | None
    translate_test: dict | None = None


@dataclass
class Settings:
    """All that is known before models load. Lists run parallel to `examples`, languages in table order."""

    task: object
    form: str  # soft, hard or llm_only
    examples: list
    columns: dict  # encoder_ids and source_cut, prompt_ids and prompt_cut, target_ids, as far as they are read
    tokenizers: object
    mt_path: str | None
    llm_path: str
    bridge_name: str
    bridge: object | None  # without storage: asked for the prefix's length
    mapping_file: str | None
    adapter: object | None  # a `SavedAdapter`
    precision: str
    quantization: str  # of the LLM
    attn_implementation: str | None
    engine: str
    max_new_tokens: int  # of the longest label, where answers are labels
    batch_size: int | None  # None: as many rows as `token_budget` allows
    token_budget: int | None
    seed: int
    folder: Path
    overwrite: bool
    faults: list[str] | None
    parallel_input: dict | None
    translate_test: dict | None
    probe_prefix: dict | None  # as results.json records it
    prefix_of: list[int] | None  # number of the example whose source each one's prefix comes from; None: its own
    score_gold: bool
    label_ids: dict[str, list[int]] | None  # tokens of all labels, among which answers are chosen; None: generated
    arguments: dict  # the command line, for results.json
    identity: dict = field(default_factory=dict)  # everything the answers and scores depend on

    @property
    def chat_record(self) -> dict | None:
        """The chat template around the prompts as results.json records it, None for none."""
        chat = self.tokenizers.chat
        return chat.record() if chat is not None else None

    @property
    def two_scorers(self) -> bool:
        """Whether the released scorer and ours read this task's outputs differently, which an empty one shows."""
        empty = self.task.score("", "0")
        return empty.prediction != empty.reference_prediction


def settle(args: argparse.Namespace, on_gpu: bool) -> Settings:
    """Reads data, tokenizers and configs and checks that they fit each other. Call it on all ranks.

    Raises:
        UserError: for the first thing that does not.
    """
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.model.attention_memory import check_attention_function
    from mindmerger.tasks.languages import use_languages_file

    check_flags(args)
    use_languages_file(args.languages_file)
    task, languages = choose_task(args)
    check_scoring(args, task)
    models = find_models_on_rank_0(args, task)
    form = choose_form(args, models, task)
    check_probe(args, form)
    precision = settle_precision(args.precision, on_gpu)
    if form != "llm_only":
        warn_of_other_training(models.config, task, form)
        warn_of_other_precision(models.config, precision)
        warn_of_other_quantization(models.config, args.quantization)
    bridge = check_models_fit(models, args.engine, args.quantization)
    adapter = check_adapter_fits(models, args.engine)
    if bridge is not None and bridge.uses_memory:
        check_attention_function(args.attn_implementation, args.engine)
    items = read_items(args, task, languages)
    chat = choose_chat_template(args, models, form)
    tokenizers = load_tokenizers(models.encoder, models.llm, chat)
    columns = tokenise_items(args, tokenizers, items.examples, form, models.config)
    columns, probe, partner = apply_probe(args.probe_prefix, items.examples, columns, args.seed)
    suffix = (items.suffix or FORM_SUFFIX[form]) + ("-adapter" if adapter is not None else "")
    suffix += f"-prefix_{args.probe_prefix}" if args.probe_prefix else ""
    label_ids = find_label_ids(args, tokenizers, items.examples)
    suffix += f"-{args.scoring}" if label_ids is not None else ""
    settings = Settings(
        task=task,
        form=form,
        examples=items.examples,
        columns=columns,
        tokenizers=tokenizers,
        mt_path=models.encoder,
        llm_path=models.llm,
        bridge_name=models.config.bridge if models.config is not None else DEFAULT_BRIDGE,
        bridge=bridge,
        mapping_file=models.mapping_file,
        adapter=adapter,
        precision=precision,
        quantization=args.quantization,
        attn_implementation=args.attn_implementation,
        engine=args.engine,
        max_new_tokens=find_new_tokens(args, task, label_ids),
        batch_size=args.eval_batch_size or (None if args.eval_max_tokens else DEFAULT_BATCH_SIZE),
        token_budget=args.eval_max_tokens,
        seed=args.seed,
        folder=Path(args.results_dir) / args.save_name / (task.name + suffix),
        overwrite=args.overwrite,
        faults=items.faults,
        parallel_input=items.parallel_input,
        translate_test=items.translate_test,
        probe_prefix=probe,
        prefix_of=partner,
        score_gold=args.score_gold,
        label_ids=label_ids,
        arguments=vars(args) | ({"augmentation": form != "hard"} if form != "llm_only" else {}),
    )
    # Here and not when it is met: what does not fit must not cost the minutes in which a 7B model loads.
    check_inputs(settings)
    settings.identity = identity_of(args, settings, languages)
    return settings


def choose_form(args: argparse.Namespace, models: Models, task) -> str:
    """Returns the form that is evaluated: soft, hard or llm_only.

    Without --augmentation it is the one that the bridge's last stage trains, and of translations the one that its stage
    over sentence pairs trains.
    """
    from mindmerger.model.mapping_files import form_of, stages_of

    if args.llm_only:
        return "llm_only"
    augmentation = args.augmentation
    if augmentation is None and task.translates:
        stages = stages_of(models.config.bridge, models.config.bridge_options).values()
        augmentation = next((stage.with_prompt for stage in stages if stage.data == "pairs"), None)
    return form_of(models.config, augmentation)


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
    if task.corpus_scores is not None:
        task.corpus_scores(["a"], ["a"])  # a missing scorer is said now, not after hours of answers
    return task, parse_languages(",".join(task.evaluation_languages) if args.languages is None else args.languages)


def read_items(args: argparse.Namespace, task, languages: list) -> Items:
    """Reads the test sets, and puts the prompts of --parallel_input or --translate_test in the place of their own.

    Raises:
        UserError: for missing or faulty data.
    """
    from mindmerger.evaluation.parallel_input import apply_parallel_input
    from mindmerger.evaluation.translate_test import SUFFIX, apply_translate_test
    from mindmerger.tasks.examples import evaluation_examples
    from mindmerger.tasks.readers import describe_faults, name_skip_flag

    faults = [] if args.skip_faulty_rows else None
    source = (task, args.data_root)
    with name_skip_flag():
        examples = [e for one in languages for e in evaluation_examples(*source, one, args.limit, faults)]
    if faults:
        warn(describe_faults(faults, ", all of them listed in results.json"))
    if args.translate_test is not None:
        examples, record = apply_translate_test(task, args.data_root, examples, args.translate_test)
        return Items(examples, faults, None, SUFFIX, record)
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
        with_target=args.score_gold,
        max_seq_len=args.max_seq_len,
        max_gen_len=prompt_limit(args),
        encoder_text=stage_of(config).encoder_text if config is not None else "source",
    )


def prompt_limit(args: argparse.Namespace) -> int:
    """Returns the most tokens of a prompt.

    A PMI prompt holds the question several times: the default grows with it, or its translations would be truncated.
    """
    return args.max_gen_len or DEFAULT_MAX_LEN * (1 + (args.parallel_input or 0))


def find_new_tokens(args: argparse.Namespace, task, label_ids: dict[str, list[int]] | None) -> int:
    """Returns the most positions behind an input: those of the longest label where answers are labels."""
    if label_ids is not None:
        return max(map(len, label_ids.values()))
    return args.max_new_tokens or args.max_gen_len or task.max_new_tokens


def check_inputs(settings: Settings) -> None:
    """Refuses inputs that a model has no embeddings or no positions for.

    Raises:
        UserError: naming the token, or the number of positions and the flags that lower it.
    """
    from mindmerger.hub.model_configs import embedding_rows, llm_config, load_config
    from mindmerger.model.towers import check_positions

    mt_path, llm_path, columns = settings.mt_path, settings.llm_path, settings.columns
    encoder_rows = embedding_rows(load_config(mt_path)) if mt_path is not None else None
    llm_rows = embedding_rows(llm_config(llm_path)[0])
    labels = {"target_ids": list(settings.label_ids.values())} if settings.label_ids is not None else {}
    check_tokens(settings.tokenizers, columns | labels, (mt_path, encoder_rows), (llm_path, llm_rows))
    targets = max(map(len, columns.get("target_ids", [[]])))
    # The longest input with the most new tokens: every row may run into that limit.
    longest = max(input_positions(columns, settings.bridge)) + max(settings.max_new_tokens, targets)
    flags = "--max_new_tokens, --max_gen_len or --max_seq_len"
    check_positions(llm_path, longest, "the longest input with its new tokens", flags)
    if mt_path is not None:
        check_positions(mt_path, max(map(len, columns["encoder_ids"])), "the longest question", "--max_seq_len")


def identity_of(args: argparse.Namespace, settings: Settings, languages: list) -> dict:
    """Returns everything that answers and scores depend on, by the names that the user knows it by."""
    from mindmerger.evaluation.extension import DATA, hash_rows
    from mindmerger.evaluation.results import SCORER
    from mindmerger.model.mapping_files import mapping_sha256
    from mindmerger.model.towers import model_fingerprint
    from mindmerger.tasks.languages import own_languages

    parallel = settings.parallel_input or {}
    generated = settings.label_ids is None
    return {
        "--task": settings.task.name,
        "form (--augmentation, --llm_only)": settings.form,
        MAPPING_HASH: mapping_sha256(settings.mapping_file) if settings.mapping_file and is_main() else None,
        # None for MindMerger's: folders without the entries hold results of it.
        "--bridge": None if settings.bridge_name == DEFAULT_BRIDGE else settings.bridge_name,
        "--bridge_option": (settings.bridge.options if settings.bridge is not None else None) or None,
        "--llm_path (fingerprint)": model_fingerprint(settings.llm_path),
        "--mt_path (fingerprint)": model_fingerprint(settings.mt_path) if settings.mt_path else None,
        "--languages": [language.name for language in languages],
        "--languages_file": [list(astuple(one)[:5]) for one in own_languages(languages)] or None,
        "--limit": args.limit,
        "--parallel_input": args.parallel_input,
        "--translations": parallel.get("translations"),
        "--order": parallel.get("order"),
        # None without, as in folders that are older than the flag. The texts themselves are part of the data.
        "--translate_test": (settings.translate_test or {}).get("translations"),
        DATA: hash_rows(settings.examples, with_labels=not generated),
        "--max_seq_len": args.max_seq_len,
        "--max_gen_len": prompt_limit(args),
        "--max_new_tokens": settings.max_new_tokens if generated else None,
        "--precision": settings.precision,
        "--attn_implementation": args.attn_implementation,
        # Its kernels round otherwise. None for transformers: folders without the entry are its.
        "--engine": None if args.engine == "hf" else args.engine,
        "--seed": args.seed,
        # None without: folders that are older than these flags lack the entries.
        "--quantization": None if settings.quantization == "none" else settings.quantization,
        ADAPTER_HASH: settings.adapter.sha256 if settings.adapter is not None else None,
        "--probe_prefix": args.probe_prefix,
        "--chat_template": settings.chat_record,
        "--score_gold": args.score_gold or None,
        "--scoring": None if generated else args.scoring,
        SCORER: settings.task.scorer_version,
    }
