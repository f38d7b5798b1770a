"""Parallel multilingual input (PMI): the LLM reads its input together with translations of it.

    python -m mindmerger.baselines.parallel_input --task math --languages sw --parallel_input 3 --translations aligned
    python run_evaluation.py --llm_only --llm_path LLM --task math --parallel_input 3 --translations aligned

PMI-k puts k translations beside the source text x (Mu et al., "Revealing the Parallel Multilingual Learning within
Large Language Models", EMNLP 2024, arXiv 2403.09073):

    prompt = template( preamble, [source] x, [language 1] t_1(x), ..., [language k] t_k(x) )

math: a preamble, then one line per language, inside the task's own prompt. xnli: only the premise is multilingual, the
hypothesis stands once, in the source language. x-csqa: only the question's stem (ours), the options stand once.
Translations are the benchmark's own parallel rows (`aligned`, results labelled oracle, since humans made them) or a
machine's (a file of {"id", "language", "text"} lines, results labelled machine).
"""

import argparse
import json

from mindmerger.evaluation.items import add_item_flags, find_items
from mindmerger.evaluation.parallel_input import (
    ParallelInput,
    add_arguments,
    apply_parallel_input,
    choose_languages,
    default_languages,
    options_of,
)
from mindmerger.runtime.command import CommandParser, check_seed, run_main
from mindmerger.runtime.files import write_text_atomic
from mindmerger.runtime.processes import log
from mindmerger.tasks.base import Example, Task
from mindmerger.tasks.examples import evaluation_examples, varying_text
from mindmerger.tasks.languages import find_language
from mindmerger.tasks.readers import DataError


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line: look at prompts, or list what a translator has to translate."""
    parser = CommandParser(prog="python -m mindmerger.baselines.parallel_input", description=__doc__)
    add_item_flags(parser)
    parser.add_argument("--limit", type=int, help="take only the first N items of each language")
    add_arguments(parser.add_argument_group("parallel input"))
    parser.add_argument("--seed", type=int, default=0, help="seed of --order shuffled (default 0)")
    parser.add_argument(
        "--show", type=int, default=1, help="number of items per language whose prompts are printed (default 1)"
    )
    parser.add_argument(
        "--to_translate",
        metavar="FILE.jsonl",
        help='write what --parallel_input K needs as {"id", "language", "text": "", "source_language", "source"} '
        "lines; with the texts filled in, the file is one for --translations",
    )
    return parser


def write_texts(path: str, task: Task, examples: list[Example], options: ParallelInput) -> None:
    """Writes what a translator has to translate, one line per text and language, with an empty place for the result."""
    candidates = options.languages or default_languages(task)
    rows = []
    for example in examples:
        own = find_language(example.language)
        for language in choose_languages(own, options, candidates):
            row = {"id": example.id, "language": language.code, "text": ""}
            rows.append(row | {"source_language": own.code, "source": varying_text(example)})
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    log(f"{path}: {len(rows)} texts to translate")


def print_prompts(args: argparse.Namespace, task: Task, examples: list[Example], options: ParallelInput) -> None:
    """Prints the first --show prompts of each language."""
    # All prompts are built: a translation that is missing is found here, before a GPU is waited for.
    built, chosen = apply_parallel_input(task, args.data_root, examples, options)
    shown = dict.fromkeys(chosen, 0)
    for example in built:
        if shown[example.language] < args.show:
            shown[example.language] += 1
            print(f"--- {example.id}, {options.name}\n{example.prompt}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    check_seed(args.seed)
    task, languages = find_items(args)
    if args.to_translate and args.translations is None:
        args.translations = "aligned"  # nothing is read from it
    options = options_of(args)
    if options is None:
        raise DataError("--parallel_input is missing: how many translations (1, 3 or 6)?")
    examples = [e for language in languages for e in evaluation_examples(task, args.data_root, language, args.limit)]
    if args.to_translate:
        write_texts(args.to_translate, task, examples, options)
    else:
        print_prompts(args, task, examples, options)
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
