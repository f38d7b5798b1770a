"""Writes the quickstart's small world: data in the released layout, an English-only Llama and a translating mT5.

Everything follows from the seed: the number combinations are split once into train and test; sentence pairs, queries
and both models' training texts use train combinations, the evaluation files use test combinations. The models are
trained from scratch and saved as ordinary Hugging Face folders.

    python -m scripts.tiny_world --output_dir quickstart

    quickstart/datas/bilingual_pairs/en-XX/train_100k.{XX,en}
    quickstart/datas/query_translation/math.json
    quickstart/datas/evaluation/mgsm/mgsm_XX.tsv
    quickstart/llm  quickstart/mt5

Evaluation has one language more, French: parallel input with six translations needs seven aligned languages. No model
and no training file has a word of it.

What merging compares needs two models tuned from the LLM, one on English problems, one on the other languages' plain
text. This adds them to a finished world, and makes nothing else anew:

    python -m scripts.tiny_world --output_dir quickstart --experts

    quickstart/math_expert  quickstart/language_expert
"""

import argparse
import os
import random
import shutil
import time
from pathlib import Path

from mindmerger.runtime import command, files
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log
from scripts.tiny_world.templates import (
    EVALUATION_LANGUAGES,
    LANGUAGES,
    Problem,
    draw_pair,
    draw_problems,
    draw_test_problems,
    split_numbers,
)

SCRIPTS = Path(__file__).resolve().parent

EXPERTS = {"math": "math_expert", "language": "language_expert"}  # kind -> folder


def write_lines(path: Path, lines) -> None:
    """Writes a file of these lines, whole or not at all."""
    files.write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def write_data(folder: Path, seed: int, pairs: int, problems: int, test_problems: int) -> None:
    """Writes the three kinds of data files in the released layout under `folder`.

    Args:
        pairs: sentence pairs per language.
        problems: training queries per language; the same problems in every language.
        test_problems: evaluation problems per language, likewise.
    """
    # By combinations of numbers, not by problems: a new story around known numbers could be answered from memory.
    train_numbers, test_numbers = split_numbers(seed)
    for language in LANGUAGES:
        if language == "en":
            continue
        # A generator for each language and purpose: a language added or left out changes no other's texts.
        rng = random.Random(f"pairs {language} {seed}")
        drawn = [draw_pair(problem, language, rng) for problem in draw_problems(pairs, train_numbers, rng)]
        rng.shuffle(drawn)
        stem = folder / "bilingual_pairs" / f"en-{language}"
        write_lines(stem / f"train_100k.{language}", (source for source, _ in drawn))
        write_lines(stem / "train_100k.en", (english for _, english in drawn))

    drawn = draw_problems(problems, train_numbers, random.Random(f"queries {seed}"))
    queries = [
        {"lang": name, "query": problem.question(code), "response": problem.solution()[0]}
        for code, name in LANGUAGES.items()
        for problem in drawn
    ]
    files.write_json_atomic(folder / "query_translation" / "math.json", queries)

    drawn = draw_test_problems(test_problems, test_numbers, random.Random(f"test {seed}"))
    for language in EVALUATION_LANGUAGES:
        write_lines(evaluation_file(folder, language), evaluation_rows(drawn, language))


def evaluation_file(folder: Path, language: str) -> Path:
    """Returns where the data folder holds the test problems of a language."""
    return folder / "evaluation" / "mgsm" / f"mgsm_{language}.tsv"


def evaluation_rows(problems: list[Problem], language: str) -> list[str]:
    """Writes question, tab and answer of each problem; row i is the same problem in every language."""
    return [f"{problem.question(language)}\t{problem.solution()[1]}" for problem in problems]


def check_world(folder: Path, seed: int) -> list[Problem]:
    """Returns the test problems of a finished world.

    Raises:
        UserError: when the folder holds no finished world, or one of another seed: experts tuned on that seed's
            problems would have read some of this world's test problems.
    """
    english = evaluation_file(folder / "datas", "en")
    for needed in (folder / "llm" / "config.json", folder / "llm" / "model.safetensors", english):
        if not needed.is_file():
            raise UserError(
                f"{folder} is not a finished small world, {needed} is missing: --experts adds to one, or makes one in "
                "a new folder"
            )
    rows = english.read_text("utf-8").splitlines()
    try:
        problems = draw_test_problems(len(rows), split_numbers(seed)[1], random.Random(f"test {seed}"))
    except ValueError:  # more rows than there are problems
        problems = []
    if not rows or evaluation_rows(problems, "en") != rows:
        raise UserError(f"{english} does not follow from --seed {seed}: pass the --seed that the world was made with")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = command.CommandParser(
        prog="python -m scripts.tiny_world",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write: datas/, llm/, mt5/")
    parser.add_argument(
        "--experts",
        action="store_true",
        help="also tune math_expert/ and language_expert/ from llm/; in a finished world, nothing else is made",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the folder if it exists; with --experts in a finished world, replace the experts alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    data = parser.add_argument_group("data, per language")
    data.add_argument("--pairs", type=int, default=4000, help="sentence pairs with English")
    data.add_argument("--problems", type=int, default=2000, help="training queries")
    # As many as MGSM has.
    data.add_argument("--test_problems", type=int, default=250, help="evaluation problems")
    models = parser.add_argument_group("models")
    models.add_argument("--vocabulary", type=int, default=2000, help="pieces of a tokenizer at most")
    models.add_argument("--llm_steps", type=int, default=1200, help="training steps of the LLM")
    models.add_argument("--llm_batch_size", type=int, default=32, help="texts per step")
    models.add_argument("--encoder_steps", type=int, default=500, help="training steps of the mT5")
    models.add_argument("--encoder_batch_size", type=int, default=64, help="sentence pairs per step")
    models.add_argument("--expert_steps", type=int, default=150, help="training steps of each expert")
    models.add_argument("--expert_batch_size", type=int, default=32, help="texts per step")
    return parser


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: for a seed or a number that cannot be used.
    """
    args = build_parser().parse_args(arguments)
    command.check_seed(args.seed)
    for name in (
        "pairs",
        "problems",
        "test_problems",
        "llm_steps",
        "llm_batch_size",
        "encoder_steps",
        "encoder_batch_size",
        "expert_steps",
        "expert_batch_size",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def timed_report():
    """Returns a function that logs a line with the seconds since now."""
    # Monotonic: a clock that is set during the run would report nonsense.
    started = time.monotonic()
    return lambda text: log(f"{text} ({time.monotonic() - started:.0f} s)")


def write_world(folder: Path, args: argparse.Namespace) -> None:
    """Writes data and both models under `folder`."""
    # Imported here so that --help and refusals are quick.
    from scripts.tiny_world.models import build_tokenizers, train_encoder, train_llm

    report = timed_report()
    write_data(folder / "datas", args.seed, args.pairs, args.problems, args.test_problems)
    llm_tokenizer, encoder_tokenizer = build_tokenizers(args.seed, args.vocabulary)
    report(f"data and tokenizers: {len(llm_tokenizer)} English pieces, {len(encoder_tokenizer)} multilingual pieces")

    model, loss = train_llm(llm_tokenizer, args.seed, args.llm_steps, args.llm_batch_size)
    model.save_pretrained(folder / "llm")
    llm_tokenizer.save_pretrained(folder / "llm")
    report(f"English LLM: {model.num_parameters()} parameters, loss {loss:.3f}")

    model, loss = train_encoder(encoder_tokenizer, args.seed, args.encoder_steps, args.encoder_batch_size)
    model.save_pretrained(folder / "mt5")
    encoder_tokenizer.save_pretrained(folder / "mt5")
    report(f"translating mT5: {model.num_parameters()} parameters, loss {loss:.3f}")


def write_experts(base: Path, folder: Path, args: argparse.Namespace) -> None:
    """Tunes both experts from the LLM in `base` and writes them under `folder`."""
    from scripts.tiny_world.models import tune_expert

    report = timed_report()
    for kind, name in EXPERTS.items():
        model, tokenizer, loss = tune_expert(kind, base, args.seed, args.expert_steps, args.expert_batch_size)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        report(f"{kind} expert: {args.expert_steps} steps from the LLM, loss {loss:.3f}")


def add_experts(args: argparse.Namespace) -> None:
    """Adds the experts to a finished world, and evaluation languages that it lacks: earlier ones have no French.

    Raises:
        UserError: when there is no such world, or it has experts already; nothing is changed then.
    """
    folder = args.output_dir
    problems = check_world(folder, args.seed)
    there = [str(folder / name) for name in EXPERTS.values() if (folder / name).exists()]
    if there and not args.overwrite:
        raise UserError(f"{' and '.join(there)} exist already: add --overwrite to replace the experts")
    # In a folder of its own: a stop while they are tuned leaves the world, and earlier experts, as they were.
    unfinished = folder / ".experts.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_experts(folder / "llm", unfinished, args)
        for language in EVALUATION_LANGUAGES:
            path = evaluation_file(folder / "datas", language)
            # Only what is missing: a finished world stays as it was.
            if not path.exists():
                write_lines(path, evaluation_rows(problems, language))
        for name in EXPERTS.values():
            # Moved aside, not deleted first: a folder cannot be renamed onto one that is not empty.
            if (folder / name).exists():
                os.replace(folder / name, unfinished / f"replaced_{name}")
            os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log(f"experts in {' and '.join(str(folder / name) for name in EXPERTS.values())}")


def main(arguments=None) -> None:
    """Runs the command line; see the module's docstring."""
    args = parse_arguments(arguments)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"{args.output_dir} is a file: name a folder with --output_dir")
    filled = args.output_dir.is_dir() and any(args.output_dir.iterdir())
    if filled and args.experts:
        add_experts(args)
        return
    if filled and not args.overwrite:
        raise UserError(f"{args.output_dir} exists: name another --output_dir, or add --overwrite to replace it")
    # A world that stands under its own name is a whole one, whatever stopped an earlier attempt.
    unfinished = args.output_dir.with_name(args.output_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_world(unfinished, args)
    if args.experts:
        write_experts(unfinished / "llm", unfinished, args)
    if args.output_dir.exists():
        shutil.rmtree(args.output_dir)
    os.replace(unfinished, args.output_dir)
    log(f"small world in {args.output_dir}")


if __name__ == "__main__":
    command.run_main(main, alone=True)
